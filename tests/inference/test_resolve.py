"""Chat, perplexity, export and merge find the same base and template, and refuse the same mistakes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from onecard.config.chat import ChatConfig
from onecard.config.conversion import ExportConfig, MergeConfig
from onecard.config.options import build
from onecard.config.tools import PerplexityConfig
from onecard.conversion import export_gguf, merge
from onecard.errors import CHECKPOINT, USAGE, UserError
from onecard.evaluation import perplexity
from onecard.hub import demo, revisions
from onecard.hub.revisions import Version
from onecard.inference import loader, resolve
from onecard.inference.resolve import ResolvedModel
from onecard.models import base_model
from onecard.runs import folder as runs_folder
from onecard.system import hashing
from tests.support import console, tiny
from tests.support.adapters import save_adapter

TEMPLATE = "vicuna-chat"
ANSWERING = {
    "chat": lambda paths: loader.prepare(build(ChatConfig, paths)).model,
    "perplexity": lambda paths: loader.prepare(perplexity.for_chat(build(PerplexityConfig, paths))).model,
}
WRITING = {
    "export": lambda paths: resolve.resolve(export_gguf.request(build(ExportConfig, paths))),
    "merge": lambda paths: resolve.resolve(merge.request(build(MergeConfig, paths))),
}
PROGRAMS = {**ANSWERING, **WRITING}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path]:
    """A base, and an adapter with the record that a run makes of it."""
    place = tmp_path_factory.mktemp("trained")
    base = tiny.save_model(place / "base")
    adapter = save_adapter(base, place / "adapter")
    files = base_model.identity_files(str(base))
    prints = {name: hashing.of_folder(files[kind]) for name, kind in RECORDED.items()}
    record(adapter, str(base), prints)
    return base, adapter


RECORDED = {"base model": "weights", "tokenizer": "tokenizer"}


def record(adapter: Path, base: str | None, fingerprints: dict[str, str]) -> None:
    options = {"model_path": base, "bits": 16, "template": TEMPLATE}
    stored = {"options": options, "resolved": {}, "fingerprints": fingerprints}
    (adapter / runs_folder.CONFIG).write_text(json.dumps(stored))


@pytest.fixture
def pair(trained, tmp_path) -> tuple[Path, Path]:
    """Copies of both that a test may change; the adapter names the copy of its base."""
    base, adapter = (Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in trained)
    stored = json.loads((adapter / runs_folder.CONFIG).read_text())
    record(adapter, str(base), stored["fingerprints"])
    return base, adapter


def change_weights(base: Path, adapter: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def change_tokenizer(base: Path, adapter: Path) -> None:
    path = base / "tokenizer_config.json"
    path.write_text(path.read_text() + "\n")


def quantise(base: Path, adapter: Path) -> None:
    path = base / "config.json"
    quantised = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **quantised}))


def forget_fingerprints(base: Path, adapter: Path) -> None:
    change_weights(base, adapter)
    change_tokenizer(base, adapter)
    record(adapter, str(base), {})


def name_no_base(base: Path, adapter: Path) -> None:
    (adapter / runs_folder.CONFIG).unlink()
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": None}))


def move_base(base: Path, adapter: Path) -> None:
    base.rename(base.parent / "elsewhere")


def nothing(base: Path, adapter: Path) -> None:
    pass


Change = Callable[[Path, Path], None]


def options(base: Path | None, adapter: Path) -> dict[str, str]:
    paths = {"model_path": str(base)} if base else {}
    return {**paths, "lora_path": str(adapter)}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("is_named", [False, True], ids=["unnamed", "named"])
@pytest.mark.parametrize("change", [nothing, forget_fingerprints])
def test_the_same_base_and_template(pair, program, is_named, change):
    """If the base is named or not, and with or without correct fingerprints, there is no warning."""
    base, adapter = pair
    change(base, adapter)
    with console.heard() as lines:
        model: ResolvedModel = PROGRAMS[program](options(base if is_named else None, adapter))
        assert (model.base, model.template.name) == (str(base), TEMPLATE)
        assert model.active_adapters == (("adapter", 1.0),)
        assert model.tokenizer.get_vocab() == tiny.tokenizer().get_vocab()
    assert model.base_reason == ("asked for" if is_named else "the adapter was made with it")
    assert f"adapter     adapter: {adapter}" in lines
    assert not any("warning" in line for line in lines)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    ("change", "words", "code"),
    [
        (change_weights, "was trained with other weights than", CHECKPOINT),
        (quantise, "was trained with other weights than", CHECKPOINT),
        (change_tokenizer, "was trained with another tokenizer than", CHECKPOINT),
        (name_no_base, "the adapter does not say its base model", USAGE),
        (move_base, "which is not on this machine", USAGE),
    ],
)
def test_the_same_refusals(pair, program, change, words, code):
    """The user named no base, and the one that the adapter was trained on is missing or has changed."""
    change(*pair)
    with pytest.raises(UserError, match=words) as caught:
        PROGRAMS[program](options(None, pair[1]))
    assert caught.value.code == code
    assert "--model_path" in caught.value.fix


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (change_weights, "was trained with other weights than"),
        (quantise, "is quantised, so it cannot be compared"),
        (change_tokenizer, "was trained with another tokenizer than"),
    ],
)
def test_another_base_that_the_user_names(pair, program, change, words):
    """Answers come with a warning; a program that writes files refuses."""
    base, adapter = pair
    change(base, adapter)
    if program in WRITING:
        with pytest.raises(UserError, match="was trained with") as caught:
            PROGRAMS[program](options(base, adapter))
        assert caught.value.code == CHECKPOINT
        return
    with console.heard() as lines:
        model = PROGRAMS[program](options(base, adapter))
    assert model.base == str(base)
    assert any(line.startswith("warning:") and words in line for line in lines)
    assert any("because --model_path names it" in line for line in lines)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_gguf_file_and_an_adapter_of_peft(pair, tmp_path, program):
    (tmp_path / "base.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"base\.gguf.* is a GGUF file") as caught:
        PROGRAMS[program](options(tmp_path / "base.gguf", pair[1]))
    assert caught.value.code == USAGE


def test_a_merge_takes_the_tokenizer_that_the_adapter_brings(pair):
    """The base's tokenizer may then differ; chat and export use that of the base."""
    base, adapter = pair
    tiny.tokenizer().save_pretrained(adapter)
    change_tokenizer(base, adapter)
    assert PROGRAMS["merge"](options(None, adapter)).own_tokenizer == adapter
    with pytest.raises(UserError, match="another tokenizer"):
        PROGRAMS["export"](options(None, adapter))


