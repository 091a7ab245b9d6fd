"""One resolver: what the user named -> base model, adapters, tokenizer, template, trusted code and versions.

Chat, perplexity, export and merge all ask here, so that they cannot answer differently.

Which base? The one that --model_path names; otherwise the model that was trained whole, or the base that the
adapter names (base_choice.py).

Does an adapter belong to the base? The run that trained it recorded SHA-256 fingerprints of the weights and
of the tokenizer of its base. They are compared wherever they were recorded and the base is a folder; a GGUF
file has none. Where they differ, the adapter is refused with exit code 4, with one exception: a program that
only answers or measures goes on with a warning when --model_path names the base, because that base may be a
quantised or re-saved form of the same model. Export and merge write files that outlive a warning, so they
always refuse. A file is read in full once; after that system/hashing.py knows it by its size and times.
"""

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from onecard import errors
from onecard.config.chat import ENGINES
from onecard.config.generation import BASE, ActiveAdapters
from onecard.data import template as data_template
from onecard.data.template import Template
from onecard.errors import CHECKPOINT, UserError
from onecard.hub import locate, model_files, remote_code, revisions
from onecard.hub.remote_code import TrustedCode
from onecard.hub.revisions import Version
from onecard.inference import base_choice, llama_cpp
from onecard.models import base_model
from onecard.models import tokenizer as models_tokenizer
from onecard.runs import adapters as runs_adapters
from onecard.runs.adapters import GGUF, Adapter, AdapterPath
from onecard.system import commands, hashing
from onecard.system import files as system_files
from onecard.system.console import say

AUTO, TRANSFORMERS, LLAMA = ENGINES  # purposes: an engine is to answer
EXPORT, MERGE = "export", "merge"  # purposes: files are to be written
USUAL_TEMPLATE = "alpaca"
# name of a base -> its folder or .gguf file, and the consent to run its code: not every program runs any
FindBase = Callable[[str], tuple[str, TrustedCode | None]]


@dataclasses.dataclass(frozen=True)
class ModelRequest:
    """What a user asks for."""

    model_path: str | None
    adapters: list[AdapterPath]
    purpose: str  # AUTO, TRANSFORMERS or LLAMA for an engine, EXPORT or MERGE for files
    find_base: FindBase
    gguf_remedy: str  # what the user can do about a GGUF file that the purpose cannot have
    code_remedy: str  # what the user can do about code of the base that is not trusted
    checkpoint: str = runs_adapters.BEST  # which one of an unfinished run: "best" or "newest"
    template: str | None = None
    remote_code: str | None = None  # the commit whose Python code the user trusts; find_base asks for it

    @property
    def writes_files(self) -> bool:
        return self.purpose in (EXPORT, MERGE)


