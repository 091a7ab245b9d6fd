"""Every program refuses a damaged base model alike: it names the file or folder, and the exit code is 4."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from onecard.config import options as config_options
from onecard.config.chat import ChatConfig
from onecard.config.conversion import ConvertConfig, ExportConfig, MergeConfig, QuantizeConfig
from onecard.config.tools import PerplexityConfig
from onecard.conversion import gguf_cache, merge, meta_llama, vocabulary
from onecard.conversion import quantize as conversion_quantize
from onecard.errors import CHECKPOINT, USAGE, UserError, run_program
from onecard.evaluation import perplexity as evaluation_perplexity
from onecard.inference import chat
from onecard.models import base_model
from onecard.models import tokenizer as models_tokenizer
from onecard.programs import finetune
from tests.support import tiny
from tests.support.paths import ROOT

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SAMPLE = str(ROOT / "sample" / "instruct.json")
QUIET: Callable[..., None] = lambda *_: None  # noqa: E731


def cut_short(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, 9000)


def bad_header(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:8] + b"x" * 20 + whole[28:])


def half_there(folder: Path) -> None:
    """The index names two files, and only one of them exists."""
    names = list(load_file(folder / WEIGHTS))
    first, second = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    (folder / WEIGHTS).rename(folder / first)
    places = {name: (first, second)[number % 2] for number, name in enumerate(names)}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def bad_index(folder: Path) -> None:
    half_there(folder)
    (folder / INDEX).write_text('{"weight_map": ')


def embedding_gone(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def bad_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')


def odd_kind(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": []}')


def elsewhere(folder: Path) -> None:
    """The index names a file in a subfolder, which is whole but does not belong to the folder itself."""
    names = list(load_file(folder / WEIGHTS))
    (folder / "sub").mkdir()
    (folder / WEIGHTS).rename(folder / "sub" / "evil.safetensors")
    places = dict.fromkeys(names, "sub/evil.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def built(kind: type, **options: object) -> object:
    return config_options.build(kind, {name: str(value) for name, value in options.items()})


def train(base: Path, place: Path) -> None:
    arguments = ["--model_path", str(base), "--data_path", SAMPLE, "--output_path", str(place)]
    arguments += ["--device", "cpu", "--bits", "16", "--dtype", "fp32", "--max_steps", "1"]
    run_program(lambda: finetune.main(arguments))


def talk(base: Path, place: Path, engine: str = "transformers") -> None:
    options = built(ChatConfig, model_path=base, engine=engine)
    chat.start(options, gguf_cache.for_llama)


def talk_in_llama_cpp(base: Path, place: Path) -> None:
    talk(base, place, "llama.cpp")


def export_gguf(base: Path, place: Path) -> None:
    from onecard.conversion import export_gguf as conversion_export_gguf

    options = built(ExportConfig, model_path=base, output_path=place)
    conversion_export_gguf.run(options)


def quantize(base: Path, place: Path) -> None:
    options = built(QuantizeConfig, model_path=base, output_path=place, method="bnb", data_path=SAMPLE)
    conversion_quantize.run(options)


def merge_lora(base: Path, place: Path) -> None:
    options = built(MergeConfig, model_path=base, lora_path=base.parent / "adapter", output_path=place)
    merge.run(options, QUIET)


def convert_llama(base: Path, place: Path) -> None:
    meta_llama.run(built(ConvertConfig, input_dir=base, output_dir=place, to="meta"), QUIET)


def perplexity(base: Path, place: Path) -> None:
    options = built(PerplexityConfig, data_path=SAMPLE, model_path=base, context=64, max_tokens=100)
    evaluation_perplexity.perplexity(options, gguf_cache.for_llama)


def prepare_base_model(base: Path, place: Path) -> None:
    tokenizer = models_tokenizer.load_tokenizer(str(base))
    vocabulary.prepare(base, tokenizer, tokenizer, place, 64)


FAULTS = (cut_short, bad_header, half_there, bad_index, embedding_gone, bad_config, odd_kind, elsewhere)
PROGRAMS = (
    *(train, talk, talk_in_llama_cpp, export_gguf, quantize, merge_lora, convert_llama, perplexity),
    prepare_base_model,
)
SLOW = (export_gguf, talk_in_llama_cpp)  # if the headers are whole, they start llama.cpp's converter
CASES = [
    pytest.param(program, fault, marks=pytest.mark.slow if gone and program in SLOW else ())
    for fault in FAULTS
    for gone in (fault is embedding_gone,)
    for program in PROGRAMS
    if not (fault is odd_kind and program is convert_llama)  # it finds no LLaMA there: exit code 2
    if not (fault is elsewhere and program in SLOW)  # they find no file of the folder's own: exit code 2
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder with a model and an adapter for it."""
    place = tmp_path_factory.mktemp("damaged")
    base = tiny.save_model(place / "base")
    bare = base_model.load_base(str(base), 16, "fp32", "cpu")
    get_peft_model(bare, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(place / "adapter")
    return place


def said_by(program: Callable[[Path, Path], None], base: Path, place: Path, capsys) -> tuple[int, str]:
    """(exit code, message); any other exception is one that a user would see as a traceback."""
    try:
        program(base, place)
    except UserError as error:
        return error.code, str(error)
    except SystemExit as error:
        return error.code, capsys.readouterr().err
    pytest.fail("it was taken for a whole model")


@pytest.mark.parametrize(("program", "fault"), CASES, ids=lambda each: each.__name__)
def test_one_exit_code(whole, tmp_path, monkeypatch, capsys, program, fault):
    if "llama" in program.__name__ or program is export_gguf:
        pytest.importorskip("llama_cpp", reason="llama-cpp-python is an extra of its own")
    monkeypatch.setattr(sys, "argv", sys.argv)
    here = Path(shutil.copytree(whole, tmp_path / "in"))
    fault(here / "base")
    code, message = said_by(program, here / "base", tmp_path / "made", capsys)
    assert code == CHECKPOINT, message
    assert "/base" in message
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("program", [perplexity, quantize], ids=lambda each: each.__name__)
def test_finite_weights_that_answer_with_nan(whole, tmp_path, capsys, program):
    """A measurement that is no number is refused."""
    here = Path(shutil.copytree(whole / "base", tmp_path / "base"))
    tensors = load_file(here / WEIGHTS)
    tensors |= {name: torch.full_like(tensor, 1e25) for name, tensor in tensors.items() if ".mlp." in name}
    save_file(tensors, here / WEIGHTS, {"format": "pt"})
    code, message = said_by(program, here, tmp_path / "made", capsys)
    assert code == CHECKPOINT, message
    assert not (tmp_path / "made").exists()


def test_what_is_no_model_is_another_thing(whole, tmp_path):
    """The exit code is 2, since nothing is damaged there and the user needs another name."""
    other, bare = (Path(shutil.copytree(whole / "base", tmp_path / name)) for name in ("other", "bare"))
    (other / "config.json").write_text('{"model_type": "no_such_kind"}')
    (bare / WEIGHTS).unlink()
    for folder in (other, bare, tmp_path / "none"):
        with pytest.raises(UserError) as caught:
            base_model.load_base(str(folder), 16, "fp32", "cpu")
        assert caught.value.code == USAGE
