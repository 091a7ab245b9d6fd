"""What the tests on the CPU show must also hold on a real GPU; without one these tests are skipped."""

import contextlib
import dataclasses
import io
import json
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from onecard.config import options as config_options
from onecard.config import training as config_training
from onecard.config.chat import ChatConfig
from onecard.config.generation import BEAM, GREEDY, SAMPLE, Generation
from onecard.data import conversation as data_conversation
from onecard.data import encode as data_encode
from onecard.errors import UserError
from onecard.inference import chat, decoding
from onecard.system import hardware
from onecard.training import loop
from tests.support import resume_cases, tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
GPU = "cuda:0"
QUICK = Generation(GREEDY, repetition_penalty=1.0, min_new_tokens=24, max_new_tokens=24)
GIB = 2**30
LARGE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 12, "vocab_size": 32000}
LARGE |= {"num_attention_heads": 16, "num_key_value_heads": 4, "initializer_range": 0.02}


def started(folder: Path, **changes) -> tuple[chat.Chat, list[str]]:
    """A chat, and the lines that it printed while it started."""
    settings = {"model_path": str(folder), "template": "alpaca", "device": GPU, **changes}
    with contextlib.redirect_stdout(io.StringIO()) as output:
        session = chat.start(ChatConfig(**settings), None)
    return session, output.getvalue().splitlines()


def answer(session: chat.Chat, settings: Generation, question: str = "Say red") -> chat.Reply:
    *_, last = session.stream(data_conversation.single(question), settings)
    return last


@pytest.fixture(scope="module")
def large_model(tmp_path_factory) -> Path:
    """A model of 0.6 billion random weights: 1.3 GB in 16 bits."""
    folder = tmp_path_factory.mktemp("large") / "model"
    torch.set_default_dtype(torch.bfloat16)
    try:
        return tiny.save_model(folder, **LARGE)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("mode", [GREEDY, BEAM])
def test_answers_are_those_of_generate(tiny_model, bits, mode):
    """The answer has the same tokens as that of transformers' generate on the GPU."""
    session, _ = started(tiny_model, bits=bits, dtype="fp32")
    settings = dataclasses.replace(QUICK, mode=mode)
    reply = answer(session, settings)
    ids = data_encode.encode(data_conversation.single("Say red"), session.template, session.tokenizer)[0]
    config = GenerationConfig(
        do_sample=False,
        num_beams=settings.width,
        max_new_tokens=24,
        min_new_tokens=24,
        eos_token_id=session.eos_ids,
        pad_token_id=session.eos_ids[0],
    )
    prompt = torch.tensor([ids], device=GPU)
    mask = torch.ones_like(prompt)
    output = session.engine.model.generate(prompt, attention_mask=mask, generation_config=config)
    assert reply.text.stable == data_encode.decode(session.tokenizer, output[0, len(ids) :].tolist()).strip()
    assert session.engine.device == torch.device(GPU)


def test_gpu_and_cpu_give_the_same_answer(tiny_model):
    """In fp32 the text is the same on both, greedy and sampled with a seed."""
    for settings in (QUICK, dataclasses.replace(QUICK, mode=SAMPLE, seed=5)):
        texts = {
            answer(started(tiny_model, device=device, dtype="fp32")[0], settings).text.stable
            for device in (GPU, "cpu")
        }
        assert len(texts) == 1


@contextlib.contextmanager
def only_free(size: int):
    """Another tensor takes all memory of the GPU except `size` bytes."""
    hardware.forget_cached_memory(GPU)
    ballast = torch.empty(torch.cuda.mem_get_info()[0] - size, dtype=torch.uint8, device=GPU)
    try:
        yield
    finally:
        del ballast
        hardware.forget_cached_memory(GPU)


@pytest.mark.parametrize(("free", "bits"), [(3.0, 16), (1.1, 8), (0.6, 4)])
def test_auto_takes_the_most_bits_that_fit(large_model, free, bits):
    """--bits auto follows the free memory of the GPU and prints the reason; then the model fits."""
    with only_free(int(free * GIB)):
        session, lines = started(large_model)
        assert any(f"{bits} bits: " in line and "GiB of weights" in line for line in lines), lines
        assert answer(session, QUICK).text.tokens == 24
        del session


def test_a_cap_per_gpu_is_kept(large_model):
    """--device all --card_memory: what does not fit goes to CPU memory; the answer is the same."""
    whole, _ = started(large_model, dtype="fp32")
    expected = answer(whole, QUICK).text.stable
    del whole
    hardware.forget_cached_memory(GPU)
    torch.cuda.reset_peak_memory_stats()
    capped, lines = started(large_model, device="all", card_memory="0:1GiB,cpu:20GiB", dtype="fp32")
    devices = {p.device.type for p in capped.engine.model.parameters()}
    assert devices == {"cuda", "meta"}, lines  # meta: it is in CPU memory until it is needed
    assert torch.cuda.max_memory_allocated() < 1.1 * GIB
    assert answer(capped, QUICK).text.stable == expected


