"""What an engine is: token ids in, scores of the next token out. It may live in this process or in another.

Only token ids, adapter names and weights, scores and errors cross this seam. No lock, callback, cache or
model can be reached through it, and no text for people: engines return data, ui and config have the words.
An engine knows no conversation and no template. decoding.py chooses the tokens, and the caller has the
tokenizer.

Scores are one array: today a torch.Tensor on the engine's own device, because moving a whole vocabulary off a
GPU takes a third of the time of a token. The proxy of an engine in a child process receives them as bytes and
makes the tensor itself, on the CPU.

Errors: UserError for what the user can solve, MemoryError or RuntimeError when memory does not suffice
(errors.is_out_of_memory recognises them), RuntimeError for every other failure of a step.

Legend: B sequences that one prompt has become (beams), V entries of the vocabulary, t some tokens.
"""

import dataclasses
from collections import abc
from typing import Protocol

import torch

from onecard.config.generation import ActiveAdapters
from onecard.errors import UserError


@dataclasses.dataclass(frozen=True)
class Capabilities:
    """What an engine can do; this is known before any weight is read."""

    interleaves: bool  # whether open sequences may be advanced in turn; otherwise a second one has to wait
    # options and modes that the engine lacks -> the reason, a key of config.chat.LACKS
    lacks: abc.Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the model runs, or will run once it is loaded."""

    device: str  # as torch names it; "all": several GPUs and the CPU
    threads: int | None = None  # CPU threads; None where the engine does not choose their number
    gpu_layers: int = 0  # layers that a CPU engine keeps on the GPU; -1 means all
    beside: tuple[str, ...] = ()  # names of the runs that are being trained on the same device


def check_adapter(name: str, loaded: abc.Sequence[str]) -> None:
    """Raise UserError when the engine has no adapter of this name; loaded: the names that it has."""
    if name not in loaded:
        raise UserError(f"No adapter is called {name}.", f"Loaded: {', '.join(loaded) or 'none'}.")


class Sequence(Protocol):
    """One prompt and the answer after it, with the same active adapters from open to close.

    The prompt is read as a whole first; then the sequence is advanced step by step. `cancel` may be called at
    any time and from any thread, everything else from one thread at a time. `close` has to be called in the
    end, and may be called again.
    """

    @property
    def reused(self) -> int:
        """Tokens of the prompt that the engine still has and does not read again; final after read()."""
        ...

    def read(self) -> abc.Iterator[int]:
        """Read the prompt; yields how many of its tokens have been read so far.

        An engine that does not interleave yields 0 now and then while another sequence is open; within one
        thread the other sequence has to be closed first. Reading ends early when the sequence is cancelled.
        """
        ...

    def first(self) -> torch.Tensor:
        """Scores [1, V] of the first token of the answer, after read(); the next step may overwrite them."""
        ...

    def advance(self, parents: abc.Sequence[int], tokens: abc.Sequence[int]) -> torch.Tensor:
        """Scores [B, V] of the next token, where beam b is the old beam parents[b] followed by tokens[b].

        There may be more or fewer beams than before; the prompt counts as one beam. The next step of any
        sequence may overwrite these scores. Raises RuntimeError when the sequence was cancelled or closed.
        """
        ...

    def cancel(self) -> None:
        """Ask for no further step. A read() in progress ends after its current part, or stops waiting."""
        ...

    def close(self) -> None:
        """Free the engine for others. It may keep the keys and values of this sequence for the next turn."""
        ...


class Engine(Protocol):
    """A model that answers. Several sequences may be open at once, each with active adapters of its own."""

    @property
    def name(self) -> str:
        """The name that --engine has for it."""
        ...

    @property
    def capabilities(self) -> Capabilities: ...

    @property
    def adapters(self) -> abc.Sequence[str]:
        """Names of the adapters that are loaded with the model."""
        ...

    @property
    def placement(self) -> Placement:
        """Where the model runs now; this reads no weights."""
        ...

    @property
    def is_loaded(self) -> bool:
        """Whether the weights are in memory."""
        ...

    def why_ended(self) -> str:
        """Why the weights have left the memory by themselves since the last call; "" when they have not.

        A failure that a step has raised is not repeated here.
        """
        ...

    def load(self) -> None:
        """Read the weights if they are not in memory; a second caller waits. Raises UserError."""
        ...

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together; RuntimeError before the weights are loaded."""
        ...

    def check_active_adapters(self, active_adapters: ActiveAdapters) -> None:
        """Raise UserError when these adapters cannot be active with these weights."""
        ...

    def open(self, prompt: list[int], active_adapters: ActiveAdapters = ()) -> Sequence:
        """A sequence that begins with these token ids; loads the weights if they are not in memory."""
        ...

    def each(self, ids: list[int], active_adapters: ActiveAdapters = ()) -> abc.Iterator[torch.Tensor]:
        """Scores [t, V] of the token after each of `ids`, some tokens at a time; `ids` begin the sequence.

        An engine that does not interleave waits until no sequence is open.
        """
        ...

    def forget(self) -> None:
        """Free what was kept of closed sequences, so that a step can be tried again after memory ran out."""
        ...

    def close(self) -> None:
        """Free the weights as soon as no step is in progress. Nothing can be opened afterwards."""
        ...