@dataclasses.dataclass(frozen=True)
class ResolvedModel:
    """What belongs together. No weights are read; tokenizer and template are read when they are first used.

    As a context manager it deletes its copies of older adapters at the end of the block.
    """

    request: ModelRequest
    name: str  # of the base, as the user or the adapter wrote it
    base: str  # a folder in the layout of transformers, or a .gguf file
    base_reason: str
    sources: list[Adapter]  # all that --lora_path names, with a model that was trained whole
    code: TrustedCode | None  # to run the base's own Python code
    copies: tempfile.TemporaryDirectory[str]  # older adapters, rewritten in the layout of peft

    @property
    def adapters(self) -> list[Adapter]:
        return [source for source in self.sources if not source.whole]

    @property
    def active_adapters(self) -> ActiveAdapters:
        """Those that answer unless a question names others: all if any has a weight, otherwise the first."""
        if not self.adapters:
            return ()
        listed = self.request.adapters
        active = tuple((name, 1.0 if weight is None else weight) for name, _, weight in listed)
        return active if any(weight is not None for _, _, weight in listed) else active[:1]

    @functools.cached_property
    def own_tokenizer(self) -> Path | None:
        """The folder of the tokenizer that an adapter brings along; only a merge uses it, None otherwise.

        A merged model takes over the rows that the adapter added to the embedding, and so its tokenizer.
        """
        is_merge = self.request.purpose == MERGE
        return _tokenizer_folder(self.adapters[0].origin) if is_merge and self.adapters else None

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The transformers tokenizer, as its files say; raises UserError."""
        if self.base.endswith(GGUF):
            return llama_cpp.tokenizer_of(Path(self.base))
        return models_tokenizer.load_tokenizer(str(self.own_tokenizer or self.base), self.code)

    @functools.cached_property
    def chosen_template(self) -> tuple[Template, str]:
        """The template and the reason for it; raises UserError."""
        return choose_template(self.request.template, self.sources, self.tokenizer)

    @property
    def template(self) -> Template:
        return self.chosen_template[0]

    @functools.cached_property
    def versions(self) -> dict[str, Version]:
        """The commits of the base (BASE) and of the adapters (by name) that come from a hub."""
        return _versions({BASE: Path(self.base), **{each.name: each.origin for each in self.adapters}})

    @property
    def versions_by_option(self) -> dict[str, Version]:
        """The same for files that are written: the options model_path and lora_path (the first adapter)."""
        places = {"model_path": Path(self.base)}  # not by name: an adapter may have the name BASE here
        if self.adapters:
            places["lora_path"] = self.adapters[0].origin
        return _versions(places)

    def close(self) -> None:
        """Delete the copies of older adapters; nothing else becomes invalid."""
        self.copies.cleanup()

    def __enter__(self) -> "ResolvedModel":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def resolve(request: ModelRequest) -> ResolvedModel:
    """Find and check what the request names, and say which adapters and which checkpoint it came to.

    Fetches only what the user typed. Raises UserError: exit 4 for an adapter that does not belong to the base
    or is damaged, 8 for code that was not trusted, 2 for names that do not go together.
    """
    copies = tempfile.TemporaryDirectory(prefix="onecard-adapters-")
    folder = Path(copies.name)
    sources = [
        runs_adapters.find(path, name, request.checkpoint, folder) for name, path, _ in request.adapters
    ]
    adapters = [source for source in sources if not source.whole]
    name, reason = base_choice.base_name(sources, request.model_path, request.purpose == MERGE)
    for note in [note for source in sources for note in source.notes]:
        say(note)
    _check_formats(request, name, adapters)
    for adapter in adapters:
        with errors.remedy(request.code_remedy):
            remote_code.check_same(str(adapter.origin), adapter.fingerprints, request.remote_code)
    base, code = request.find_base(name)
    model = ResolvedModel(request, name, base, reason, sources, code, copies)
    for record in dict.fromkeys(source.record for source in sources):
        revisions.compare(record, model.base)
    for adapter in adapters:
        _check_belongs(model, adapter)
    for adapter in adapters:
        say(f"adapter     {adapter.name}: {adapter.origin}")
    return model


def _versions(places: dict[str, Path]) -> dict[str, Version]:
    """The commits of those folders that come from a hub."""
    commits = {name: revisions.of(path) for name, path in places.items()}
    return {name: version for name, version in commits.items() if version}


def find_folder(name: str) -> tuple[str, None]:
    """FindBase for a program that writes files and runs no code of a model."""
    return str(base_folder(name)), None


def base_folder(name: str) -> Path:
    """The folder of a base model that files are made of, its weights fetched; raises UserError."""
    folder = Path(locate.fetch_model(name))
    if not folder.is_dir():
        problem = f"--model_path {name}: there is no such folder."
        raise UserError(problem, "Name the folder of a base model, its hub name, or demo.")
    return folder


def engine_for(purpose: str, base: str) -> str:
    """The engine that reads this base: LLAMA or TRANSFORMERS."""
    return LLAMA if purpose == LLAMA or (purpose == AUTO and base.endswith(GGUF)) else TRANSFORMERS


def _check_formats(request: ModelRequest, base: str, adapters: list[Adapter]) -> None:
    """Raise UserError when the purpose cannot have these formats of files together."""
    paths = [base, *(str(adapter.folder) for adapter in adapters)]
    gguf = [path for path in paths if path.endswith(GGUF)]
    if gguf and engine_for(request.purpose, base) != LLAMA:
        problem = f"{gguf[0]} is a GGUF file, which only llama.cpp reads."
        raise UserError(problem, request.gguf_remedy)
    others = [adapter.folder for adapter in adapters if not adapter.is_gguf]
    if base.endswith(GGUF) and others:
        problem = f"{base} is a GGUF file, but the adapter {others[0]} is not."
        fix = f"Convert the adapter with {commands.name('export-gguf')},"
        raise UserError(problem, f"{fix} or name the folder of the base model with --model_path.")
    if base.endswith(GGUF) and not Path(base).is_file():
        raise UserError(f"--model_path {base}: there is no such file.", "Name a .gguf file.")


def _check_belongs(model: ResolvedModel, adapter: Adapter) -> None:
    """Compare the base with what the adapter's run recorded; the rule stands at the top of this file."""
    if not adapter.fingerprints or not Path(model.base).is_dir():
        return
    base_model.fetch_weights(model.base)
    files = base_model.identity_files(model.base)
    compared = {"base model": ("other weights", files["weights"])}
    if model.own_tokenizer is None:
        compared["tokenizer"] = ("another tokenizer", files["tokenizer"])
    for key, (difference, paths) in compared.items():
        recorded = str(adapter.fingerprints.get(key) or "")
        digest = hashing.of_folder(paths) if recorded else ""
        if digest == recorded:
            continue
        problem = f"{adapter.origin} was trained with {difference} than {model.base} has"
        sums = f"(SHA-256 {recorded[:12]}, not {digest[:12]})"
        if model.request.writes_files:
            fix = "Name the base that it was trained on with --model_path."
            raise UserError(f"{problem} {sums}.", fix, CHECKPOINT)
        if not model.request.model_path:
            fix = "Put the base's files back as they were, or name the base yourself:"
            fix = f"{fix} what --model_path names is used, with a warning."
            raise UserError(f"{problem} {sums}.", fix, CHECKPOINT)
        if key == "base model" and _is_quantised(model.base):
            problem = f"{model.base} is quantised, so it cannot be compared with what {adapter.origin} was"
            say(f"warning: {problem} trained on. It is used, because --model_path names it.")
        else:
            say(f"warning: {problem} {sums}. It is used, because --model_path names it;")
            say("         answers may be worse than those of the base that was trained on.")


