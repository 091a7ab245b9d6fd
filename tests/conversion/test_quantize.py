"""Quantised folders can be loaded by other libraries and trained on; what cannot be quantised is refused."""

import functools
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from onecard.config.conversion import QuantizeConfig
from onecard.config.options import build
from onecard.conversion import gptq_awq, quantize
from onecard.data import template as data_template
from onecard.errors import CHECKPOINT, DATA, DISK, USAGE, UserError
from onecard.evaluation import eval_rows, likelihood
from onecard.models import base_model, quantized
from onecard.models import tokenizer as models_tokenizer
from tests.support import kill_points, tiny
from tests.support.paths import ROOT

HAS_LIBRARY = all(importlib.util.find_spec(name) for name in quantized.PACKAGES)
APART = ROOT / ".venv" / "gptq" / "bin" / "python"  # has gptqmodel, which changes every program's start
needs_library = pytest.mark.skipif(not HAS_LIBRARY, reason="needs gptqmodel, which .venv/gptq has")
SHAPE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "initializer_range": 0.05}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2}
NARROW = {**SHAPE, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
NARROW |= {"num_key_value_heads": 4, "num_hidden_layers": 1}
IDS = torch.arange(2, 130)[None]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("quantize") / "model", **SHAPE)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return tiny.save_rows(tmp_path_factory.mktemp("quantize") / "rows.json", 60)


def run(folder: Path, program: str, *flags) -> subprocess.CompletedProcess:
    """Run a program in a process of its own, since gptqmodel keeps threads."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, ROOT / program, *map(str, flags)]
    settings = {"capture_output": True, "text": True, "timeout": 1500, "env": environment}
    return subprocess.run(command, cwd=folder, **settings)


def quantise(source: Path | str, rows: Path, target: Path, *flags) -> str:
    options = ("--model_path", source, "--data_path", rows, "--output_path", target, "--device", "cpu")
    ended = run(target.parent, "tools/quantize.py", *options, *flags)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


def bnb(source: Path, rows: Path, target: Path, **changes) -> QuantizeConfig:
    options = {"model_path": source, "data_path": rows, "output_path": target, "device": "cpu"}
    options = {name: str(value) for name, value in options.items()}
    return build(QuantizeConfig, {**options, "method": "bnb", "report_rows": 2, **changes})


def told_of(said: str) -> list[str]:
    """The lines about size and perplexity before and after."""
    return re.findall(r"^(?:size|perplexity)  .* -> .*$", said, re.MULTILINE)


@functools.cache
def loaded(folder: Path) -> torch.nn.Module:
    return base_model.load_base(str(folder), 16, "fp32", "cpu").eval()


def logits(folder: Path, ids: Sequence[int] = range(2, 130)) -> torch.Tensor:
    with torch.no_grad():
        return loaded(folder)(input_ids=torch.tensor([list(ids)])).logits[0]


def rounded(source: Path, target: Path, bits: int, group: int) -> Path:
    """The model with each linear weight rounded to the nearest step of its group."""
    model = base_model.load_base(str(source), 16, "fp32", "cpu")
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            width = layer.in_features if group == -1 else group
            grouped = layer.weight.data.reshape(layer.out_features, -1, width)
            step = grouped.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 0.5)
            whole = (grouped / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            layer.weight.data = (whole * step).reshape(layer.weight.shape)
    model.save_pretrained(target)
    return target


def errors(source: Path, rows: Path, *targets: Path) -> list[float]:
    """How far the logits of each target are from the model's on rows of the file, relative to their norm."""
    tokenizer = models_tokenizer.load_tokenizer(str(source))
    sequences = [
        ids for ids, _ in eval_rows.read(str(rows), 512, data_template.load("alpaca", tokenizer), tokenizer)
    ][:20]
    expected, *outputs = (
        torch.cat([logits(folder, ids) for ids in sequences]) for folder in (source, *targets)
    )
    return [((each - expected).norm() / expected.norm()).item() for each in outputs]


