"""What --lora_path and --model_path may name, and which adapter, base model, template or message follows."""

import contextlib
import dataclasses
import io
import json
import pickle
import shutil
import threading
import types
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from onecard.config import chat as config_chat
from onecard.config.chat import ChatConfig
from onecard.config.generation import GREEDY, Generation
from onecard.config.options import build
from onecard.config.training import FinetuneConfig
from onecard.data import template as data_template
from onecard.data.conversation import Conversation, Turn
from onecard.errors import UserError
from onecard.hub import locate
from onecard.inference import chat as inference_chat
from onecard.inference import lazy_engine, loader, resolve
from onecard.inference.chat import Chat
from onecard.inference.decoding import CANCELLED
from onecard.models import adapter as models_adapter
from onecard.models import base_model, lora_shape, trainable
from onecard.models import tokenizer as models_tokenizer
from onecard.runs import adapters as runs_adapters
from onecard.runs import folder as runs_folder
from onecard.system import hardware
from onecard.training import loop
from onecard.ui import sessions as ui_sessions
from onecard.ui import status as ui_status
from tests.support import tiny
from tests.support.faults import Touch
from tests.support.resume_cases import stopped_at

pytestmark = pytest.mark.usefixtures("one_thread")

RANK, ALPHA, TARGETS = 4, 12, "q_proj,v_proj"
QUICK = Generation(GREEDY, repetition_penalty=1.0, min_new_tokens=0, max_new_tokens=8)
QUESTION = Conversation((Turn("user", "Say red"),))
MINE = {"user": "Q {text} A", "assistant": "{text}{end}", "between": "\n"}


def trained(base: Path, place: Path, **changes) -> Path:
    """A run of four steps, with a validation loss and a checkpoint at each step."""
    rows = tiny.save_rows(place / "rows.json", 24)
    options = {
        "model_path": str(base),
        "data_path": str(rows),
        "output_path": str(place / "run"),
        "bits": 16,
        "dtype": "fp32",
        "device": "cpu",
        "batch_size": 6,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "test_size": 5,
        "eval_steps": 1,
        "save_steps": 1,
        "lora_r": RANK,
        "lora_alpha": ALPHA,
        "lora_target_modules": TARGETS,
    }
    settings = build(FinetuneConfig, {**options, **changes})
    loop.run(settings, sample=lambda *_: [], draw=lambda *_: None)
    return place / "run"


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory) -> Path:
    """A finished run whose own template file has been deleted since; its best step is the second."""
    place = tmp_path_factory.mktemp("finished")
    (place / "mine.json").write_text(json.dumps(MINE))
    folder = trained(tiny_model, place, template=str(place / "mine.json"))
    (place / "mine.json").unlink()
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for record in lines:
        if "eval_loss" in record:
            record["eval_loss"] = {0: 0.1, 1: 3.0, 2: 1.5, 3: 2.5, 4: 2.0}[record["step"]]
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in lines))
    return folder


@pytest.fixture
def unfinished(run, tmp_path) -> Path:
    """The run as it was before its end, with the last line of its log torn off."""
    return stopped_at(run, 4, tmp_path / "unfinished")


def load(lora_path=None, **changes) -> tuple[Chat, list[str]]:
    """A chat, and the lines that were printed while it was loaded."""
    options = {"dtype": "fp32", "device": "cpu", "lora_path": None if lora_path is None else str(lora_path)}
    with contextlib.redirect_stdout(io.StringIO()) as output:
        parts = loader.load(build(ChatConfig, {**options, **changes}), None)
    return Chat(*parts), output.getvalue().splitlines()


def scores(chat: Chat, active_adapters=None) -> torch.Tensor:
    stream = chat.engine.open(
        list(range(2, 14)), chat.active_adapters if active_adapters is None else active_adapters
    )
    list(stream.read())
    return stream.first()[0]


@torch.no_grad()
def plain(folder: Path) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder)(torch.arange(2, 14)[None]).logits[0, -1]


