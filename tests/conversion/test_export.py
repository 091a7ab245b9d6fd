"""Exported files answer as the model does; others are not kept.

The comparison itself is tested in evaluation/test_parity.py.
"""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from onecard.config.chat import ChatConfig
from onecard.config.conversion import GGUF_TYPES, ExportConfig
from onecard.config.generation import Generation
from onecard.conversion import export_gguf, gguf, gguf_cache, llama_cpp_converter, lora_delta, modelfile
from onecard.data import conversation as data_conversation
from onecard.data import encode as data_encode
from onecard.data import template as data_template
from onecard.data.conversation import Conversation, Turn
from onecard.errors import CHECKPOINT, USAGE, UserError
from onecard.evaluation import parity, probe_texts
from onecard.hub import locate
from onecard.inference import chat, llama_cpp_engine
from onecard.models import tokenizer as models_tokenizer
from onecard.runs import folder as runs_folder
from onecard.system import files as system_files
from tests.support import kill_points, tiny
from tests.support.adapters import save_adapter
from tests.support.paths import ROOT
from tests.support.tokenizers import chatty

pytest.importorskip("llama_cpp", reason="llama-cpp-python is an extra of its own: bash tools/setup.sh cpu")
from tests.support.exports import run

pytestmark = pytest.mark.usefixtures("one_thread")

EXPORTED = ["Modelfile", "adapter.gguf", "base-f16.gguf", "export.json"]


def save_sentencepiece(folder: Path, spaced: bool) -> Path:
    """A tiny Llama model with a tokenizer.model that has pieces and byte fallback.

    spaced: put a space before every text, as SentencePiece does; transformers' own tokenizer leaves it out
    before a text that begins with one.
    """
    tiny.save_model(folder, vocab_size=400, bos_token_id=1, eos_token_id=2)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(probe_texts.TEXT.splitlines()), model_prefix=str(folder / "tokenizer"),
        vocab_size=400, model_type="bpe", byte_fallback=True, minloglevel=2, split_digits=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    settings = {"tokenizer_class": "LlamaTokenizer", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if spaced:
        core = models_tokenizer.load_tokenizer(str(folder)).backend_tokenizer
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        core.pre_tokenizer = None
        names.pop("add_bos_token")
        PreTrainedTokenizerFast(tokenizer_object=core, **names).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("export") / "model", chatty(), vocab_size=301)


@pytest.fixture(scope="module")
def adapter(base) -> Path:
    return save_adapter(base, base.parent / "adapter")


@pytest.fixture(scope="module")
def exported(base, adapter) -> tuple[Path, list[str]]:
    return run(model_path=base, lora_path=adapter, type="f16")


def test_what_is_exported(exported, adapter):
    """The files lie in the adapter's folder and are compared with a table; nothing unfinished stays."""
    folder, lines = exported
    assert folder == adapter / "gguf-f16"
    assert sorted(path.name for path in folder.iterdir()) == EXPORTED
    assert not list(adapter.glob(".*"))
    assert "0 of 1000 texts differ" in lines[-1]
    assert "5 of 5 answers are equal" in lines[-1]
    assert "FAILED" not in lines[-1]


def test_a_second_time_nothing_is_done(exported, base, adapter, monkeypatch):
    """The second call prints the same table and changes no byte.

    A file that was changed is made again with the same bytes.
    """
    folder, lines = exported
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    real, calls = llama_cpp_converter.run, []
    monkeypatch.setattr(llama_cpp_converter, "run", lambda *args: (calls.append(args), real(*args)))
    again = run(model_path=base, lora_path=adapter, type="f16")
    assert (again[0], again[1][-1], calls) == (folder, lines[-1], [])
    (folder / "adapter.gguf").write_bytes(b"GGUF")
    run(model_path=base, lora_path=adapter, type="f16")
    assert len(calls) == 2
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_chat_answers_from_the_exported_files(exported, base, adapter):
    """The folder, its files and the adapter's folder all give the answer that transformers gives."""
    folder = exported[0]

    def answer(**options) -> str:
        config = ChatConfig(mode="greedy", context=256, **options)
        talk = chat.start(config, gguf_cache.for_llama)
        settings = Generation(mode="greedy", max_new_tokens=24, repetition_penalty=1.0)
        *_, last = talk.stream(data_conversation.single("Say red"), settings)
        used.append(getattr(talk.engine, "path", None))
        return last.text.stable

    used: list[Path | None] = []
    expected = answer(model_path=str(base), lora_path=str(adapter), engine="transformers", dtype="fp32")
    files = {"model_path": str(folder / "base-f16.gguf"), "lora_path": str(folder / "adapter.gguf")}
    assert answer(lora_path=str(folder)) == expected
    assert answer(**files) == expected
    assert answer(model_path=str(base), lora_path=str(adapter), engine="llama.cpp") == expected
    assert answer(model_path=str(base), lora_path=files["lora_path"], engine="llama.cpp") == expected
    assert used[1:3] == [folder / "base-f16.gguf"] * 2  # the adapter's folder gives no base model
    assert system_files.cache_folder() in used[3].parents
    assert answer(model_path=files["model_path"]) != expected