@pytest.mark.skipif(HAS_LIBRARY, reason="gptqmodel is here: they run by themselves")
@pytest.mark.skipif(not APART.exists(), reason=f"{APART} is not there: bash tools/setup.sh test")
def test_those_that_need_gptqmodel():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [APART, "-m", "pytest", "-m", "gptq and not slow", "-p", "no:cacheprovider", __file__]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500)
    assert ended.returncode == 0, ended.stdout[-5000:]
    summary = ended.stdout.splitlines()[-1]
    assert re.search(r"\b[1-9]\d* passed", summary), summary
    assert "skipped" not in summary


@pytest.fixture(scope="module")
def by_gptq(source, rows, tmp_path_factory) -> tuple[Path, str]:
    target = tmp_path_factory.mktemp("gptq") / "model"
    return target, quantise(source, rows, target, "--report_rows", 4, "--group_size", 32)


@pytest.mark.gptq
@needs_library
def test_a_gptq_folder_is_what_others_load(source, by_gptq, rows, tmp_path):
    """It has the standard keys and settings, is smaller, and nearer to the model than rounding.

    A second call has nothing to do.
    """
    target, output = by_gptq
    settings = json.loads((target / "config.json").read_text())["quantization_config"]
    assert (settings["quant_method"], settings["bits"], settings["group_size"]) == ("gptq", 4, 32)
    names = set(load_file(target / "model.safetensors"))
    layer = "model.layers.0.self_attn.q_proj"
    assert {f"{layer}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")} <= names
    assert "rows        56 calibration rows of" in output
    assert "size        " in output
    layers = re.findall(r"^layer (\d+) +squared error (\S+), (\S+) in \S+_proj$", output, re.MULTILINE)
    assert [int(number) for number, *_ in layers] == list(range(tiny.config().num_hidden_layers))
    assert all(0 < float(most) <= float(both) < 1 for _, both, most in layers)
    assert f"on 4 rows of {rows} that were not calibration rows" in output
    error, plain = errors(source, rows, target, rounded(source, tmp_path / "rounded", 4, 32))
    assert error < plain < 0.5
    again = quantise(source, rows, target, "--report_rows", 4, "--group_size", 32)
    assert "made from the same files and options, so there is nothing to do" in again
    assert told_of(again) == told_of(output) != []
    texts = [path.read_text() for path in target.glob("*.json")]
    assert [text for text in texts if ".waiting" in text or ".making" in text] == []
    assert not {"logs", ".waiting"} & {path.name for path in (*target.iterdir(), *target.parent.iterdir())}


@pytest.mark.parametrize("layout", ["config.json", "quantize_config.json"])
def test_the_path_where_layers_waited_is_not_published(tmp_path, layout):
    """It is a path of this computer that is gone; gptqmodel saves it in two files, and all else stays."""
    settings = {"bits": 4, "meta": {"offload_to_disk_path": "/home/me/.out.making/.waiting", "mse": 0.0}}
    values = {"quantization_config": settings} if layout == "config.json" else settings
    (tmp_path / layout).write_text(json.dumps(values))
    gptq_awq._leave_out_waiting(tmp_path)
    del settings["meta"]["offload_to_disk_path"]
    assert json.loads((tmp_path / layout).read_text()) == values


@pytest.mark.gptq
@needs_library
def test_an_adapter_learns_on_a_gptq_base(by_gptq, rows, tmp_path):
    """finetune.py trains on the folder, and the loss falls; all-linear means the packed layers."""
    flags = {"model_path": by_gptq[0], "data_path": rows, "output_path": tmp_path / "run", "device": "cpu"}
    flags |= {"dtype": "fp32", "learning_rate": 1e-2, "num_epochs": 2, "batch_size": 6, "test_size": 0}
    flags |= {"lora_target_modules": "all-linear", "warmup_steps": 0}
    ended = run(tmp_path, "finetune.py", *(f"--{name}={value}" for name, value in flags.items()))
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "base        4 bits by gptq" in ended.stdout
    assert "in down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in ended.stdout
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses[-1] < losses[0] - 0.5