def merged(base: Path, tensors: dict[str, torch.Tensor], scale: float) -> torch.Tensor:
    """The scores of the base model with scale * B A added by hand."""
    model = AutoModelForCausalLM.from_pretrained(base)
    for name in (name for name in tensors if "lora_A" in name):
        module = model.get_submodule(name.removeprefix("base_model.model.").split(".lora_A")[0])
        module.weight.data += scale * (tensors[name.replace("lora_A", "lora_B")] @ tensors[name])
    with torch.no_grad():
        return model(torch.arange(2, 14)[None]).logits[0, -1]


def tree(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes() if path.is_file() else b"", path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
    }


def is_checkpoint(chat: Chat, base: Path, folder: Path) -> bool:
    tensors = load_file(folder / "adapter_model.safetensors")
    return torch.allclose(scores(chat), merged(base, tensors, ALPHA / RANK), atol=1e-4)


def texts(form) -> dict:
    return {**form.texts(), "name": ""}


def test_a_finished_run_a_checkpoint_and_an_adapter_folder(run, tiny_model, tmp_path):
    """Each is loaded as its own adapter on the base model of the run, with the template of the training.

    No file changes.
    """
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(run / name, alone / name)
    before = tree(run)
    for path, folder in ((run, run), (run / "checkpoint-3", run / "checkpoint-3"), (alone, alone)):
        chat, lines = load(path)
        assert is_checkpoint(chat, tiny_model, folder)
        assert not torch.allclose(scores(chat), plain(tiny_model), atol=1e-3)
        assert torch.allclose(scores(chat, ()), plain(tiny_model), atol=1e-5)
        if folder == alone:
            assert chat.template.name == "alpaca"
            assert any("no template is recorded with the adapter" in line for line in lines)
        else:
            pieces = {key: data_template.parts(text, []) for key, text in MINE.items()}
            assert texts(chat.template) == texts(data_template.Template("", **pieces))
            assert any("was trained with it" in line for line in lines)
    assert tree(run) == before
    assert load(run, template="cutegpt")[0].template.name == "cutegpt"


def test_an_unfinished_run_answers_with_its_best_or_newest_checkpoint(unfinished, tiny_model):
    """Damaged checkpoints are passed over, and without any whole one there is a message."""
    for checkpoint, step in (("best", 2), ("newest", 4)):
        before = tree(unfinished)
        chat, lines = load(unfinished, checkpoint=checkpoint)
        assert is_checkpoint(chat, tiny_model, unfinished / f"checkpoint-{step}")
        assert any(f"checkpoint-{step} is used" in line for line in lines)
        assert tree(unfinished) == before
    damage(unfinished / "checkpoint-4")
    assert is_checkpoint(load(unfinished, checkpoint="newest")[0], tiny_model, unfinished / "checkpoint-3")
    damage(unfinished / "checkpoint-2")  # the best checkpoint
    chat, lines = load(unfinished)
    assert is_checkpoint(chat, tiny_model, unfinished / "checkpoint-3")
    assert any("checkpoint-3 is used, the newest" in line for line in lines)
    with pytest.raises(UserError, match="was changed after it was saved") as caught:
        load(unfinished / "checkpoint-4")
    assert caught.value.code == 4
    for number in (0, 1, 3):
        damage(unfinished / f"checkpoint-{number}")
    with pytest.raises(UserError, match="no complete checkpoint") as caught:
        load(unfinished)
    assert caught.value.code == 4


def damage(checkpoint: Path) -> None:
    path = checkpoint / "adapter_model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def test_an_unfinished_run_without_validation_answers_with_its_newest(unfinished, tiny_model):
    """The log has no validation loss, or there is no log at all."""
    lines = [line for line in (unfinished / "log.jsonl").read_text().splitlines() if "eval_loss" not in line]
    for text in ("\n".join(lines), "[]\n7\nnull\n", None):
        (unfinished / "log.jsonl").unlink()
        if text is not None:
            (unfinished / "log.jsonl").write_text(text)
        assert is_checkpoint(load(unfinished)[0], tiny_model, unfinished / "checkpoint-4")
        (unfinished / "log.jsonl").touch()


