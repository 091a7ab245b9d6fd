"""Does a GGUF file do what the model it was made from does? Ids, end tokens, answers, scores, perplexity.

transformers in fp32 on one side, llama.cpp on the other, with keys and values in fp32 so that a difference is
the file's. The model's own side runs first and is let go: both need not fit into memory at once.
"""

import dataclasses
import gc
import math
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from onecard.config.generation import ActiveAdapters
from onecard.data import conversation as data_conversation
from onecard.data import encode as data_encode
from onecard.data.template import Template
from onecard.errors import MEMORY, UserError
from onecard.evaluation import perplexity, probe_texts
from onecard.inference import llama_cpp_engine, transformers_engine
from onecard.models import adapter as models_adapter
from onecard.models import base_model
from onecard.system import hardware

TOKENS, CONTEXT = 64, 1024  # of an answer; of the text's windows and of the longest prompt
MOST_GAP, MOST_RATIO = 0.1, 1.15
EXACT = ("f16", "f32")  # types whose scores must be the model's
NAME = "adapter"


@dataclasses.dataclass(frozen=True)
class ParityRow:
    """One line of the table: what was compared, what came out, what was asked for."""

    name: str
    found: str
    asked: str = ""
    failed: bool = False


@dataclasses.dataclass(frozen=True)
class Answer:
    """A prompt, its greedy answer, and the scores [T, V] of the answer's tokens before they were chosen."""

    prompt: list[int]
    ids: list[int]
    scores: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Numbers:
    """What one side says."""

    answers: list[Answer]
    score: perplexity.Score
    length: int  # tokens of a window


def reference(folder: Path, adapter_folder: Path | None, template: Template, tokenizer: Any) -> Numbers:
    """What transformers says, in fp32 on the processor; raises UserError (exit 6) when it has no room."""
    check_memory(folder)
    made = base_model.load_base(str(folder), 16, "fp32", "cpu").eval()
    if adapter_folder:
        made = models_adapter.attach(made, adapter_folder, NAME)
    engine = transformers_engine.Engine(made, tokenizer, CONTEXT, [NAME] if adapter_folder else [])
    active_adapters = _active_adapters(adapter_folder)
    ends = data_encode.eos_ids(template, tokenizer)
    answers = []
    for text in tqdm(probe_texts.PROMPTS, "answers by transformers", unit="answer", disable=None):
        asked = data_encode.encode(data_conversation.single(text), template, tokenizer)[0]
        ids = _greedy(engine, asked, active_adapters, ends)
        answers.append(Answer(asked, ids, _scores(engine, asked, ids, active_adapters)))
    own = getattr(base_model.load_config(str(folder)).get_text_config(), "max_position_embeddings", None)
    length = min(CONTEXT, own or CONTEXT)
    text = perplexity.encode(tokenizer, probe_texts.TEXT)
    score = perplexity.score(engine, text, length, active_adapters, "a text by transformers")
    del made, engine
    gc.collect()
    return Numbers(answers, score, length)


def check_memory(folder: Path) -> None:
    """Raise UserError (exit 6) unless the model fits into the free memory in fp32."""
    with torch.device("meta"):
        bare = base_model.skeleton(str(folder), base_model.load_config(str(folder)))
    needed = 4 * sum(parameter.numel() for parameter in bare.parameters())
    free = hardware.free_memory_bytes("cpu")
    if free is not None and needed > free:
        problem = f"--check needs {needed >> 20} MiB for the model in fp32, free: {free >> 20} MiB."
        raise UserError(problem, "Use --check false: the files are then not compared.", MEMORY)


def compare(
    expected: Numbers,
    kind: str,
    gguf: Path,
    gguf_adapter: Path | None,
    template: Template,
    tokenizer: Any,
    threads: int,
) -> list[ParityRow]:
    """The table of one file of this type; a row that failed says so."""
    adapters = {NAME: gguf_adapter} if gguf_adapter else {}
    engine = llama_cpp_engine.Engine(gguf, tokenizer, CONTEXT, adapters, threads, exact=True)
    try:
        rows = [_ids(engine, tokenizer), *_metadata(engine, template, tokenizer)]
        active_adapters = _active_adapters(gguf_adapter)
        rows += _answers(
            engine, expected.answers, kind, active_adapters, data_encode.eos_ids(template, tokenizer)
        )
        text = perplexity.encode(tokenizer, probe_texts.TEXT)
        found = perplexity.score(engine, text, expected.length, active_adapters, "a text by llama.cpp")
        return [*rows, _perplexity(expected.score, found)]
    finally:
        engine.close()