def test_a_full_gpu_keeps_the_part_that_is_there(large_model):
    """Real out of memory in the middle of an answer: its text is kept and the next question is answered."""
    session, _ = started(large_model, dtype="fp32")
    long = dataclasses.replace(QUICK, mode=BEAM, num_beams=16, min_new_tokens=400, max_new_tokens=400)
    answer(session, QUICK)
    hardware.forget_cached_memory(GPU)
    replies = []
    with contextlib.ExitStack() as stack:
        for number, reply in enumerate(session.stream(data_conversation.single("Say red"), long)):
            replies.append(reply)
            if number == 20:
                stack.enter_context(only_free(8 << 20))
    assert replies[-1].text.finished == decoding.NO_MEMORY
    assert replies[-1].text.tokens >= 15
    assert answer(session, QUICK).text.tokens == 24


def test_a_gpu_that_does_not_exist_is_refused(tiny_model):
    with pytest.raises(UserError, match="cuda:99"):
        started(tiny_model, device="cuda:99")


def trained(tiny_model: Path, folder: Path, **changes) -> Path:
    rows = tiny.save_rows(folder / "rows.json", 24)
    flags = {"model_path": tiny_model, "data_path": rows, "output_path": folder / "run", "device": "cuda:0"}
    argv = [f"--{name}={value}" for name, value in {**resume_cases.FLAGS, **flags, **changes}.items()]
    options, explicit = config_options.parse_given(config_training.FinetuneConfig, argv)
    loop.run(options, explicit=explicit, sample=lambda *_: [], draw=lambda *_: None)
    return folder / "run"


def losses(run: Path) -> list[float]:
    records = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]


@pytest.mark.parametrize(
    "how",
    [
        {"bits": 16, "dtype": "fp32"},
        {"bits": 16, "dtype": "bf16"},
        {"bits": 16, "dtype": "fp16"},
        {"bits": 8, "dtype": "bf16"},
        {"bits": 4, "dtype": "bf16"},
        {"bits": 4, "dtype": "bf16", "optimizer": "adamw_8bit", "lora_r": 48},
    ],
    ids=str,
)
def test_training_learns_and_continues_bit_for_bit(tiny_model, tmp_path, how):
    """The loss falls, and a run that continues from step 6 ends with the bytes of one that never stopped."""
    whole = trained(tiny_model, tmp_path, **how)
    first, *_, last = losses(whole)
    assert last < first - 0.2
    part = resume_cases.stopped_at(whole, 6, tmp_path / "part")
    options, explicit = config_options.parse_given(
        config_training.ContinueConfig, [f"--output_path={part}", "--device=cuda:0"]
    )
    loop.go_on(options, explicit, sample=lambda *_: [], draw=lambda *_: None)
    assert resume_cases.differences(resume_cases.outcome(whole), resume_cases.outcome(part)) == []


def test_training_on_gpu_and_cpu_agrees(tiny_model, tmp_path):
    """In fp32 without dropout both have the same losses."""
    runs = {}
    for device in ("cuda:0", "cpu"):
        (tmp_path / device[:3]).mkdir()
        runs[device] = trained(tiny_model, tmp_path / device[:3], device=device, lora_dropout=0, dtype="fp32")
    assert losses(runs["cuda:0"]) == pytest.approx(losses(runs["cpu"]), rel=1e-4)


def test_a_full_gpu_repeats_the_step(large_model, tmp_path, capsys):
    """Real out of memory: the same rows are cut into smaller micro-batches, and the losses are the same."""
    options = {
        "lora_dropout": 0,
        "dtype": "bf16",
        "micro_batch_tokens": 5000,
        "max_steps": 3,
        "batch_size": 24,
    }
    options |= {"gradient_checkpointing": "off", "test_size": 0, "save_steps": 3, "learning_rate": 1e-4}
    for name in ("free", "full"):
        (tmp_path / name).mkdir()
    torch.cuda.reset_peak_memory_stats()
    free = trained(large_model, tmp_path / "free", **options)
    assert "out of memory" not in capsys.readouterr().out
    peak, weights = torch.cuda.max_memory_allocated(), 1.25 * GIB
    with only_free(int(weights + 0.5 * (peak - weights))):
        full = trained(large_model, tmp_path / "full", **options)
    assert "out of memory with micro-batches of 5000 tokens" in capsys.readouterr().out
    assert losses(full) == pytest.approx(losses(free), rel=1e-2)