@pytest.mark.parametrize("what", ["full", "lora+embeddings"])
def test_runs_that_train_more_than_an_adapter(tiny_model, tmp_path, what):
    """A run that trains all weights is a model of its own; trained embeddings go with the adapter.

    The first holds for RUN, RUN/model and the checkpoints. Without the adapter the embeddings are the base
    model's.
    """
    folder = trained(
        tiny_model, tmp_path, train_what=what, max_steps=2, template="vicuna-chat", learning_rate=3e-3
    )
    if what == "full":
        for path in (folder, folder / "model", folder / "checkpoint-2"):
            chat, _ = load(path)
            assert torch.allclose(scores(chat), plain(folder / "model"), atol=1e-5)
            assert chat.template.name == "vicuna-chat"
            assert (chat.active_adapters, chat.engine.adapters) == ((), [])
        assert not torch.allclose(scores(chat), plain(tiny_model), atol=1e-3)
        early = stopped_at(folder, 2, tmp_path / "early")
        assert torch.allclose(scores(load(early)[0]), plain(folder / "model"), atol=1e-5)
        with open(early / "checkpoint-2" / "model.safetensors", "ab") as file:
            file.write(b" ")
        with pytest.raises(UserError, match="was changed after it was saved"):
            load(early / "checkpoint-2")
        for more in ({"model_path": str(tiny_model)}, {"lora_path": f"{folder},{folder}"}):
            with pytest.raises(UserError, match="is a whole model, not an adapter"):
                load(**{"lora_path": folder, **more})
        return
    model = models_adapter.add_adapter(
        base_model.load_base(str(tiny_model), 16, "fp32", "cpu"),
        lora_shape.LoraShape(RANK, ALPHA, 0.0, TARGETS, what=what),
        seed=0,
    )
    trainable.load(model, folder)
    chat, _ = load(folder)
    with torch.no_grad():
        assert torch.allclose(scores(chat), model.eval()(torch.arange(2, 14)[None]).logits[0, -1], atol=1e-4)
    assert torch.allclose(scores(chat, ()), plain(tiny_model), atol=1e-5)
    assert "embed_tokens" in (folder / "adapter_config.json").read_text()