def test_a_bitsandbytes_folder_is_the_model_in_these_bits(source, rows, tmp_path):
    """Its logits equal those of the 16-bit folder loaded in 4 bits."""
    output = quantise(source, rows, tmp_path / "small", "--method", "bnb", "--report_rows", 0)
    assert "perplexity" not in output
    dtype = json.loads((tmp_path / "small" / "config.json").read_text())["dtype"]
    short = {"bfloat16": "bf16", "float32": "fp32"}[dtype]
    expected = base_model.load_base(str(source), 4, short, "cpu").eval()
    actual = base_model.load_base(str(tmp_path / "small"), 16, short, "cpu").eval()
    with torch.no_grad():
        assert torch.equal(actual(input_ids=IDS).logits, expected(input_ids=IDS).logits)


@pytest.fixture(scope="module")
def dead_input(tmp_path_factory) -> Path:
    """A model of one narrow layer, one of whose inputs is always zero."""
    folder = tiny.save_model(tmp_path_factory.mktemp("dead") / "model", **NARROW)
    whole = load_file(folder / "model.safetensors")
    whole["model.embed_tokens.weight"][:, 5] = 0
    save_file(whole, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.gptq
@needs_library
@pytest.mark.parametrize(
    "changes",
    [
        {"bits": 2},
        {"bits": 3},
        {"bits": 8},
        {"act_order": True},
        {"group_size": -1},
        {"rows": 1},
        {"damp": 1e-9},
        {"method": "awq"},
    ],
    ids=str,
)
def test_every_kind_loads_with_finite_logits(dead_input, rows, tmp_path, changes):
    """X6: with few bits, one row, little damping or a dead input: finite logits, no worse than rounding.

    The error is that of the logits on rows like the calibration rows; on other rows no method promises less
    error than rounding. The folder's config says what was asked for.
    """
    paths = {"model_path": dead_input, "data_path": rows, "output_path": tmp_path / "made"}
    paths = {name: str(path) for name, path in paths.items()}
    quantize.run(build(QuantizeConfig, {**paths, "device": "cpu", "report_rows": 0, **changes}))
    settings = json.loads((tmp_path / "made" / "config.json").read_text())["quantization_config"]
    bits, group = changes.get("bits", 4), changes.get("group_size", 64)
    recorded = {name: settings[name] for name in ("quant_method", "bits", "group_size", "desc_act")}
    assert recorded == {
        "quant_method": changes.get("method", "gptq"),
        "bits": bits,
        "group_size": group,
        "desc_act": changes.get("act_order", False),
    }
    assert ".waiting" not in (tmp_path / "made" / "config.json").read_text()
    assert torch.isfinite(logits(tmp_path / "made")).all()
    error, plain = errors(
        dead_input, rows, tmp_path / "made", rounded(dead_input, tmp_path / "rounded", bits, group)
    )
    assert 0 < error <= plain


@pytest.mark.gptq
@needs_library
@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_error_is_at_most_that_of_rounding(source, rows, tmp_path, bits):
    """X6: this holds for the logits, on rows like the calibration rows, with the same bits and groups."""
    quantise(source, rows, tmp_path / "made", "--bits", bits, "--group_size", 32, "--report_rows", 0)
    error, plain = errors(source, rows, tmp_path / "made", rounded(source, tmp_path / "rounded", bits, 32))
    assert error <= plain


@pytest.mark.gptq
@needs_library
@pytest.mark.slow
def test_the_demo_with_the_tool(tmp_path):
    """GPTQ with 4 bits: the perplexity of other rows is printed and is hardly larger than before."""
    sample = ROOT / "sample" / "instruct.json"
    output = quantise("demo", sample, tmp_path / "made", "--rows", 64)
    before, after, ratio = map(
        float, re.search(r"perplexity  ([\d.]+) -> ([\d.]+) \(ratio ([\d.]+)\) on 16 rows", output).groups()
    )
    assert 1 < before < 100
    assert ratio == pytest.approx(after / before, abs=1e-3)
    assert ratio < 1.3


def test_each_layers_error_is_told(capsys):
    """The sum over a layer's modules and the largest one; a module without rows in the library's words."""
    noted = [("q", 0, "0.25"), ("up", 0, "0.5"), ("q", 1, "0.125"), ("up", 1, "rtn fallback")]
    gptq_awq.print_errors([{"module": m, "layer": n, "loss": loss} for m, n, loss in noted])
    assert capsys.readouterr().out.splitlines() == [
        "layer 1     up: rtn fallback",
        "layer 0     squared error 7.50e-01, 5.00e-01 in up",
        "layer 1     squared error 1.25e-01, 1.25e-01 in q",
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "awq", "bits": 3}, "awq can have 4 bits"),
        ({"method": "bnb", "bits": 2}, "bnb can have 4, 8 bits"),
        ({"group_size": 128, "hidden": 192}, "has 192 inputs"),
        ({"hidden": 96, "method": "awq"}, "multiples of 32 and 64"),
        ({"model_path": None}, "--model_path is missing"),
        ({"method": "bnb", "damp": 0.1}, "--damp is for --method gptq. Leave it out"),
        ({"method": "bnb", "rows": 5, "group_size": 64}, "--group_size is .*--rows is for --method gptq or"),
        ({"method": "awq", "act_order": True, "group_size": 32}, r"^--act_order is for --method gptq\."),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, rows, changes, words):
    """It is refused before anything is read or written, with the name and shape of the layer."""
    hidden = changes.pop("hidden", 128)
    source = tiny.save_model(tmp_path / "model", **{**SHAPE, "hidden_size": hidden, "head_dim": 16})
    paths = {"model_path": str(source), "data_path": str(rows), "output_path": str(tmp_path / "out")}
    options = build(QuantizeConfig, {**paths, **changes})
    with pytest.raises(UserError, match=words) as caught:
        quantize.run(options)
    assert caught.value.code == USAGE
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damp", [0, 1, -0.1, "nan"])
def test_damping_is_a_share(damp):
    with pytest.raises(UserError, match="damp"):
        build(QuantizeConfig, {"damp": float(damp)})


