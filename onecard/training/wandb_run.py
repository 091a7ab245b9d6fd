"""The run at Weights & Biases of a run folder: the same one whenever the run goes on.

Its id lies in the run folder. W&B takes only growing steps of its own, and a run that goes on may repeat
steps; so the optimizer step is a value among others, which the plots have as their axis.
"""

import netrc
import os
import uuid
from pathlib import Path
from typing import Any

from onecard.errors import UserError
from onecard.runs import log as runs_log
from onecard.runs.folder import WANDB
from onecard.system import commands
from onecard.system import files as system_files
from onecard.system.console import say

STEP = "step"  # key of the optimizer step in what is sent


def start(folder: Path, settings: dict[str, Any]) -> Any:
    """Begin a W&B run, or go on with the one of this run folder. Raises UserError when that fails.

    With WANDB_MODE=offline each start of the program writes a part of the run into `folder`; `wandb sync`
    joins them.
    """
    check()
    import wandb

    path, step = folder / WANDB, runs_log.last_step(folder)
    earlier = _earlier_id(path)
    run_id = earlier or uuid.uuid4().hex
    if step and not earlier and (folder / "wandb").is_dir():
        say(f"There is no {WANDB} that says which W&B run has the earlier steps, so another W&B run begins.")
    if not earlier:  # it is written first, so that no kill can lose it
        system_files.write_json(path, {"id": run_id})
    names = {"project": "onecard", "name": folder.name, "dir": str(folder)}
    try:
        run = wandb.init(**names, id=run_id, resume="allow", config=settings, allow_val_change=True)
        run.define_metric(STEP)
        run.define_metric("*", step_metric=STEP)
    except wandb.errors.Error as error:
        fix = f"{_login()} For a new W&B run, delete {path}." if earlier else _login()
        raise UserError(f"--wandb: Weights & Biases did not start: {error}", fix) from None
    sent = run.summary.get(STEP) if earlier else None
    if isinstance(sent, int) and sent > step:
        say(f"W&B has steps up to {sent}. Those after {step} are repeated, and its plots show them twice.")
    return run


def _earlier_id(path: Path) -> str | None:
    """The id of the W&B run of this run folder. Raises UserError when the file is damaged."""
    fix = "Delete this file: another W&B run begins then."
    stored = system_files.read_json(path, fix)
    if stored is None:
        return None
    run_id = stored.get("id") if isinstance(stored, dict) else None
    if not isinstance(run_id, str):
        raise UserError(f"{path}: this file does not say the id of a W&B run.", fix)
    return run_id


def check() -> None:
    """Raise UserError when W&B is not installed or nobody is logged in."""
    import importlib.util

    if importlib.util.find_spec("wandb") is None:
        fix = f"Run: {commands.extra('wandb')}"
        raise UserError("--wandb needs the package wandb, which is not installed.", fix)
    if os.environ.get("WANDB_MODE", "online") == "online" and not os.environ.get("WANDB_API_KEY"):
        try:
            hosts = netrc.netrc().hosts
        except (OSError, netrc.NetrcParseError):
            hosts = {}
        if not any("wandb" in host for host in hosts):
            raise UserError("--wandb: this machine is not logged in to Weights & Biases.", _login())


def _login() -> str:
    """How to log in, or to do without; for an error message."""
    return f"Run {commands.in_environment('wandb')} login, or set WANDB_MODE=offline."