@pytest.fixture
def old(run, tmp_path) -> Path:
    """A folder as Chinese-Vicuna wrote it: pickled weights and no adapter_config.json."""
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "trainer_state.json").write_text('{"global_step": 3}')
    torch.save(load_file(run / "adapter_model.safetensors"), folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize(
    ("name", "config", "named"),
    [
        ("pytorch_model.bin", False, True),
        ("adapter_model.bin", False, False),
        ("adapter_model.bin", True, False),
    ],
)
def test_older_folders_are_read_and_left_as_they_are(run, tiny_model, old, name, config, named):
    """Pickled weights are read with and without a configuration; nothing in the folder changes."""
    (old / "pytorch_model.bin").rename(old / name)
    if config:
        values = json.loads((run / "adapter_config.json").read_text())
        (old / "adapter_config.json").write_text(json.dumps(values))
    (old / "trainer_state.json").unlink()
    before, folder_before = tree(old), old.stat().st_mtime_ns
    chat, lines = load(f"mine={old}" if named else old, model_path=str(tiny_model))
    assert (tree(old), old.stat().st_mtime_ns) == (before, folder_before)
    tensors = load_file(run / "adapter_model.safetensors")
    # without a recorded alpha it is twice the rank, and a line says so
    scale = ALPHA / RANK if config else 2.0
    assert torch.allclose(scores(chat), merged(tiny_model, tensors, scale), atol=1e-4)
    assert any("does not record its alpha" in line for line in lines) == (not config)
    # the folder itself and not our temporary copy
    assert f"adapter     {'mine' if named else 'old'}: {old}" in lines
    assert chat.engine.adapters == ["mine" if named else "old"]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin"])
def test_a_pickle_that_would_run_code_is_refused(old, tmp_path, tiny_model, name):
    """S1: the exit code is 8, and no code ran."""
    (old / "pytorch_model.bin").unlink()
    canary = tmp_path / "canary"
    (old / name).write_bytes(pickle.dumps({"x": Touch(canary)}, protocol=2))
    with pytest.raises(UserError, match=name) as caught:
        load(old, model_path=str(tiny_model))
    assert caught.value.code == 8
    assert not canary.exists()


def test_an_adapter_of_the_hub(run, tiny_model, tmp_path, monkeypatch):
    """A name that is no folder is fetched from the hub; a path that does not exist is refused as neither."""
    names = []

    def fetch(name: str) -> str:
        names.append(name)
        return str(run)

    with monkeypatch.context() as patched:
        patched.setattr(locate, "fetch_adapter", fetch)
        chat, _ = load("someone/some-lora")
    assert names == ["someone/some-lora"]
    assert is_checkpoint(chat, tiny_model, run)
    assert chat.engine.adapters == ["some-lora"]
    with pytest.raises(UserError, match="no such folder here"):
        load(tmp_path / "nowhere")


def test_several_adapters_with_names_and_weights(run, tiny_model):
    """The first adapter answers, or all together if they have weights.

    Names are given or come from the folders.
    """
    best, third = run / "checkpoint-2", run / "checkpoint-3"
    chat, _ = load(f"one={best}, {third}")
    assert chat.engine.adapters == ["one", "run-checkpoint-3"]
    assert chat.active_adapters == (("one", 1.0),)
    assert is_checkpoint(chat, tiny_model, best)
    assert Chat.stream
    chat, _ = load(f"one={best}:0.25,two={third}:-0.5")
    assert chat.active_adapters == (("one", 0.25), ("two", -0.5))
    chat, _ = load(f"one={best}:1,two={third}:1")
    assert chat.active_adapters == (("one", 1.0), ("two", 1.0))
    chat, _ = load(f"one={best}:0.25,two={third}:-0.5")
    both = [load_file(path / "adapter_model.safetensors") for path in (best, third)]
    scaled = {
        name: torch.cat([0.25 * both[0][name], -0.5 * both[1][name]], 1)
        if "lora_B" in name
        else torch.cat([both[0][name], both[1][name]], 0)
        for name in both[0]
    }
    assert torch.allclose(scores(chat), merged(tiny_model, scaled, ALPHA / RANK), atol=1e-4)
    chat, _ = load(f"{best},{best},v1.5={third}")
    assert chat.engine.adapters == ["run-checkpoint-2", "run-checkpoint-2+", "v1.5"]
    assert is_checkpoint(
        Chat(chat.engine, chat.tokenizer, chat.template, (("v1.5", 1.0),)), tiny_model, third
    )


def test_the_usual_template_says_why(run, tiny_model):
    """Without an adapter the reason does not mention one."""
    tokenizer = models_tokenizer.load_tokenizer(str(tiny_model))
    assert "adapter" not in resolve.choose_template(None, [], tokenizer)[1]
    alone = runs_adapters.Adapter("mine", run)
    assert "no template is recorded with the adapter" in resolve.choose_template(None, [alone], tokenizer)[1]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (None, []),
        (" , ", []),
        ("a/b", [("b", "a/b", None)]),
        ("a/b/", [("b", "a/b/", None)]),
        ("x=a/b:0.5", [("x", "a/b", 0.5)]),
        ("x=a/b:1", [("x", "a/b", 1.0)]),
        ("a/b:2,c/b", [("b", "a/b", 2.0), ("b+", "c/b", None)]),
        ("/p=q/r", [("r", "/p=q/r", None)]),
        ("run/checkpoint-7", [("run-checkpoint-7", "run/checkpoint-7", None)]),
        ("模型=a", [("模型", "a", None)]),
        ("my lora/new one", [("new-one", "my lora/new one", None)]),
    ],
)
def test_the_list_of_adapters(text, wanted):
    """The list is NAME=PATH:WEIGHT, separated by commas; name and weight may be left out."""
    assert runs_adapters.read_list(text) == wanted


def test_the_template_that_was_saved_counts(run, tiny_model, tmp_path):
    """The saved texts of the template count first, then its name.

    The tokenizer's chat template is used only without an adapter. A damaged record is named.
    """
    form = json.loads((run / "finetune_config.json").read_text())["resolved"]["template"]
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)

    def rewritten(change) -> None:
        values = json.loads((run / "finetune_config.json").read_text())
        change(values)
        (copy / "finetune_config.json").write_text(json.dumps(values))

    def older(values: dict) -> None:  # as runs were recorded before texts were saved
        del values["resolved"]["template"]
        values["options"]["template"] = "cutegpt,alpaca"

    rewritten(older)
    assert load(copy)[0].template.name == "cutegpt"
    rewritten(lambda values: values["resolved"].update(template={"name": "x", "usr": []}))
    with pytest.raises(UserError, match="damaged"):
        load(copy)
    assert load(copy, template="alpaca")[0].template.name == "alpaca"
    rewritten(lambda values: values.update(options=None, resolved=None))
    assert load(copy)[0].template.name == "alpaca"
    assert form["name"] == "mine"
    other = tmp_path / "chatting"
    shutil.copytree(tiny_model, other)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<start>{{ m.role }}\n{{ m.content }}<end>\n{% endfor %}"
        "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(other)
    assert load(model_path=str(other))[0].template.name == "auto"
    assert load(run, model_path=str(other))[0].template.name == "mine"
    assert load(model_path=str(tiny_model))[0].template.name == "alpaca"