@pytest.mark.parametrize("program", ["chat", "perplexity", "export"])
def test_nothing_is_named(program, monkeypatch, tmp_path):
    """The demo model is used, with the tokenizer's own template if it has one."""
    monkeypatch.setenv("ONECARD_CACHE", str(tmp_path))
    monkeypatch.setattr(demo, "make_demo", tiny.save_model)
    model = PROGRAMS[program]({})
    assert (model.name, model.base) == ("demo", str(tmp_path / demo.DEMO_FOLDER))
    assert (model.template.name, model.active_adapters) == ("alpaca", ())


def test_adapters_on_different_bases_are_refused_without_a_download(pair, tmp_path, monkeypatch):
    """One of them was trained on the demo model, which is not on this machine."""
    monkeypatch.setenv("ONECARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "make_demo", lambda folder: pytest.fail("fetched"))
    other = Path(shutil.copytree(pair[1], tmp_path / "other"))
    record(other, demo.DEMO, {})
    with pytest.raises(UserError, match="were trained on different base models") as caught:
        loader.prepare(ChatConfig(lora_path=f"{pair[1]},{other}"))
    assert caught.value.code == USAGE


def test_versions_of_a_merge_whose_adapter_is_called_base(pair, tmp_path, monkeypatch):
    """The folder's name does not matter: each option has the version of its own folder."""
    base, adapter = pair
    (tmp_path / "elsewhere").mkdir()
    renamed = adapter.rename(tmp_path / "elsewhere" / "base")
    versions = {base: Version("someone/model", "a" * 40), renamed: Version("someone/adapter", "b" * 40)}
    monkeypatch.setattr(revisions, "of", lambda path: versions.get(Path(path)))
    model = PROGRAMS["merge"](options(base, renamed))
    assert model.versions_by_option == {"model_path": versions[base], "lora_path": versions[renamed]}
