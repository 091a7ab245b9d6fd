"""Does a GGUF file do the same as the model it was made from? It compares ids, answers, logits, perplexity.

The model runs in transformers in fp32, the file in llama.cpp with keys and values in fp32, so that every
difference comes from the file. The model runs first and is deleted before the file is loaded, because both
may not fit into memory at the same time.
"""

import dataclasses
import gc
import math
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from onecard.config.generation import ActiveAdapters
from onecard.data import conversation as data_conversation
from onecard.data import encode as data_encode
from onecard.data.template import Template
from onecard.errors import MEMORY, UserError
from onecard.evaluation import perplexity, probe_texts
from onecard.inference import llama_cpp_engine, transformers_engine
from onecard.inference.engine import Engine
from onecard.models import adapter as models_adapter
from onecard.models import base_model
from onecard.system import hardware, openmp

TOKENS = 64  # the longest answer
CONTEXT = 1024  # tokens of a window of the text, and of the longest prompt with its answer
MOST_GAP, MOST_RATIO = 0.1, 1.15  # the largest difference of logits, the largest ratio of perplexities
EXACT = ("f16", "f32")  # types of GGUF files whose logits must equal the model's
NAME = "adapter"


@dataclasses.dataclass(frozen=True)
class ParityRow:
    """One line of the table: what was compared, the result, and the result that is required."""

    name: str
    result: str
    required: str = ""
    failed: bool = False