def test_the_base_is_the_runs_own(run, tiny_model, tmp_path):
    """--model_path chooses another base model; when the run's own is missing, the message names it."""
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    values = json.loads((moved / "finetune_config.json").read_text())
    values["options"]["model_path"] = str(tmp_path / "gone")
    (moved / "finetune_config.json").write_text(json.dumps(values))
    with pytest.raises(
        UserError, match=r"moved says that it was trained on .*gone, which is not on"
    ) as caught:
        load(moved)
    assert "--model_path" in caught.value.fix
    assert is_checkpoint(load(moved, model_path=str(tiny_model))[0], tiny_model, run)
    with pytest.raises(UserError, match="cannot load"):
        load(model_path=str(tmp_path / "nowhere"))


WRONG = {  # file, a function from its old content to the new one, words, exit code
    "no JSON": ("adapter_config.json", lambda raw: raw[:20], "damaged", 4),
    "a list": ("adapter_config.json", lambda _: b"[]", "no JSON object", 4),
    "another kind": ("adapter_config.json", lambda _: b'{"peft_type": "PREFIX_TUNING"}', "not a LoRA", 4),
    "wrong rank": ("adapter_config.json", lambda raw: raw.replace(b'"r": 4', b'"r": 5'), "does not fit", 4),
    "no such module": (
        "adapter_config.json",
        lambda raw: raw.replace(b"q_proj", b"z_proj"),
        "does not fit",
        4,
    ),
    "cut weights": ("adapter_model.safetensors", lambda raw: raw[: len(raw) // 2], "damaged", 4),
    "empty weights": ("adapter_model.safetensors", lambda _: b"", "damaged", 4),
    "no weights": ("adapter_model.safetensors", None, "neither an adapter", 4),
    "damaged run": ("finetune_config.json", lambda raw: raw[:50], "damaged", 4),
    "run of a list": ("finetune_config.json", lambda _: b"[1]", "no JSON object", 4),
}


@pytest.mark.parametrize("name", WRONG)
def test_damaged_adapters_are_named(run, tiny_model, tmp_path, name):
    """There is one message with the folder or file and an exit code, and no traceback."""
    file, change, words, code = WRONG[name]
    folder = tmp_path / "bad"
    folder.mkdir()
    for each in ("adapter_config.json", "adapter_model.safetensors", "finetune_config.json"):
        shutil.copy(run / each, folder / each)
    raw = (folder / file).read_bytes()
    (folder / file).unlink()
    if change:
        (folder / file).write_bytes(change(raw))
    if name == "no weights":
        (folder / "finetune_config.json").unlink()
    with pytest.raises(UserError, match=words) as caught:
        load(folder, model_path=str(tiny_model))
    assert caught.value.code == code
    assert "bad" in caught.value.problem


def test_a_wrong_base_is_refused(run, tmp_path):
    """A base model with other sizes is refused, and one with another depth, which peft would load in part."""
    for change in ({"hidden_size": 48}, {"num_hidden_layers": 1}, {"num_hidden_layers": 3}):
        other = tiny.save_model(tmp_path / "-".join(map(str, change.values())), **change)
        with pytest.raises(UserError, match="does not fit this base model") as caught:
            load(run, model_path=str(other))
        assert caught.value.code == 4
        assert "--model_path" in caught.value.fix


def test_folders_that_hold_nothing(tmp_path, tiny_model):
    """An empty folder, or a run without a checkpoint yet, gives exit code 4 and says what is missing."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / runs_folder.CONFIG).write_text('{"options": {}}')
    for name, word in (("empty", "neither an adapter"), ("young", "no complete checkpoint")):
        with pytest.raises(UserError, match=word) as caught:
            load(tmp_path / name, model_path=str(tiny_model))
        assert caught.value.code == 4


@pytest.mark.parametrize("how", ["yarn", "dynamic"])
def test_stretched_contexts(tiny_model, how):
    """With four times the context a longer conversation is answered; reused keys do not change the answer."""
    chat, _ = load(model_path=str(tiny_model), rope_scaling=how)
    assert chat.engine.context == 4 * 512
    long = Conversation((Turn("user", "Say red " * 150),))
    settings = dataclasses.replace(QUICK, max_memory=0)
    *_, reply = chat.stream(long, settings)
    assert reply.prompt_tokens > 1000
    assert reply.finished != CANCELLED
    *_, again = chat.stream(long, settings)
    assert again.reused == reply.prompt_tokens - 1
    assert again.text.whole == reply.text.whole
    short, _ = load(model_path=str(tiny_model), rope_scaling=how, context=700)
    assert short.engine.context == 700
    with pytest.raises(UserError, match="900: the model's context has 512 tokens"):
        load(model_path=str(tiny_model), context=900)


def test_without_stretching_nothing_changes(tiny_model):
    """The scores equal those of the plain model bit for bit, and stretched ones differ."""
    chat, _ = load(model_path=str(tiny_model), rope_scaling="none", rope_factor=8)
    assert chat.engine.context == 512
    chat.engine.model = base_model.load_base(str(tiny_model), 16, "fp32", "cpu").eval()
    untouched = scores(chat)
    assert torch.equal(scores(load(model_path=str(tiny_model), rope_scaling="none")[0]), untouched)
    assert torch.allclose(untouched, plain(tiny_model), atol=1e-5)
    for scaling in ("yarn", "dynamic"):
        assert not torch.allclose(
            scores(load(model_path=str(tiny_model), rope_scaling=scaling)[0]), plain(tiny_model)
        )


def test_threads_are_those_asked_for(tiny_model):
    load(model_path=str(tiny_model), threads=2)
    assert torch.get_num_threads() == 2
    load(model_path=str(tiny_model), threads=1)
    assert torch.get_num_threads() == 1


def test_options_that_do_not_go_together(tiny_model, run):
    """Each message names the option and what to use instead."""
    for options, word in (
        ({"engine": "transformers", "model_path": "x.gguf"}, "llama.cpp"),
        ({"device": "mps"}, "no Apple GPU"),
    ):
        with pytest.raises(UserError) as caught:
            load(**{"model_path": str(tiny_model), **options})
        assert word in str(caught.value)
    for options, word in (
        ({"card_memory": "0:1GiB"}, "--card_memory is for --device all"),
        ({"load_8bit": True, "bits": 4}, "--load_8bit and --bits 4 contradict"),
        ({"load_8bit": "true", "bits": "16"}, "contradict"),
    ):
        with pytest.raises(UserError) as caught:
            config_chat.check_used(build(ChatConfig, options))
        assert word in str(caught.value)


def test_adapters_of_different_bases(run, tiny_model, tmp_path):
    """The message names both base models, and --model_path decides. Two paths to one folder are one base."""
    copies = [tmp_path / name for name in ("a", "b")]
    for copy in copies:
        shutil.copytree(run, copy)
    both = ",".join(map(str, copies))

    def names(base: str) -> None:
        stored = json.loads((run / "finetune_config.json").read_text())
        stored["options"]["model_path"] = base
        (copies[1] / "finetune_config.json").write_text(json.dumps(stored))

    names("someone/other-model")
    with pytest.raises(UserError) as caught:
        load(both)
    for word in (f"a on {tiny_model}", "b on someone/other-model", "--model_path"):
        assert word in str(caught.value)
    assert load(both, model_path=str(tiny_model))[0].engine.adapters == ["a", "b"]
    (tmp_path / "link").symlink_to(tiny_model)
    names(str(tmp_path / "link"))
    assert load(both)[0].engine.adapters == ["a", "b"]


def later(beside=lambda device: [], **options) -> tuple[Chat, list[str]]:
    settings = build(ChatConfig, {"dtype": "fp32", "device": "cpu", **options})
    with contextlib.redirect_stdout(io.StringIO()) as output:
        chat = inference_chat.later(settings, None, beside)
    return chat, output.getvalue().splitlines()


def test_a_model_that_waits_for_its_first_question(run, tiny_model):
    """A page has all it needs before the weights are loaded; the first question loads them and says so."""
    devices = []
    chat, lines = later(lambda device: devices.append(device) or ["run-7"], lora_path=str(run))
    assert (chat.engine.name, chat.engine.adapters, chat.template.name) == ("transformers", ["run"], "mine")
    assert chat.modes()
    assert chat.active_adapters == (("run", 1.0),)
    with pytest.raises(UserError, match="No adapter is called x"):
        chat.engine.check_active_adapters((("x", 1.0),))
    assert not chat.engine.is_loaded
    assert any("not loaded" in line for line in lines)
    sides = ui_sessions.answers(ui_sessions.Sessions(), "page", chat, QUESTION, QUICK, None, "en")
    assert next(sides).message.startswith("loading the model ...")
    sides.close()
    assert not chat.engine.is_loaded
    first, *_, last = chat.stream(QUESTION, QUICK)
    assert first.loading
    messages = ui_status.describe(first, chat, "en"), ui_status.describe(first, chat, "zh")
    assert messages[0] == "loading the model ... (run-7 trains on the same device)"
    assert "run-7" in messages[1]
    *_, expected = load(run)[0].stream(QUESTION, QUICK)
    assert last.text == expected.text
    assert not any(reply.loading for reply in chat.stream(QUESTION, QUICK))
    assert ui_status.describe(last, chat, "en").endswith(
        "cpu, beside the training run-7 · ended at the limit of new tokens"
    )
    assert set(devices) == {"cpu"}


def test_a_model_that_cannot_be_loaded_is_tried_again(tiny_model, monkeypatch):
    """Out of memory names the training; a second question succeeds; questions at the same time load once."""
    plain, calls = loader.engine_of, []

    def engine_of(*arguments):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        return plain(*arguments)

    monkeypatch.setattr(loader, "engine_of", engine_of)
    chat, _ = later(lambda device: ["run-7"], model_path=str(tiny_model))
    with pytest.raises(UserError, match=r"while the model was loaded\. Wait for run-7") as caught:
        list(chat.stream(QUESTION, QUICK))
    assert caught.value.code == 6
    threads = [threading.Thread(target=lambda: list(chat.stream(QUESTION, QUICK))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(calls) == 2
    assert chat.engine.is_loaded


def test_a_model_that_cannot_be_loaded_keeps_no_memory(monkeypatch):
    """What was read before the memory ran out is released, and then the cache of the GPU is emptied."""
    read, emptied = [], []

    def engine_of() -> None:
        weights = torch.zeros(9)
        read.append(weakref.ref(weights))
        raise RuntimeError("CUDA out of memory. Tried to allocate")

    def empty(device: str) -> None:
        emptied.append((device, read[-1]() is None))

    monkeypatch.setattr(hardware, "forget_cached_memory", empty)
    for device, expected in (("cuda:1", "cuda:1"), ("all", "cuda")):
        nothing = types.SimpleNamespace(name="", capabilities=None)
        model = types.SimpleNamespace(adapters=[])
        plan = types.SimpleNamespace(kind=nothing, model=model, device=hardware.Choice(device, ""))
        with pytest.raises(UserError, match="Out of memory"):
            lazy_engine.Engine(plan, engine_of, lambda device: []).load()
        assert emptied.pop() == (expected, True)


def test_mistakes_are_told_before_any_question(tiny_model, tmp_path):
    """A model that is loaded later is checked at once as far as that needs no weights."""
    for options, word in (
        ({"model_path": str(tmp_path)}, "no tokenizer"),
        ({"model_path": str(tiny_model), "lora_path": str(tmp_path / "none")}, "no such folder"),
        ({"model_path": str(tiny_model), "template": "chatml"}, "no token"),
        ({"model_path": str(tiny_model), "device": "mps"}, "no Apple GPU"),
    ):
        with pytest.raises(UserError, match=word):
            later(**options)