def test_tokens_with_byte_fallback(tmp_path):
    """A SentencePiece model gives the ids of transformers, also for letters for which it has no piece.

    A tokenizer that puts no space before a text that begins with one differs from llama.cpp: it is refused.
    """
    folder = save_sentencepiece(tmp_path / "model", spaced=True)
    export, lines = run(model_path=folder, output_path=tmp_path / "made", type="f32")
    assert "0 of 1000 texts differ" in lines[-1]
    engine = llama_cpp_engine.Engine(
        export / "base-f32.gguf", models_tokenizer.load_tokenizer(str(folder)), 64, threads=1
    )
    pieces = engine.tokenizer.convert_ids_to_tokens(engine.encode("\u4e16"))
    engine.close()
    assert "<0xE4>" in pieces
    with pytest.raises(UserError, match="token ids"):
        run(
            model_path=save_sentencepiece(tmp_path / "new", False), output_path=tmp_path / "other", type="f32"
        )


@pytest.mark.parametrize("kind", [pytest.param("q8_0", marks=pytest.mark.slow), "q4_0"])
def test_quantised(base, tmp_path, kind):
    """The file has the wanted type. For a random model the ratio of the perplexities is near 1."""
    folder, lines = run(model_path=base, output_path=tmp_path / "made", type=kind)
    assert (folder / f"base-{kind}.gguf").is_file()
    assert re.search(r"ratio (0\.9|1\.0)", lines[-1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made"]


def test_every_type_is_one_of_llama_cpps():
    from llama_cpp import llama_cpp as library

    plain = {"f32": "LLAMA_FTYPE_ALL_F32"}
    for kind in GGUF_TYPES:
        assert isinstance(getattr(library, plain.get(kind, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")), int)


def test_what_fails_is_not_kept(base, tmp_path, monkeypatch):
    """The exit code is 4.

    With --check false the folder is kept, and the output says that it was not compared.
    """
    monkeypatch.setattr(parity, "MOST_GAP", -1.0)
    with pytest.raises(UserError, match=r"largest logit gap\. Nothing was kept") as caught:
        run(model_path=base, output_path=tmp_path / "made")
    assert (caught.value.code, list(tmp_path.iterdir())) == (CHECKPOINT, [])
    folder, lines = run(model_path=base, output_path=tmp_path / "made", check=False)
    assert folder.is_dir()
    assert "Not compared" in lines[-1]


@pytest.mark.slow
@pytest.mark.parametrize("over", [{}, {"over": "base-f16.gguf"}])
def test_killed_at_every_operation(base, adapter, tmp_path, over):
    """SIGKILL before each operation leaves no folder or the damaged one, and the next run is clean."""
    options = {"model_path": base, "lora_path": adapter, "template": "alpaca"}
    kill_points.check("export", tmp_path / "out", **options, **over)


def test_a_swapped_tokenizer_is_refused(base, tmp_path):
    """It is larger than the model, lacks the end tokens, is missing, or is not the one of the training."""
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    large = tiny.tokenizer()
    large.add_tokens([f"more{number}" for number in range(40)])
    large.save_pretrained(folder)
    with pytest.raises(UserError, match="another model: its ids go up to") as caught:
        run(model_path=folder, output_path=tmp_path / "made")
    assert caught.value.code == CHECKPOINT
    tiny.tokenizer().save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 300]}')
    with pytest.raises(UserError, match="it has no token 300") as caught:
        run(model_path=folder, output_path=tmp_path / "made")
    assert caught.value.code == CHECKPOINT
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UserError, match="no tokenizer"):
        run(model_path=folder, output_path=tmp_path / "made")
    trained = save_adapter(base, tmp_path / "run")
    (trained / "finetune_config.json").write_text(json.dumps({"fingerprints": {"tokenizer": "0" * 64}}))
    with pytest.raises(UserError, match="trained with another tokenizer"):
        run(model_path=base, lora_path=trained)
    assert not list(tmp_path.glob("*/gguf-*"))


def test_further_end_tokens_come_along(base, tmp_path):
    """The tokenizer's end token is the file's; those of the model's settings end turns in the file."""
    folder = Path(shutil.copytree(base, tmp_path / "model"))
    settings = json.loads((folder / "config.json").read_text())
    turn = models_tokenizer.load_tokenizer(str(base)).convert_tokens_to_ids("<turn>")
    (folder / "config.json").write_text(json.dumps({**settings, "eos_token_id": turn}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [turn, 1, 0]}))
    export, lines = run(model_path=folder, output_path=tmp_path / "made", check=False)
    summary = next(line for line in lines if line.startswith("end tokens"))
    assert f"1 <end> as eos: the tokenizer's, {turn} <turn> as eot, 0 <start> as eom" in summary
    assert json.loads((export / "export.json").read_text())["ends"] == [1, turn, 0]
    engine = llama_cpp_engine.Engine(
        export / "base-f16.gguf", models_tokenizer.load_tokenizer(str(folder)), 64, threads=1
    )
    written = [engine.written(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    assert written == ["1", str(turn), "0"]
    assert all(engine.ends_with(token) for token in (1, turn, 0))
    assert not engine.ends_with(7)
    engine.close()


def test_a_way_of_cutting_that_llama_cpp_does_not_know_is_refused(tmp_path):
    """The export does not guess how to split a text.

    The chat could use the model, since it has the tokenizer.
    """
    from tokenizers import Regex, pre_tokenizers

    tokenizer = tiny.tokenizer()
    cutting = [pre_tokenizers.Split(Regex("[aeiou]"), "isolated"), pre_tokenizers.ByteLevel(use_regex=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cutting)
    folder = tiny.save_model(tmp_path / "model", tokenizer)
    with pytest.raises(UserError, match="does not know how this tokenizer splits a text"):
        run(model_path=folder, output_path=tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_other_peoples_files_stay(base, tmp_path):
    (tmp_path / "letters.txt").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        run(model_path=base, output_path=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letters.txt"]


def refused(folder: Path, *words: str, **options) -> None:
    """The exit code is 2 with these words, before any work, and the folder does not change."""
    before = kill_points.contents(folder)
    with pytest.raises(UserError) as caught:
        run(**options)
    assert caught.value.code == USAGE, caught.value
    assert all(word in str(caught.value) for word in ("--output_path", *words)), caught.value
    assert kill_points.contents(folder) == before


def no_work(*_: object) -> None:
    raise AssertionError("a refusal comes before any work")


@pytest.fixture
def quick(monkeypatch) -> None:
    """Exports of a few bytes that hold only what decides: the type of the base model and the adapter."""

    def make(job: export_gguf.ExportJob, folder: Path) -> None:
        (folder / job.base_name).write_text(job.kind)
        (folder / "Modelfile").write_text("FROM it")
        if job.adapter:
            shutil.copy(job.adapter / "adapter_model.safetensors", folder / "adapter.gguf")

    monkeypatch.setattr(export_gguf, "_make", make)
    monkeypatch.setattr(export_gguf, "_check", lambda job, folder, options: "same" if options.check else None)


def test_an_export_is_replaced_by_the_same_one_only(quick, base, tmp_path, monkeypatch):
    """An export that was not compared or is damaged is made again, and the output says so.

    Another export, edited files and other files in the folder are refused with exit code 2. The same command
    has nothing to do whatever else is in the folder, even when the Modelfile was edited.
    """
    options = {"model_path": base, "output_path": tmp_path / "made", "type": "f32"}
    folder = run(**options, check=False)[0]
    (folder / "notes.txt").write_text("mine")
    refused(folder, "notes.txt", **options)
    (folder / "notes.txt").unlink()
    assert "It was not compared with the model; it is made again" in " ".join(run(**options)[1])
    (folder / "base-f32.gguf").write_bytes(b"GGUF")
    assert "base-f32.gguf is not as it was written" in " ".join(run(**options)[1])
    monkeypatch.setattr(export_gguf, "_make", no_work)
    refused(folder, "another type (f32)", "Name a new folder", **{**options, "type": "q4_0"})
    other = tiny.save_model(tmp_path / "other", chatty(), vocab_size=301, hidden_size=48)
    refused(folder, "another base model", **{**options, "model_path": other})
    with open(folder / "Modelfile", "a", encoding="utf-8") as file:
        file.write("# mine")
    (folder / "notes.txt").write_text("mine")
    output = " ".join(run(**options)[1])
    assert "nothing to do" in output
    assert "Modelfile" in output
    (folder / "base-f32.gguf").write_bytes(b"GGUF")
    refused(folder, "Modelfile, notes.txt", **options)
    (folder / "export.json").write_text("{")
    with pytest.raises(UserError, match=r"export\.json is damaged"):
        run(**options)


def test_an_export_of_a_run_follows_its_training(quick, base, adapter, tmp_path):
    """In the adapter's own folder an unchanged older export is replaced, and the output says so."""
    shutil.copytree(adapter, tmp_path / "run", ignore=shutil.ignore_patterns("gguf-*"))
    options = {"model_path": base, "lora_path": tmp_path / "run", "check": False}
    folder, _ = run(**options)
    before = (folder / "adapter.gguf").read_bytes()
    save_adapter(base, tmp_path / "run", 1)
    refused(folder, "another adapter", **options, output_path=folder)
    (folder / "notes.txt").write_text("mine")
    refused(folder, "notes.txt", **options)
    (folder / "notes.txt").unlink()
    assert f"{folder}: an export with another adapter is replaced" in " ".join(run(**options)[1])
    assert (folder / "adapter.gguf").read_bytes() != before
    assert sorted(path.name for path in folder.iterdir()) == EXPORTED


def test_files_that_come_while_an_export_is_made_stay(quick, base, tmp_path, monkeypatch):
    """The folder is checked once more before the rename."""
    folder, real = tmp_path / "made", export_gguf._make
    monkeypatch.setattr(
        export_gguf, "_make", lambda *args: (real(*args), folder.mkdir(), (folder / "x").touch())
    )
    with pytest.raises(UserError, match="is there already"):
        run(model_path=base, output_path=folder, check=False)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["made", "made/x"]


def test_where_an_export_cannot_come(quick, base, tmp_path, monkeypatch):
    """The current folder and a path below a file are refused; a link is followed to its target."""
    for name in ("here", "disk"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    with monkeypatch.context() as here:
        here.chdir(tmp_path / "here")
        here.setattr(export_gguf, "_job", no_work)
        refused(tmp_path, "the current folder", model_path=base, output_path=".")
        refused(tmp_path, "is a file", model_path=base, output_path=tmp_path / "file/x")
    run(model_path=base, output_path=tmp_path / "link", check=False)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk/Modelfile").is_file()


def test_adapter_for_another_base_is_refused(exported, tmp_path):
    """A GGUF adapter on a base model with other shapes gives a message and exit code 4."""
    other = tiny.save_model(tmp_path / "model", hidden_size=48, vocab_size=301)
    path = gguf.base(other, tmp_path / "other.gguf", any_tokenizer=True)
    config = ChatConfig(model_path=str(path), lora_path=str(exported[0] / "adapter.gguf"))
    with pytest.raises(UserError, match="does not fit this base model") as caught:
        chat.start(config, gguf_cache.for_llama)
    assert caught.value.code == CHECKPOINT


def test_gguf_adapter_alone_asks_for_its_base(exported, tmp_path):
    alone = shutil.copy(exported[0] / "adapter.gguf", tmp_path / "alone.gguf")
    with pytest.raises(UserError, match="does not say its base model"):
        chat.start(ChatConfig(lora_path=str(alone)), gguf_cache.for_llama)


def test_swapping_adapters_keeps_the_base(exported, base, adapter, tmp_path):
    """After 20 swaps the base model was loaded once, and all scores equal those of the adapter alone."""
    two = gguf.adapter(save_adapter(base, tmp_path / "two", 1), base, tmp_path / "two.gguf")
    paths = {"one": exported[0] / "adapter.gguf", "two": two}
    tokenizer, path = models_tokenizer.load_tokenizer(str(base)), exported[0] / "base-f16.gguf"
    ids = tokenizer("red green blue").input_ids
    choices = [(), (("one", 1.0),), (("two", 1.0),), (("one", 0.5), ("two", -0.25))]

    def scores(engine, active_adapters) -> torch.Tensor:
        stream = engine.open(ids, active_adapters)
        assert list(stream.read())
        logits = stream.first().clone()  # the next step overwrites them
        stream.close()
        return logits

    alone = []
    for active in choices:
        engine = llama_cpp_engine.Engine(path, tokenizer, 64, paths, threads=1)
        alone.append(scores(engine, active))
        engine.close()
    assert all(not torch.equal(alone[0], other) for other in alone[1:])
    engine = llama_cpp_engine.Engine(path, tokenizer, 64, paths, threads=1)
    process = engine.process
    for number in range(20):
        assert torch.equal(scores(engine, choices[number % 4]), alone[number % 4])
    assert engine.process is process
    engine.close()


def test_a_base_that_only_the_adapter_names_is_not_fetched(adapter, tmp_path, monkeypatch):
    shutil.copytree(adapter, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "evil/model"}))
    names: list[str] = []
    monkeypatch.setattr(locate, "fetch_model", names.append)
    monkeypatch.setattr(locate, "fetch_adapter", names.append)
    with pytest.raises(UserError, match="evil/model, which is not on this machine"):
        export_gguf.run(ExportConfig(lora_path=str(tmp_path / "adapter")))
    assert names == []


@pytest.mark.parametrize("name", ["../stranger.gguf", "/stranger.gguf", "..", 3])
def test_files_of_an_export_lie_in_its_folder(tmp_path, name):
    """export.json may come from anybody, so it can only name an adapter in its own folder."""
    folder = tmp_path / "gguf-f16"
    folder.mkdir()
    (tmp_path / "stranger.gguf").write_bytes(b"GGUF")
    (folder / "mine.gguf").write_bytes(b"GGUF")
    for written, expected in ((name, None), ("mine.gguf", folder / "mine.gguf")):
        values = {"of_base": "b", "of_adapter": "a", "base": "base.gguf", "adapter": written}
        (folder / "export.json").write_text(json.dumps(values))
        assert gguf_cache._exported(tmp_path, "b", "a") == expected
    assert gguf_cache._exported(tmp_path, "b", "other") is None


def test_the_export_of_a_checkpoint_is_found_again(base, tmp_path):
    """It lies in the run's folder, whatever its type, and belongs to the content of that checkpoint alone."""
    adapters = {step: save_adapter(base, tmp_path / f"run/checkpoint-{step}", step) for step in (1, 2)}
    place = tmp_path / "run/gguf-q4_k_m"
    place.mkdir()
    (place / "adapter.gguf").write_bytes(b"GGUF")
    of_base, of_adapter = gguf_cache.keys(base, adapters[2])
    values = {"of_base": of_base, "of_adapter": of_adapter, "adapter": "adapter.gguf"}
    (place / "export.json").write_text(json.dumps(values))
    assert gguf_cache._exported(adapters[2], *gguf_cache.keys(base, adapters[2])) == place / "adapter.gguf"
    assert gguf_cache._exported(adapters[1], *gguf_cache.keys(base, adapters[1])) is None
    save_adapter(base, adapters[2], 3)  # it was trained further under its old name
    assert gguf_cache._exported(adapters[2], *gguf_cache.keys(base, adapters[2])) is None
    # no checkpoint, so the export beside it is not its own
    other = save_adapter(base, tmp_path / "run/mine", 2)
    assert gguf_cache._exported(other, of_base, of_adapter) is None


def test_one_meaning_of_a_plain_start():
    """What can be merged can be a GGUF adapter: the base model is the same as when the training began."""
    assert lora_delta.PLAIN_VALUES["init_lora_weights"] == runs_folder.PLAIN_STARTS
    assert {True, False, "eva"} <= set(runs_folder.PLAIN_STARTS)
    assert "pissa" not in runs_folder.PLAIN_STARTS


def rendered(source: str, messages: list[dict[str, str]]) -> str:
    """What Go's text/template writes for range, if eq, else, assignment and fields; we use no more."""
    steps = re.split(r"(\{\{.*?\}\})", source)

    def block(start: int, variables: dict, on: bool) -> tuple[str, int, str]:
        """(text, place behind it, the action that ended it) of a block; on: whether its text is written."""
        text, place = "", start
        while place < len(steps):
            step, place = steps[place], place + 1
            action = step[2:-2].strip() if step.startswith("{{") else None
            if action is None:
                text += step if on else ""
            elif action in ("end", "else"):
                return text, place, action
            elif action.startswith("range"):
                inner = ""
                for message in messages:
                    variables["$m"] = message
                    piece, behind, _ = block(place, variables, on)
                    inner += piece
                text, place = text + inner, behind
            elif action.startswith("if"):
                left, right = re.fullmatch(r"if eq (\S+) (\S+)", action).groups()
                yes = value(left, variables) == value(right, variables)
                piece, place, ended = block(place, variables, on and yes)
                text += piece
                if ended == "else":
                    piece, place, _ = block(place, variables, on and not yes)
                    text += piece
            elif "=" in action:
                name, expression = re.split(r"\s*:?=\s*", action)
                if on:
                    variables[name] = value(expression, variables)
            elif on:
                text += value(action, variables)
        return text, place, ""

    def value(word: str, variables: dict) -> str:
        if word.startswith('"'):
            return json.loads(word)
        name, _, field = word.partition(".")
        return variables[name][field.lower()] if field else variables[name]

    return block(0, {}, True)[0]


TALK = (
    (Turn("user", "Hello {{ you }}"),),
    (Turn("user", "One"), Turn("assistant", "Two"), Turn("user", "Three")),
    (Turn("system", "Be kind."), Turn("user", "One"), Turn("assistant", "Two"), Turn("user", "Three")),
)


@pytest.mark.parametrize("name", ["alpaca", "chatml", "vicuna-chat", "tigerbot", "cutegpt", "auto"])
def test_modelfile_says_the_template(name):
    """Ollama's template writes exactly the text that the model was trained on."""
    tokenizer = chatty()
    controls = data_template.read(data_template.FOLDER / f"{name}.json").controls() if name != "auto" else []
    tokenizer.add_special_tokens(
        {"extra_special_tokens": sorted(controls)}, replace_extra_special_tokens=False
    )
    form = data_template.load(name, tokenizer)
    source = modelfile.go_template(form, tokenizer)
    for turns in TALK:
        if turns[0].role == "system" and form.system is None:
            continue
        pieces = data_encode.pieces(Conversation(turns), form, tokenizer)
        names = [
            text if isinstance(text, str) else tokenizer.convert_ids_to_tokens(text) for text, _ in pieces
        ]
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        assert rendered(source, messages) == "".join(names)
    file = modelfile.modelfile(form, tokenizer, "base-f16.gguf", "adapter.gguf")
    assert file.startswith('FROM ./base-f16.gguf\nADAPTER ./adapter.gguf\nTEMPLATE """')
    for token in modelfile.stops(form, tokenizer):
        assert f'PARAMETER stop "{token}"' in file


def test_a_template_that_a_modelfile_cannot_hold():
    tokenizer = chatty()
    form = dataclasses.replace(data_template.load("alpaca", tokenizer), opening=(("literal", 'Say """'),))
    assert (
        "TEMPLATE" not in modelfile.modelfile(form, tokenizer, "base.gguf", None).splitlines()[1].split()[0]
    )


@pytest.mark.slow
def test_the_demo_with_the_tool(tmp_path):
    """The demo with an adapter: no row fails, and the perplexity is equal to a thousandth."""
    adapter = save_adapter(Path(locate.locate("demo")), tmp_path / "adapter", std=0.01)
    command = [sys.executable, ROOT / "tools" / "export_gguf.py", "--model_path", "demo"]
    command += ["--lora_path", adapter]
    ended = subprocess.run(
        [*command, "--output_path", tmp_path / "made"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert "0 of 1000 texts differ" in ended.stdout
    assert "FAILED" not in ended.stdout
    assert (tmp_path / "made" / "adapter.gguf").is_file()
    ratio = float(re.search(r"ratio ([\d.]+)", ended.stdout)[1])
    assert ratio == pytest.approx(1, abs=1e-3)