@dataclasses.dataclass(frozen=True)
class Answer:
    """A prompt, its greedy answer of T tokens, and the logits [T, V] that predict them."""

    prompt: list[int]
    ids: list[int]
    scores: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The answers and the score of the text that one side gave."""

    answers: list[Answer]
    score: perplexity.Score
    length: int  # tokens of a window


def reference(
    folder: Path, adapter_folder: Path | None, template: Template, tokenizer: PreTrainedTokenizerBase
) -> Outcome:
    """The outcome of transformers, in fp32 on the CPU; raises UserError (exit 6) as check_memory does."""
    check_memory(folder)
    openmp.say_once("cpu")
    model = base_model.load_base(str(folder), 16, "fp32", "cpu").eval()
    if adapter_folder:
        model = models_adapter.attach(model, adapter_folder, NAME)
    engine = transformers_engine.Engine(model, tokenizer, CONTEXT, [NAME] if adapter_folder else [])
    active_adapters = _active_adapters(adapter_folder)
    eos_ids = data_encode.eos_ids(template, tokenizer)
    answers = []
    for text in tqdm(probe_texts.PROMPTS, "answers by transformers", unit="answer", disable=None):
        prompt = data_encode.encode(data_conversation.single(text), template, tokenizer)[0]
        ids = _greedy(engine, prompt, active_adapters, eos_ids)
        answers.append(Answer(prompt, ids, _scores(engine, prompt, ids, active_adapters)))
    own = getattr(base_model.load_config(str(folder)).get_text_config(), "max_position_embeddings", None)
    length = min(CONTEXT, own or CONTEXT)
    text = perplexity.encode(tokenizer, probe_texts.TEXT)
    score = perplexity.score(engine, text, length, active_adapters, "a text by transformers")
    del model, engine
    gc.collect()
    return Outcome(answers, score, length)


def check_memory(folder: Path) -> None:
    """Raise UserError (exit 6) unless the model fits into the free memory in fp32."""
    with torch.device("meta"):
        bare = base_model.skeleton(str(folder), base_model.load_config(str(folder)))
    needed = 4 * sum(parameter.numel() for parameter in bare.parameters())
    free = hardware.free_memory_bytes("cpu")
    if free is not None and needed > free:
        problem = (
            f"--check loads the model in fp32: that needs {needed >> 20} MiB, and {free >> 20} MiB are free."
        )
        raise UserError(problem, "Leave the comparison out with --check false.", MEMORY)


def compare(
    expected: Outcome,
    kind: str,
    gguf: Path,
    gguf_adapter: Path | None,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    threads: int,
) -> list[ParityRow]:
    """The rows of the table for one GGUF file.

    expected: the outcome of transformers; kind: the file's type, as f16 or q4_k_m; threads: of llama.cpp.
    Raises UserError when llama.cpp cannot load the file.
    """
    adapters = {NAME: gguf_adapter} if gguf_adapter else {}
    engine = llama_cpp_engine.Engine(gguf, tokenizer, CONTEXT, adapters, threads, exact=True)
    try:
        rows = [_ids(engine, tokenizer), *_metadata(engine, template, tokenizer)]
        active_adapters = _active_adapters(gguf_adapter)
        rows += _answers(
            engine, expected.answers, kind, active_adapters, data_encode.eos_ids(template, tokenizer)
        )
        text = perplexity.encode(tokenizer, probe_texts.TEXT)
        score = perplexity.score(engine, text, expected.length, active_adapters, "a text by llama.cpp")
        return [*rows, _perplexity(expected.score, score)]
    finally:
        engine.close()


def table(rows: list[ParityRow]) -> str:
    """The rows as lines of text."""
    width = max(len(row.name) for row in rows)
    lines = []
    for row in rows:
        required = f"  ({row.required})" if row.required else ""
        lines.append(f"{row.name:<{width}}  {row.result}{required}{'  FAILED' if row.failed else ''}")
    return "\n".join(lines)


def _ids(engine: llama_cpp_engine.Engine, tokenizer: PreTrainedTokenizerBase) -> ParityRow:
    """Whether both tokenize all probe texts to the same ids.

    Added tokens in a text count as tokens, because other programs write templates in this way.
    """
    added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    texts = probe_texts.texts(added)
    expected = tokenizer(texts, add_special_tokens=False).input_ids
    different = [text for text, ids in zip(texts, expected, strict=True) if engine.encode(text) != ids]
    example = f", first: {different[0][:40]!r}" if different else ""
    result = f"{len(different)} of {len(texts)} texts differ{example}"
    return ParityRow("token ids", result, "0", bool(different))


def _metadata(
    engine: llama_cpp_engine.Engine, template: Template, tokenizer: PreTrainedTokenizerBase
) -> list[ParityRow]:
    template_in_file = engine.written("tokenizer.chat_template")
    template_of_model = getattr(tokenizer, "chat_template", None)
    eos_id = engine.written("tokenizer.ggml.eos_token_id")
    rows = [ParityRow("chat template", "the model's" if template_of_model else "none", "the model's")]
    if template_in_file != template_of_model:
        rows = [ParityRow("chat template", "another" if template_in_file else "missing", "the model's", True)]
    name = tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id)
    is_right = eos_id == str(tokenizer.eos_token_id)
    rows.append(
        ParityRow(
            "end token", f"{eos_id} {name if is_right else ''}", f"{tokenizer.eos_token_id}", not is_right
        )
    )
    missing_stops = [
        token for token in data_encode.eos_ids(template, tokenizer) if not engine.ends_with(token)
    ]
    if missing_stops:
        names = ", ".join(map(str, tokenizer.convert_ids_to_tokens(missing_stops)))
        rows.append(
            ParityRow("stops", f"llama.cpp does not stop at {names} by itself, but the Modelfile tells it to")
        )
    return rows


def _answers(
    engine: Engine, answers: list[Answer], kind: str, active_adapters: ActiveAdapters, eos_ids: list[int]
) -> list[ParityRow]:
    equal_tokens = all_tokens = equal_answers = 0
    gaps = []
    for answer in tqdm(answers, "answers by llama.cpp", unit="answer", disable=None):
        ids = _greedy(engine, answer.prompt, active_adapters, eos_ids)
        equal = [mine == its for mine, its in zip(answer.ids, ids, strict=False)]
        common = equal.index(False) if False in equal else len(equal)
        equal_tokens, all_tokens = equal_tokens + common, all_tokens + len(answer.ids)
        equal_answers += ids == answer.ids
        difference = _scores(engine, answer.prompt, answer.ids, active_adapters) - answer.scores
        gaps.append(difference.abs().max())
    tokens = f"{equal_tokens} of {all_tokens} tokens are equal up to the first difference"
    greedy = f"{tokens}, {equal_answers} of {len(answers)} answers are equal"
    gap = torch.stack(gaps).max().item()  # Python's own max() ignores NaN
    bound = f"at most {MOST_GAP}" if kind in EXACT else "a number"
    failed = not math.isfinite(gap) or (kind in EXACT and gap > MOST_GAP)
    return [
        ParityRow("greedy answers", greedy),
        ParityRow("largest logit gap", f"{gap:.4f}", bound, failed),
    ]


def _perplexity(expected: perplexity.Score, score: perplexity.Score) -> ParityRow:
    ratio = score.perplexity / expected.perplexity
    figures = f"{expected.perplexity:.3f} -> {score.perplexity:.3f}, ratio {ratio:.4f}"
    return ParityRow("perplexity", figures, f"at most {MOST_RATIO}", not ratio <= MOST_RATIO)


def _active_adapters(adapter: Path | None) -> ActiveAdapters:
    return ((NAME, 1.0),) if adapter else ()


def _greedy(
    engine: Engine, prompt: list[int], active_adapters: ActiveAdapters, eos_ids: list[int]
) -> list[int]:
    """The ids of a greedy answer of at most TOKENS tokens, with the end token if there is one."""
    stream = engine.open(prompt, active_adapters)
    try:
        for _ in stream.read():
            pass
        scores, ids = stream.first(), []
        while len(ids) < TOKENS:
            ids.append(int(scores[0].argmax()))
            if ids[-1] in eos_ids:
                break
            scores = stream.advance([0], ids[-1:])
        return ids
    finally:
        stream.close()


def _scores(
    engine: Engine, prompt: list[int], ids: list[int], active_adapters: ActiveAdapters
) -> torch.Tensor:
    """The logits [T, V] in fp32 that predict the T tokens of an answer."""
    rows = torch.cat(list(engine.each(prompt + ids, active_adapters)))
    return rows[len(prompt) - 1 : -1].float()