def table(rows: list[ParityRow]) -> str:
    width = max(len(row.name) for row in rows)
    lines = []
    for row in rows:
        asked = f"  ({row.asked})" if row.asked else ""
        lines.append(f"{row.name:<{width}}  {row.found}{asked}{'  FAILED' if row.failed else ''}")
    return "\n".join(lines)


def _ids(engine: Any, tokenizer: Any) -> ParityRow:
    """Added tokens are written as such: that is how other programs write a template."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    texts = probe_texts.texts(added)
    own = tokenizer(texts, add_special_tokens=False).input_ids
    wrong = [text for text, ids in zip(texts, own, strict=True) if engine.encode(text) != ids]
    first = f", first: {wrong[0][:40]!r}" if wrong else ""
    return ParityRow("token ids", f"{len(wrong)} of {len(texts)} texts differ{first}", "0", bool(wrong))


def _metadata(engine: Any, template: Template, tokenizer: Any) -> list[ParityRow]:
    chat, own = engine.written("tokenizer.chat_template"), getattr(tokenizer, "chat_template", None)
    end = engine.written("tokenizer.ggml.eos_token_id")
    rows = [ParityRow("chat template", "the model's" if own else "none", "the model's")]
    if chat != own:
        rows = [ParityRow("chat template", "another" if chat else "missing", "the model's", True)]
    name = tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id)
    right = end == str(tokenizer.eos_token_id)
    rows.append(
        ParityRow("end token", f"{end} {name if right else ''}", f"{tokenizer.eos_token_id}", not right)
    )
    unknown = [token for token in data_encode.eos_ids(template, tokenizer) if not engine.ends_with(token)]
    if unknown:
        names = ", ".join(map(str, tokenizer.convert_ids_to_tokens(unknown)))
        rows.append(
            ParityRow("stops", f"llama.cpp does not stop at {names} by itself: the Modelfile says it")
        )
    return rows


def _answers(
    engine: Any, answers: list[Answer], kind: str, active_adapters: ActiveAdapters, ends: list[int]
) -> list[ParityRow]:
    same = total = whole = 0
    gaps = []
    for answer in tqdm(answers, "answers by llama.cpp", unit="answer", disable=None):
        ids = _greedy(engine, answer.prompt, active_adapters, ends)
        equal = [mine == its for mine, its in zip(answer.ids, ids, strict=False)]
        common = equal.index(False) if False in equal else len(equal)
        same, total = same + common, total + len(answer.ids)
        whole += ids == answer.ids
        difference = _scores(engine, answer.prompt, answer.ids, active_adapters) - answer.scores
        gaps.append(difference.abs().max())
    greedy = f"{same} of {total} tokens before they part, {whole} of {len(answers)} answers whole"
    gap = torch.stack(gaps).max().item()  # Python's own max() passes NaN over
    bound = f"at most {MOST_GAP}" if kind in EXACT else "a number"
    failed = not math.isfinite(gap) or (kind in EXACT and gap > MOST_GAP)
    return [
        ParityRow("greedy answers", greedy),
        ParityRow("largest logit gap", f"{gap:.4f}", bound, failed),
    ]


def _perplexity(expected: perplexity.Score, found: perplexity.Score) -> ParityRow:
    ratio = found.perplexity / expected.perplexity
    numbers = f"{expected.perplexity:.3f} -> {found.perplexity:.3f}, ratio {ratio:.4f}"
    return ParityRow("perplexity", numbers, f"at most {MOST_RATIO}", not ratio <= MOST_RATIO)


def _active_adapters(adapter: Path | None) -> ActiveAdapters:
    return ((NAME, 1.0),) if adapter else ()


def _greedy(engine: Any, asked: list[int], active_adapters: ActiveAdapters, ends: list[int]) -> list[int]:
    """At most TOKENS tokens, with the end token if it comes; always the most probable."""
    stream = engine.open(asked, active_adapters)
    try:
        for _ in stream.read():
            pass
        scores, ids = stream.first(), []
        while len(ids) < TOKENS:
            ids.append(int(scores[0].argmax()))
            if ids[-1] in ends:
                break
            scores = stream.advance([0], ids[-1:])
        return ids
    finally:
        stream.close()


def _scores(engine: Any, asked: list[int], ids: list[int], active_adapters: ActiveAdapters) -> torch.Tensor:
    """[T, V] before each token of an answer was chosen."""
    rows = torch.cat(list(engine.each(asked + ids, active_adapters)))
    return rows[len(asked) - 1 : -1].float()
