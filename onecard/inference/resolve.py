"""One resolver: what the user named -> base model, adapters, tokenizer, template, trusted code and versions.

Chat, perplexity, export and merge all ask here, so that they cannot answer differently.

Which base? The one that --model_path names; otherwise the model that was trained whole, or the base that the
adapter names. An adapter may come from anybody, so a base that only an adapter names is used where it is on
this machine and is never fetched.

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
from onecard.config.generation import BASE, ActiveAdapters
from onecard.data import template as data_template
from onecard.data.template import Template
from onecard.errors import CHECKPOINT, UserError
from onecard.hub import demo, locate, model_files, remote_code, revisions
from onecard.hub.remote_code import TrustedCode
from onecard.hub.revisions import Version
from onecard.inference import llama_cpp
from onecard.models import base_model
from onecard.models import tokenizer as models_tokenizer
from onecard.runs import adapters as runs_adapters
from onecard.runs.adapters import GGUF, Adapter, AdapterPath
from onecard.system import commands, hashing
from onecard.system import files as system_files
from onecard.system.console import say

AUTO, TRANSFORMERS, LLAMA = "auto", "transformers", "llama.cpp"  # purposes: an engine is to answer
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
        places = {BASE: Path(self.base), **{adapter.name: adapter.origin for adapter in self.adapters}}
        commits = {name: revisions.of(path) for name, path in places.items()}
        return {name: version for name, version in commits.items() if version}

    @property
    def versions_by_option(self) -> dict[str, Version]:
        """The same for files that are written: the options model_path and lora_path (the first adapter)."""
        places = {"model_path": Path(self.base)}  # not by name: an adapter may have the name BASE here
        if self.adapters:
            places["lora_path"] = self.adapters[0].origin
        commits = {option: revisions.of(path) for option, path in places.items()}
        return {option: version for option, version in commits.items() if version}

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
    name, reason = _base_name(request, sources)
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


def is_here(base: str) -> bool:
    """Whether a base that an adapter names is on this machine, in a folder that the user may have meant.

    An adapter may come from anybody: what it names is shown, and is not followed to the network or upwards.
    """
    if base == demo.DEMO:
        return True
    if "://" in base or ".." in Path(base).parts:
        return False
    return Path(base).exists() or revisions.at_hand(base) is not None


def _base_name(request: ModelRequest, sources: list[Adapter]) -> tuple[str, str]:
    """The base's folder, file or name, and the reason for it."""
    whole = [source for source in sources if source.whole]
    if whole and request.purpose == MERGE:
        problem = f"--lora_path {whole[0].origin}: all weights were trained there, so there is no adapter."
        raise UserError(problem, f"{whole[0].folder} is the whole model already.")
    if whole and (len(sources) > 1 or request.model_path):
        problem = f"--lora_path {whole[0].folder}: this is a whole model, not an adapter."
        raise UserError(problem, "Name it alone, as --model_path or as --lora_path.")
    if whole:
        return str(whole[0].folder), "it was trained whole"
    naming = [source for source in sources if source.base]
    if not request.model_path and len({_folder_of(str(source.base)) for source in naming}) > 1:
        pairs = ", ".join(f"{source.name} on {source.base}" for source in naming)
        problem = f"--lora_path: the adapters were trained on different base models: {pairs}."
        raise UserError(problem, "Use one of them, or say with --model_path which base they share.")
    if sources and not naming and not request.model_path:
        problem = f"--lora_path {sources[0].origin}: the adapter does not say its base model."
        raise UserError(problem, "Name the base with --model_path.")
    name = base_of(naming[0] if naming else None, request.model_path)
    if name is None:
        return demo.DEMO, "nothing was named, so it is the demo model"
    return name, "asked for" if request.model_path else "the adapter was made with it"


def base_of(adapter: Adapter | None, model_path: str | None) -> str | None:
    """The base: asked for, or what the adapter names; raises UserError when that would have to be fetched.

    A hub's name without a revision is meant at the commit that was trained on, where that is written. The hub
    is asked only for what the user typed: `model_path`.
    """
    if adapter is None or not adapter.base:
        return model_path
    is_other = model_path and revisions.recorded(model_path, adapter.base) != adapter.base
    if is_other or model_path == adapter.base:
        return model_path
    here = None if Path(adapter.base).exists() else revisions.at_hand(adapter.base)
    if here:
        revisions.say_commit(here)
    if model_path and here:
        revisions.tell_move(adapter.base)
    elif model_path:
        name, commit = revisions.split(adapter.base)
        say(f"hub         {name}: commit {commit}, which was trained on, is not here and is fetched")
    elif not is_here(adapter.base):
        raise _not_here(adapter)
    return str(here or adapter.base)


def _not_here(adapter: Adapter) -> UserError:
    """The error for a base that only the adapter names, and that is not on this machine."""
    name, commit = revisions.split(str(adapter.base))
    other = revisions.at_hand(name) if commit else None
    version = revisions.of(other) if other else None
    problem = f"{adapter.name} says that it was trained on {adapter.base}, which is not on this machine"
    problem += f"; here is {version.commit}." if version else "."
    if not commit:
        return UserError(problem, "Name its base with --model_path: an adapter's word alone fetches nothing.")
    choices = f"--model_path {adapter.base}, or --model_path {name}@main for the newest commit"
    return UserError(problem, f"Say which commit you want: {choices}. An adapter's word alone fetches none.")


def _folder_of(base: str) -> str:
    """The folder that a name means, so that two names of one folder are one base; fetches nothing."""
    folder = Path((locate.here(base) if is_here(base) else None) or base).expanduser()
    return str(folder.resolve()) if folder.is_dir() else base


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
