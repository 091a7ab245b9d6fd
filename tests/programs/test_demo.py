"""The real demo model, and the commands of README.md as a new user types them."""

import json
import os
import re
import shutil
import subprocess

import pytest

from onecard.config.options import build
from onecard.config.training import FinetuneConfig
from onecard.inference import chat
from onecard.training import loop, metrics
from tests.support import fresh_environment as fresh
from tests.support.paths import ROOT
from tests.support.small_runs import fall

THIS_VERY_RUN = "bash test.sh"


def commands(text: str) -> list[str]:
    """Lines of the bash blocks of a Markdown text."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory) -> fresh.Newcomer:
    """A copy of the project with nothing set up."""
    return fresh.Newcomer(tmp_path_factory.mktemp("newcomer") / "onecard")


@pytest.fixture(scope="module")
def readme(newcomer) -> dict[str, subprocess.CompletedProcess]:
    """Every command of README.md, run in order with only the packages that it and those before it set up.

    This test run itself is left out.
    """
    written = commands((newcomer.folder / "README.md").read_text(encoding="utf-8"))
    return {command: newcomer.run(command) for command in written if command != THIS_VERY_RUN}


@pytest.mark.ci
def test_readme_commands_work(readme):
    """Each command ends with exit code 0."""
    assert "bash finetune.sh" in readme
    failed = {command: result.stderr[-2000:] for command, result in readme.items() if result.returncode}
    assert not failed


@pytest.mark.ci
def test_the_default_run_says_what_it_does(readme):
    """It prints its choices, parameters, three rows, steps, validation, answers and the adapter's path."""
    output = readme["bash finetune.sh"].stdout
    for line in (
        r"device      cpu: .+",
        r"dtype       computation in (bf16|fp32): this CPU .+",
        r"base        8 bits by bitsandbytes.+",
        r"attention   one causal call for each row of a packed micro-batch, .+",
        r"activations gradient checkpointing is off: .+",
        r"rows        205 to train on, 11 for validation; .+",
        r"steps       26 of 16 rows \(13 an epoch\), learning rate 0.003 linear, warm-up 5 steps",
        r"trained     460,800 of 134,[\d,]+ parameters \(0.34 %\), .+ in q_proj, v_proj",
        r"micro-batch 2048 tokens: .+",
        r"validation at step 0: loss [\d.]+, [\d.]+ % of target tokens right",
        r"step 26/26  loss [\d.]+  [\d.]+ rows/s, \d+ tokens/s  [\d.]+ GiB  0 s left",
        r"Validation loss [\d.]+ before, [\d.]+ after \(best at step \d+\)\.",
        r"The adapter is in lora-checkpoints/demo: .+",
    ):
        assert re.search(f"^{line}$", output, flags=re.MULTILINE), line
    assert output.count("<|im_end|>»") == 3
    assert output.count("\n  before: ") == output.count("\n  after:  ") == 8


@pytest.mark.ci
def test_the_default_run_teaches_the_form(readme, newcomer):
    """After it at least 6 of 8 validation answers have the form, and before it none; losses fall."""
    folder = newcomer.folder / "lora-checkpoints" / "demo"
    counted = readme["python3 sample/check_form.py lora-checkpoints/demo"].stdout
    before, after = (int(number) for number in re.findall(r"training: (\d) of 8", counted))
    assert before == 0
    assert after >= 6
    finished = json.loads((folder / "finished.json").read_text())
    assert finished["eval_loss_after"] < finished["eval_loss_before"]
    assert 30_000 < finished["tokens"] < 50_000
    assert fall(folder) < 0.8


@pytest.mark.ci
def test_the_default_run_again_is_finished(readme, newcomer):
    """The exit code is 0, nothing is set up or trained again, and the next steps are named."""
    folder = newcomer.folder / "lora-checkpoints" / "demo"
    before = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))
    again = newcomer.run("bash finetune.sh", timeout=120)
    assert again.returncode == 0
    assert "This run is finished: 26 steps" in again.stdout
    assert "--overwrite" in again.stdout
    assert "Setting up" not in again.stdout
    assert sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*")) == before


@pytest.mark.slow
def test_four_bits_learn_too(tmp_path):
    """NF4 with double quantisation on the demo model: the loss falls below 0.8 of its start."""
    changes = {"bits": 4, "batch_size": 8, "max_steps": 16, "learning_rate": 4e-3, "test_size": 0}
    paths = {"output_path": str(tmp_path / "run"), "data_path": str(ROOT / "sample/instruct.json")}
    settings = build(FinetuneConfig, {**changes, **paths})
    loop.run(settings, sample=chat.reply, draw=metrics.loss_curve)
    assert fall(tmp_path / "run") < 0.8


def test_old_python_is_told_so(tmp_path, copy):
    """With an interpreter below 3.11 there is one message, exit code 2, and no environment."""
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo "Python 3.9.2"\n[ "$1" = -c ] && exit 1\nexit 0\n')
    old.chmod(0o755)
    for name in ("finetune.sh", "test.sh"):
        other = tmp_path / "project"
        shutil.copytree(
            copy, other, ignore=shutil.ignore_patterns(".venv", "lora-checkpoints"), dirs_exist_ok=True
        )
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        result = subprocess.run(["bash", name], cwd=other, env=environment, capture_output=True, text=True)
        assert result.returncode == 2
        assert result.stderr.count("\n") == 1
        assert "3.11" in result.stderr
        assert "3.9.2" in result.stderr
        assert not (other / ".venv").exists()


def test_several_gpus_start_torchrun(tmp_path, copy):
    """Two GPUs in TOT_CUDA start torchrun with PORT and all variables as options; one GPU starts python."""
    other = tmp_path / "project"
    shutil.copytree(copy, other, ignore=shutil.ignore_patterns(".venv", "lora-checkpoints"))
    fake = other / ".venv" / "bin" / "python"
    fake.parent.mkdir(parents=True)
    fake.write_text(
        '#!/bin/sh\n[ "$1" = -m ] && [ "$2" = pip ] && exit 0\necho "$CUDA_VISIBLE_DEVICES: $*"\n'
    )
    fake.chmod(0o755)
    fake.with_name("activate").touch()  # venv writes this file last
    variables = {
        "PORT": "23456",
        "DATA_PATH": "a b.json",
        "OUTPUT_PATH": "o",
        "MODEL_PATH": "m",
        "TEST_SIZE": "7",
    }
    lines = {}
    for gpus in ("0,1", "1"):
        environment = {**os.environ, **variables, "TOT_CUDA": gpus}
        command = ["bash", "finetune.sh", "--num_epochs", "1"]
        result = subprocess.run(
            command, cwd=other, env=environment, capture_output=True, text=True, check=True
        )
        lines[gpus] = result.stdout.splitlines()[-1]
    flags = "--data_path a b.json --output_path o --model_path m --test_size 7 --num_epochs 1"
    flags = f"{other}/finetune.py {flags}"
    assert lines["1"] == f"1: {flags}"
    assert lines["0,1"] == f"0,1: -P -m torch.distributed.run --nproc_per_node=2 --master_port=23456 {flags}"