def _is_quantised(folder: str) -> bool:
    values = system_files.read_json(Path(folder) / model_files.MODEL_CONFIG)
    return isinstance(values, dict) and bool(values.get("quantization_config"))


def _tokenizer_folder(adapter: Path) -> Path | None:
    """The folder with the tokenizer that an adapter brings: its own, or for a checkpoint its run's."""
    folders = [adapter, *([adapter.parent] if adapter.name.startswith("checkpoint-") else [])]
    names = models_tokenizer.TOKENIZER_FILES
    return next((folder for folder in folders if any((folder / name).is_file() for name in names)), None)


def choose_template(name: str | None, sources: list[Adapter], tokenizer: Any) -> tuple[Template, str]:
    """The template and the reason for it: asked for, saved with an adapter, the tokenizer's own, or usual."""
    if name:
        return data_template.load(name, tokenizer), "asked for"
    saved = [source for source in sources if source.template]
    if saved and (what := saved[0].template):
        template = (
            data_template.load(what, tokenizer)
            if isinstance(what, str)
            else data_template.of(what, tokenizer)
        )
        others = {str(source.template) for source in saved} - {str(what)}
        more = "; other adapters were trained with other templates" if others else ""
        return template, f"{saved[0].name} was trained with it{more}"
    if sources:
        why = f"no template is recorded with the adapter, so it is {USUAL_TEMPLATE}"
    elif not getattr(tokenizer, "chat_template", None):
        why = f"the model has no chat template, so it is {USUAL_TEMPLATE}"
    else:
        try:
            return data_template.load(data_template.AUTO, tokenizer), "the tokenizer's own"
        except UserError as error:
            why = f"the tokenizer's own cannot be used: {error.problem}"
    return data_template.load(USUAL_TEMPLATE, tokenizer), why
