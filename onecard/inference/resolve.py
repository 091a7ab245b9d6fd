"""Base, adapter and template of a command: what belongs together, and what may be used unasked."""

from pathlib import Path
from typing import Any

from onecard.data import template as templates
from onecard.data.template import Template
from onecard.errors import CHECKPOINT, UserError
from onecard.hub import manifest, revisions
from onecard.runs.adapters import Adapter
from onecard.system import hashing
from onecard.system.console import say


def is_here(base: str) -> bool:
    """Whether a base that an adapter names can be had without fetching it or leaving the user's own folders.

    An adapter may come from anybody: what it names is shown, not followed to other places.
    """
    if base == manifest.DEMO:
        return True
    if "://" in base or ".." in Path(base).parts:
        return False
    return Path(base).exists() or revisions.at_hand(base) is not None


def base_of(found: Adapter | None, asked: str | None) -> str | None:
    """The base: asked for, or what the adapter names; raises UserError when that would have to be fetched.

    A hub's name without a revision is meant at the commit that was trained on, where that is written. The hub
    is asked only for what the user typed: `asked`.
    """
    if found is None or not found.base:
        return asked
    if asked and (asked == found.base or revisions.recorded(asked, found.base) != found.base):
        return asked
    here = None if Path(found.base).exists() else revisions.of_record(found.base)
    if asked and here:
        revisions.tell_move(found.base)
    elif asked:
        name, commit = revisions.split(found.base)
        say(f"hub         {name}: commit {commit}, which was trained on, is not here and is fetched")
    elif not is_here(found.base):
        name, commit = revisions.split(found.base)
        other = revisions.at_hand(name) if commit else None
        version = revisions.of(other) if other else None
        there = f"; here is {version.commit}" if version else ""
        problem = (
            f"{found.name} says that it was trained on {found.base}, which is not on this machine{there}."
        )
        fix = "Name its base with --model_path; nothing is fetched on its word."
        if commit:
            way = f"--model_path {found.base}, or {name}@main, as it is now"
            fix = f"Say which: {way}. None is fetched unasked."
        raise UserError(problem, fix)
    return here or found.base


def check_belongs(found: Adapter, base: Path, files: dict[str, list[Path]]) -> None:
    """Raise UserError (exit 4) when the run that made the adapter had another base or tokenizer.

    files: those of base_model.identity_files that have to be the same.
    """
    for name, paths in files.items():
        key = "base model" if name == "weights" else name
        before = str(found.fingerprints.get(key) or "")
        now = hashing.of_folder(paths) if before else ""
        if now != before:
            problem = f"{found.origin}: it was trained with another {key} than that of {base}"
            sums = f"SHA-256 {before[:12]}, not {now[:12]}"
            fix = "Name the base it was trained on with --model_path."
            raise UserError(f"{problem} ({sums}).", fix, CHECKPOINT)


def choose_template(asked: str | None, found: list[Adapter], tokenizer: Any) -> tuple[Template, str]:
    """The template, and why it is this one: asked for, saved with the adapter, or what is usual."""
    saved = [source for source in found if source.template]
    if asked:
        return templates.load(asked, tokenizer), "asked for"
    if saved and (what := saved[0].template):
        made = templates.load(what, tokenizer) if isinstance(what, str) else templates.of(what, tokenizer)
        others = {str(source.template) for source in saved} - {str(what)}
        more = "; other adapters were trained with another" if others else ""
        return made, f"{saved[0].name} was trained with it{more}"
    if not found and getattr(tokenizer, "chat_template", None):
        try:
            return templates.load(templates.AUTO, tokenizer), "the tokenizer's own"
        except UserError as error:
            return templates.load("alpaca", tokenizer), f"the usual one: {error.problem}"
    why = (
        "none is written with the adapter: the usual one" if found else "the model names none: the usual one"
    )
    return templates.load("alpaca", tokenizer), why
