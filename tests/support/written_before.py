"""Write the fixtures of tests/runs/test_written_before.py with the programs of an earlier commit.

    git worktree add --detach OLD 6ce2917
    python -m tests.support.written_before OLD tests/runs/written_before

OLD is a checkout of that commit. Only its programs' command lines are used, from inside the folder that is
written, so every path that a fixture records is relative. The folder then holds:

    base/, rows.json    a tiny random Llama with its tokenizer, and rows to train it on
    run/                a run that SIGTERM stopped in its middle
    finished/           the same run, carried on to its end: what today's code must arrive at
    adapter/            the finished adapter alone
    gguf/               the same model and adapter, exported for llama.cpp
    chat.jsonl          a chat with that adapter, saved
    written.json        the machine that wrote all this, the question that was asked, and the answers

The test imports from here what both need: how a program is started, how a run is stopped, what must be equal.
"""

import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from tests.support import tiny

COMMIT = "6ce2917ac09df9b777014599b771c1637dba4108"
STEPS, STOP_AT = 60, 54  # the stopped run has at least STOP_AT steps, and some are left
QUESTION = "Say quick"
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
TRAINING = {
    "model_path": "base",
    "data_path": "rows.json",
    "output_path": "run",
    "bits": 16,
    "dtype": "fp32",
    "device": "cpu",
    "batch_size": 6,
    "micro_batch_tokens": 150,  # several micro-batches a step
    "max_steps": STEPS,
    "learning_rate": 1e-2,
    "lora_r": 4,
    "lora_dropout": 0.1,
    "test_size": 4,
    "eval_steps": 3,
    "save_steps": 2,
}
ANSWER = {"mode": "greedy", "max_new_tokens": 16, "repetition_penalty": 1.0, "context": 256}
CLOCKS = ("seconds", "peak_memory_bytes", "time")  # these differ in every run


def command(checkout: Path, program: str, options: dict[str, Any]) -> list[str]:
    """The command line of a program of a checkout with these options."""
    flags = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, str(checkout / program), *flags]


def environment(cache: Path) -> dict[str, str]:
    """Environment variables for one thread, no hub, a separate cache and no modules of another checkout.

    The seed of hashes is fixed because peft writes a set of names into adapter_config.json in their order.
    """
    variables = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")
    }
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**variables, **settings, "PYTHONHASHSEED": "0", "ONECARD_CACHE": str(cache)}


def run(
    checkout: Path,
    program: str,
    options: dict[str, Any],
    folder: Path,
    cache: Path,
    lines: Iterable[str] = (),
) -> str:
    """Run a program of a checkout inside a folder, with lines as its input, and return its stdout.

    Raises AssertionError with its whole output when it fails.
    """
    ended = subprocess.run(
        command(checkout, program, options),
        cwd=folder,
        env=environment(cache),
        input="".join(f"{line}\n" for line in lines),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def stop_a_run(checkout: Path, folder: Path, cache: Path, options: dict[str, Any], after: int) -> int:
    """Train, send SIGTERM once checkpoint `after` exists, and return the step that was saved last."""
    for _ in range(5):  # a training that ends before its signal arrives is repeated
        shutil.rmtree(folder / "run", ignore_errors=True)
        process = subprocess.Popen(
            command(checkout, "finetune.py", options),
            cwd=folder,
            env=environment(cache),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        while process.poll() is None and not (folder / "run" / f"checkpoint-{after}").is_dir():
            time.sleep(0.002)
        process.send_signal(signal.SIGTERM)
        output = process.communicate()[0]
        steps = saved_steps(folder / "run")
        if process.returncode == 143 and steps[-1] < options["max_steps"]:
            return steps[-1]
        assert process.returncode in (0, 143), output
    raise AssertionError("No training could be stopped before its end.")


def saved_steps(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in run.glob("checkpoint-*"))


def prune(run: Path) -> None:
    """Keep only the newest checkpoint: a resume reads no other, as long as validation still improves."""
    for step in saved_steps(run)[:-1]:
        shutil.rmtree(run / f"checkpoint-{step}")


def outcome(folder: Path) -> dict[str, Any]:
    """What two continuations of one run must have in common, by file; clocks are left out.

    folder: a run, or what is kept of one.
    """
    last = folder / f"checkpoint-{saved_steps(folder)[-1]}"
    progress = json.loads((last / "progress.json").read_text(encoding="utf-8"))
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    adapter = ("adapter_config.json", "adapter_model.safetensors")
    files = [place / name for place in (folder, last) for name in adapter]
    files += [folder / "finetune_config.json", last / "optimizer.safetensors"]
    return {
        "log.jsonl": [_without_clocks(json.loads(line)) for line in lines],
        f"{last.name}/progress.json": _without_clocks(progress),
        **{str(path.relative_to(folder)): path.read_bytes() for path in files},
    }


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The names of the parts that differ between two outcomes."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def _without_clocks(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_clocks(inner) for name, inner in value.items() if name not in CLOCKS}
    return value


def machine() -> dict[str, str]:
    """The facts that decide the last bit of a sum: processor, kernels that torch chose, and versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    facts = {"processor": (names or ["unknown"])[0], "capability": torch.backends.cpu.get_cpu_capability()}
    packages = ("torch", "numpy", "transformers", "peft", "bitsandbytes")
    return facts | {name: importlib.metadata.version(name) for name in packages}


def write(checkout: Path, folder: Path, cache: Path) -> None:
    """Write all fixtures into a new folder, with the programs of a checkout."""
    folder.mkdir(parents=True)
    tiny.save_model(folder / "base", **SMALL, tie_word_embeddings=True)
    tiny.save_rows(folder / "rows.json", 24)
    stop_a_run(checkout, folder, cache, TRAINING, STOP_AT)
    prune(folder / "run")
    with tempfile.TemporaryDirectory() as place:  # so that the finished run has the same names
        copy = Path(place) / "copy"
        shutil.copytree(folder, copy)
        run(checkout, "finetune_continue.py", {"output_path": "run"}, copy, cache)
        prune(copy / "run")
        shutil.copytree(copy / "run", folder / "finished", ignore=shutil.ignore_patterns("*.png"))
    summary = json.loads((folder / "finished" / "finished.json").read_text(encoding="utf-8"))
    _write_json(folder / "finished" / "finished.json", {**summary, "machine": "see written.json"})
    (folder / "adapter").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(folder / "finished" / name, folder / "adapter" / name)
    export = {"model_path": "base", "lora_path": "adapter", "output_path": "gguf"}
    run(checkout, "tools/export_gguf.py", export, folder, cache)
    lines = [QUESTION, "/save chat.jsonl"]
    chat = {**ANSWER, "model_path": "base", "lora_path": "adapter", "dtype": "fp32", "terminal": True}
    answers = {"transformers": run(checkout, "interaction.py", chat, folder, cache, lines)}
    chat = {**ANSWER, "lora_path": "gguf"}
    answers["llama.cpp"] = run(checkout, "tools/cpu_chat.py", chat, folder, cache, [QUESTION])
    assert answers["transformers"] == answers["llama.cpp"], "The answer depends on rounding: ask another."
    values = {"commit": COMMIT, "machine": machine(), "question": QUESTION, "answers": answers}
    _write_json(folder / "written.json", values)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    checkout, folder = (Path(name).resolve() for name in sys.argv[1:])
    with tempfile.TemporaryDirectory() as cache:
        write(checkout, folder, Path(os.environ.get("ONECARD_CACHE", cache)))


if __name__ == "__main__":
    main()
