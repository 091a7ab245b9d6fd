"""What an engine is: token ids in, scores of the next token out. It may live in this process or in another.

Only token ids, adapter names and weights, scores and errors cross this seam. No lock, callback, cache or
model can be reached through it, and no text for people: an engine returns data, ui and config have the words.
An engine knows no conversation and no template; decoding.py chooses the tokens, and the tokenizer is the
caller's.

Scores are one array: today a torch.Tensor on the engine's own device, because moving a whole vocabulary off a
GPU for each token costs a third of a token. The proxy of an engine in a child process receives them as bytes
and makes the tensor itself, on the CPU.

Errors: UserError for what the user can mend, MemoryError or RuntimeError when memory does not suffice
(errors.is_out_of_memory tells them), RuntimeError for every other failure of a step.

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

    interleaves: bool  # open sequences may be advanced by turns; otherwise a second waits for the first
    # option or mode -> why it is not there, a key of config.chat.LACKS
    lacks: abc.Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the model runs, or will run once it is loaded."""

    device: str  # as torch names it; "all": several GPUs and the CPU
    threads: int | None = None  # of the CPU; None where the engine does not choose them
    gpu_layers: int = 0  # layers of a CPU engine that lie on the GPU, -1 = all
    beside: tuple[str, ...] = ()  # names of runs that are trained on the same device now


def check_adapter(name: str, loaded: abc.Sequence[str]) -> None:
    """Raise UserError when no adapter of that name is loaded with an engine."""
    if name not in loaded:
        raise UserError(f"No adapter is called {name}.", f"Loaded: {', '.join(loaded) or 'none'}.")


class Sequence(Protocol):
    """One prompt and what is written behind it, by the same active adapters from open to close.

    It is read whole first, then advanced step by step. It can be given up at any time: `cancel` may be called
    from any thread, all else by one thread at a time. `close` has to be called in the end, and may be again.
    """

    @property
    def reused(self) -> int:
        """Tokens of the prompt that the engine still knew and does not read again; final after read()."""
        ...

    def read(self) -> abc.Iterator[int]:
        """Take the prompt in; yields how many of its tokens are read.

        Of an engine that does not interleave it yields 0 now and then while another sequence is open; in
        one thread that other one has to be closed first. It ends early when the sequence is cancelled.
        """
        ...

    def first(self) -> torch.Tensor:
        """Scores [1, V] of the first token, after read(); the next step may write over them."""
        ...

    def advance(self, parents: abc.Sequence[int], tokens: abc.Sequence[int]) -> torch.Tensor:
        """Scores [B, V] of what follows, when beam b is beam parents[b] with tokens[b] behind it.

        There may be more or fewer beams than before; the prompt is one. The next step of any sequence may
        write over these scores. RuntimeError: the sequence was cancelled or closed.
        """
        ...

    def cancel(self) -> None:
        """Ask for no further step: a read() that goes on ends after the part it is at, or stops waiting."""
        ...

    def close(self) -> None:
        """Free the sequence for others. The engine may keep what it knows of it, for a next turn."""
        ...


class Engine(Protocol):
    """A model that answers. Several sequences may be open at once, each with active adapters of its own."""

    @property
    def name(self) -> str:
        """As --engine names it."""
        ...

    @property
    def capabilities(self) -> Capabilities: ...

    @property
    def adapters(self) -> abc.Sequence[str]:
        """Names of the adapters that are loaded with it."""
        ...

    @property
    def placement(self) -> Placement:
        """Where it runs now; asking reads no weights."""
        ...

    @property
    def is_loaded(self) -> bool:
        """Whether the weights are in memory."""
        ...

    def load(self) -> None:
        """Read the weights unless they are there; who asks second waits for the first. Raises UserError."""
        ...

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together; RuntimeError before the weights are loaded."""
        ...

    def check_active_adapters(self, active_adapters: ActiveAdapters) -> None:
        """Raise UserError when these adapters cannot be active with these weights."""
        ...

    def open(self, prompt: list[int], active_adapters: ActiveAdapters = ()) -> Sequence:
        """A sequence that begins with these token ids; loads the weights if they are not there."""
        ...

    def each(self, ids: list[int], active_adapters: ActiveAdapters = ()) -> abc.Iterator[torch.Tensor]:
        """Scores [t, V] of what follows each of `ids`, some tokens at a time; nothing comes before the first.

        An engine that does not interleave waits until no sequence is open.
        """
        ...

    def forget(self) -> None:
        """Let go of what was kept of closed sequences, and begin anew after a step ran out of memory."""
        ...

    def close(self) -> None:
        """Free the weights, once no step goes on. Nothing can be opened afterwards."""
        ...
