"""Write the fixtures of tests/runs/test_previous_release.py with the code of the previous release.

    git worktree add --detach OLD b34c7c4dbc5d
    python -m tests.support.previous_release OLD tests/runs/previous_release

OLD is a checkout of that commit. The harness of OLD runs its trainings. The folder then
holds a run (first) and one that took its adapter and optimizer on to other rows (others): each of them as it
was when SIGKILL came, and under NAME-finished the log and the adapter at which that release itself arrived.
base/ is that of tests/runs/written_before.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

PLACE = Path("previous")  # relative, because a run records the paths that it was given
FIRST = {
    "model_path": PLACE / "base",
    "data_path": PLACE / "rows.json",
    "output_path": PLACE / "first",
    "bits": 16,
    "dtype": "fp16",  # so that there is a loss scaler
    "device": "cpu",
    "batch_size": 6,
    "micro_batch_tokens": 150,
    "num_epochs": 3,
    "learning_rate": 1e-2,
    "lr_scheduler": "cosine",
    "warmup_ratio": 0.25,
    "weight_decay": 0.1,
    "lora_dropout": 0.1,
    "lora_r": 4,
    "test_size": 5,
    "eval_steps": 3,
    "save_steps": 1,
    "save_total_limit": 1,
}
OTHERS = {
    "resume_from_checkpoint": PLACE / "first",
    "data_path": PLACE / "other.json",
    "output_path": PLACE / "others",
    "num_epochs": 5,  # more steps than the first run had planned
}
RESULT = ("log.jsonl", "adapter_model.safetensors")


def main() -> None:
    """Run this file in the older checkout, so that it imports the modules from there."""
    checkout, folder = (Path(name).resolve() for name in sys.argv[1:])
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    command = [sys.executable, "-P", __file__, str(folder)]
    subprocess.run(command, cwd=checkout, env=environment, check=True)


def write(target: Path) -> None:
    """Write all fixtures into a new folder, in a process that works in the older checkout."""
    from tests.support import tiny
    from tests.support.harness import started

    base = target.parent / "written_before" / "base"
    shutil.rmtree(PLACE, ignore_errors=True)
    shutil.copytree(base, PLACE / "base")
    tiny.save_rows(PLACE / "rows.json", 24)
    (PLACE / "other.json").write_text(json.dumps(tiny.rows(48)[24:]), encoding="utf-8")
    with started() as harness:
        stops = (("first", "finetune", FIRST, [8, 1]), ("others", "finetune_continue", OTHERS, [4, 1]))
        for name, program, options, moment in stops:
            answer = harness.run(program, options, kill_in_step=moment)
            assert answer["code"] == -9, answer["said"]
            shutil.copytree(PLACE / name, target / name, ignore=shutil.ignore_patterns(".*"))
        for name in ("first", "others"):
            answer = harness.run("finetune_continue", {"output_path": PLACE / name})
            assert answer["code"] == 0, answer["said"]
            (target / f"{name}-finished").mkdir()
            for file in RESULT:
                shutil.copy(PLACE / name / file, target / f"{name}-finished")
    for file in ("rows.json", "other.json"):
        shutil.copy(PLACE / file, target)


if __name__ == "__main__":
    write(Path(sys.argv[1])) if len(sys.argv) == 2 else main()