def test_weights_that_are_no_numbers_are_refused(source, rows, tmp_path):
    """X6: the exit code is 4 with the name of the tensor, and nothing is written."""
    whole = load_file(source / "model.safetensors")
    whole["model.layers.1.mlp.up_proj.weight"][7, 7] = float("nan")
    bad = tmp_path / "bad"
    tiny.save_model(bad, **SHAPE)
    save_file(whole, bad / "model.safetensors", {"format": "pt"})
    paths = {"model_path": str(bad), "data_path": str(rows), "output_path": str(tmp_path / "out")}
    options = build(QuantizeConfig, {**paths, "method": "bnb"})
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight holds values") as caught:
        quantize.run(options)
    assert caught.value.code == CHECKPOINT
    assert not (tmp_path / "out").exists()


def fail(*_) -> None:
    raise AssertionError("it was not to come this far")


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"device": "foo"}, USAGE),
        ({"device": "cuda"}, USAGE),
        ({"template": "nope"}, USAGE),
        ({"data_path": "no.json"}, DATA),
    ],
    ids=str,
)
def test_options_are_checked_before_the_weights_are_read(source, rows, tmp_path, monkeypatch, changes, code):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(quantize, "_check_weights", fail)
    with pytest.raises(UserError) as caught:
        quantize.run(bnb(source, rows, tmp_path / "out", **changes))
    assert (caught.value.code, list(tmp_path.iterdir())) == (code, [])


