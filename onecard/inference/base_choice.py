"""Which base model a command means: the one that the user named, one that was trained whole, or an adapter's.

An adapter may come from anybody, so a base that only an adapter names is used where it is on this machine and
is never fetched.
"""

from pathlib import Path

from onecard.errors import UserError
from onecard.hub import demo, locate, revisions
from onecard.runs.adapters import Adapter
from onecard.system.console import say


def base_name(sources: list[Adapter], model_path: str | None, is_merge: bool) -> tuple[str, str]:
    """The base's folder, file or name, and the reason for it.

    sources: what --lora_path names, adapters or a model that was trained whole; is_merge: an adapter is
    needed. Raises UserError (exit 2) when they do not name one base, or one that would have to be fetched.
    """
    whole = [source for source in sources if source.whole]
    if whole and is_merge:
        problem = f"--lora_path {whole[0].origin}: all weights were trained there, so there is no adapter."
        raise UserError(problem, f"{whole[0].folder} is the whole model already.")
    if whole and (len(sources) > 1 or model_path):
        problem = f"--lora_path {whole[0].folder}: this is a whole model, not an adapter."
        raise UserError(problem, "Name it alone, as --model_path or as --lora_path.")
    if whole:
        return str(whole[0].folder), "it was trained whole"
    naming = [source for source in sources if source.base]
    if not model_path and len({_folder_of(str(source.base)) for source in naming}) > 1:
        pairs = ", ".join(f"{source.name} on {source.base}" for source in naming)
        problem = f"--lora_path: the adapters were trained on different base models: {pairs}."
        raise UserError(problem, "Use one of them, or say with --model_path which base they share.")
    if sources and not naming and not model_path:
        problem = f"--lora_path {sources[0].origin}: the adapter does not say its base model."
        raise UserError(problem, "Name the base with --model_path.")
    name = base_of(naming[0] if naming else None, model_path)
    if name is None:
        return demo.DEMO, "nothing was named, so it is the demo model"
    return name, "asked for" if model_path else "the adapter was made with it"


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


def is_here(base: str) -> bool:
    """Whether a base that an adapter names is on this machine, in a folder that the user may have meant.

    An adapter may come from anybody: what it names is shown, and is not followed to the network or upwards.
    """
    if base == demo.DEMO:
        return True
    if "://" in base or ".." in Path(base).parts:
        return False
    return Path(base).exists() or revisions.at_hand(base) is not None