def test_rows_are_needed_only_for_calibration_and_report(source, tmp_path, monkeypatch):
    """bitsandbytes without a report needs no rows; the sample is found from any working directory."""
    monkeypatch.chdir(tmp_path)
    without_report = bnb(source, "none.json", tmp_path / "out", report_rows=0)
    assert quantize._rows(without_report, source, None) == ([], [])
    options = build(QuantizeConfig, {"method": "bnb", "report_rows": 3})
    assert len(quantize._rows(options, source, None)[1]) == 3
    tiny.save_rows(tmp_path / "rows.json", 8)
    (tmp_path / "sample").mkdir()
    (tmp_path / "rows.json").rename(tmp_path / options.data_path)  # the user's own file comes first
    assert len(quantize._rows(options, source, None)[1]) == 2


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_perplexity_that_is_no_number_is_refused(source, rows, tmp_path, monkeypatch, when, number):
    """X6: the exit code is 4, and no folder is kept."""
    plain = eval_rows.perplexity

    def measured(*arguments) -> float:
        return number if arguments[-1] == f"perplexity {when}" else plain(*arguments)

    monkeypatch.setattr(eval_rows, "perplexity", measured)
    with pytest.raises(UserError, match=f"perplexity {when}: {number}") as caught:
        quantize.run(bnb(source, rows, tmp_path / "out"))
    assert (caught.value.code, list(tmp_path.iterdir())) == (CHECKPOINT, [])


@pytest.mark.parametrize(("nats", "found"), [(0.0, 1.0), (1e9, math.exp(700)), (float("inf"), float("inf"))])
def test_perplexity_of_a_token(nats, found):
    assert likelihood.perplexity(nats, 1) == found


def test_what_can_be_seen_has_been_measured(source, rows, tmp_path, monkeypatch, capsys):
    """If it is interrupted while it measures, there is no folder; a second call prints its figures again."""
    plain, target = eval_rows.perplexity, tmp_path / "out"

    def cut(*arguments) -> float:
        if arguments[-1] == "perplexity after":
            assert not target.exists()
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(eval_rows, "perplexity", cut)
    with pytest.raises(KeyboardInterrupt):
        quantize.run(bnb(source, rows, target))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(eval_rows, "perplexity", plain)
    capsys.readouterr()
    quantize.run(bnb(source, rows, target))
    first = told_of(capsys.readouterr().out)
    monkeypatch.setattr(eval_rows, "perplexity", fail)
    quantize.run(bnb(source, rows, target))
    assert told_of(capsys.readouterr().out) == first
    assert [line.split()[0] for line in first] == ["size", "perplexity"]


def test_a_full_disk_is_told_before_anything_is_read(source, rows, tmp_path, monkeypatch, capsys):
    """Exit code 7 with the size comes before the weights are checked and the perplexity is measured."""
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    options = {"model_path": str(source), "data_path": str(rows), "output_path": str(tmp_path / "out")}
    with pytest.raises(UserError, match=r"--output_path .*needs .*free: 0 MiB") as caught:
        quantize.run(build(QuantizeConfig, {**options, "method": "bnb"}))
    assert (caught.value.code, capsys.readouterr().out, list(tmp_path.iterdir())) == (DISK, "", [])


@pytest.mark.slow
def test_killed_at_every_operation(source, rows, tmp_path):
    """SIGKILL before each operation leaves no folder without its figures, and the next run is clean."""
    kill_points.check("quantize", tmp_path / "out", model_path=source, data_path=rows, report_rows=1)


def test_a_terminal_sees_how_far_it_is(source, rows, tmp_path, capsys, monkeypatch):
    """The check of the weights and each perplexity have a progress bar in a terminal, and none in a pipe."""
    titles = ("checking the weights:", "perplexity before:", "perplexity after:")
    options = {"model_path": str(source), "data_path": str(rows), "method": "bnb", "report_rows": 2}
    options |= {"device": "cpu"}
    quantize.run(build(QuantizeConfig, {**options, "output_path": str(tmp_path / "one")}))
    assert not [title for title in titles if title in capsys.readouterr().err]
    monkeypatch.setattr(sys, "stderr", tiny.Screen())
    quantize.run(build(QuantizeConfig, {**options, "output_path": str(tmp_path / "two")}))
    assert [title for title in titles if title not in sys.stderr.getvalue()] == []


def test_missing_packages_are_named(monkeypatch, source, rows, tmp_path):
    monkeypatch.setattr(quantized, "PACKAGES", ("no_such_package",))
    options = {"model_path": str(source), "data_path": str(rows), "output_path": str(tmp_path / "out")}
    with pytest.raises(UserError, match=r"no_such_package.*setup\.sh gptq"):
        quantize.run(build(QuantizeConfig, options))
