"""Decides which run continues, from where and with which options, before weights are loaded.

A run continues in its own folder, with the same rows and bit for bit as if it had not stopped; or in a new
folder with other rows, where optimizer and learning rate go on; or an adapter alone starts a new run. Nothing
is written here, except that a save that was killed between its two renames is completed.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from onecard import errors
from onecard.config import declaration
from onecard.config.training import ContinueConfig, FinetuneConfig
from onecard.errors import CHECKPOINT, UserError
from onecard.hub import locate, remote_code, revisions
from onecard.runs import checkpoint as runs_checkpoint
from onecard.runs import folder as runs_folder
from onecard.runs import legacy, log_check
from onecard.runs.checkpoint import Progress
from onecard.system import commands, hardware, lock
from onecard.system import files as system_files
from onecard.system import processes as system_processes
from onecard.system.console import say
from onecard.training import continued_plan, recorded_names, run_options, warm_start
from onecard.training.continued_plan import LONGER
from onecard.training.plan import Plan, prepare, versions
from onecard.training.starting_point import STARTING, StartingPoint, finished_before, say_finished

ANOTHER_RUN = f"Bring back a copy of this file, or start another run with {commands.name('finetune')}."


def decide(request: ContinueConfig, explicit: frozenset[str]) -> StartingPoint | None:
    """The point to continue from; None when the run is finished, which is printed.

    explicit: names of the options that the user gave; the others stay as the run has them. Raises
    UserError (exit 4) when a checkpoint is damaged or does not belong to these options.
    """
    if request.overwrite:
        raise UserError(
            "--overwrite: a run cannot continue and start anew at the same time.",
            f"Use {commands.name('finetune')}.",
        )
    if "lora_path" in explicit:
        raise UserError(
            "--lora_path starts a new run, and this program continues one.",
            f"Use {commands.name('finetune')}, or name it with --resume_from_checkpoint.",
        )
    if request.lora_remote_checkpoint and request.resume_from_checkpoint:
        raise UserError("Give --resume_from_checkpoint or --lora_remote_checkpoint, not both.")
    name = request.resume_from_checkpoint
    if request.lora_remote_checkpoint:
        name = locate.fetch_adapter(request.lora_remote_checkpoint)
    output = Path(request.output_path) if "output_path" in explicit or name is None else None
    if name is None:
        return _same_run(output, None, request, explicit)
    source = Path(name)
    if not source.is_dir():
        raise UserError(f"--resume_from_checkpoint {source}: no such folder.", "Name a folder.", CHECKPOINT)
    if (source / runs_folder.CONFIG).is_file():  # the folder of a run
        if output is None or output.resolve() == source.resolve():
            return _same_run(source, None, request, explicit)
        source, problems = runs_checkpoint.newest(source)
        _say_damaged(problems)
        if source is None:
            fix = "Name another run, or an adapter."
            raise UserError(f"{name}: this run has no undamaged checkpoint.", fix, CHECKPOINT)
    if (source / runs_checkpoint.MANIFEST).is_file() and (source.parent / runs_folder.CONFIG).is_file():
        if output is None or output.resolve() == source.parent.resolve():
            return _same_run(source.parent, source, request, explicit)
        return _other_rows(source, request, explicit)
    if output is None:
        fix = "Name a new folder for the run with --output_path."
        raise UserError(f"{source}: this is an adapter, not a run that could continue.", fix)
    if legacy.is_legacy(source):
        return warm_start.from_older(source, request, explicit)
    return warm_start.from_adapter(source, request, explicit)


def make_plan(start: StartingPoint, request: ContinueConfig, explicit: frozenset[str]) -> Plan:
    """The plan of a run that continues. Raises UserError (exit 4) when rows or base have changed.

    explicit: names of the options that the user gave; of names on the hub only these may be downloaded.
    """
    resolved = start.stored["resolved"] if start.stored else {}
    options = start.options
    if start.same_run and options.device == "auto" and resolved["device"] == "cpu":
        options = dataclasses.replace(options, device="cpu")  # a GPU that was added later is not used unasked
    hub_names = recorded_names.NEW_NAMES
    if start.stored:
        _check_code(start, options)
        hub_names = recorded_names.Names(start.stored, recorded_names.typed(request, explicit))
    before = _resolved_before(options, resolved)
    plan = prepare(options, hub_names, before, again=request.verify)
    revisions.compare(resolved.get("base") or start.base, plan.base_path)
    plan.options = start.options
    if start.stored:
        _check_same(start, plan)
        weights_print = start.stored["fingerprints"].get(STARTING)
        plan.fingerprints |= {STARTING: weights_print} if weights_print and start.same_run else {}
    elif start.progress.step and not request.from_data_beginning:  # an older checkpoint
        start.progress.rows_seen = plan.rows_after(start.progress.step)
    continued_plan.keep_schedule(start, plan)
    planned = resolved.get("total_steps") or start.planned_steps or plan.total_steps
    if start.same_run:
        _announce(start, plan, resolved)
        continued_plan.keep_or_lengthen(start, plan, planned)
        return plan
    if resolved and resolved["dtype"] != plan.dtype:
        say(f"Changed: dtype {resolved['dtype']} -> {plan.dtype}.")
    continued_plan.join_plans(start, plan, planned)
    return plan


def _same_run(
    folder: Path, chosen: Path | None, request: ContinueConfig, explicit: frozenset[str]
) -> StartingPoint | None:
    stored = _read_run(folder)
    before = run_options.options_of(stored, request)
    if before.max_steps and "num_epochs" in explicit and "max_steps" not in explicit:
        before = dataclasses.replace(before, max_steps=None, num_epochs=0)  # max_steps counted so far
    options, changes = run_options.merged(before, request, explicit, run_options.fixed_in_same_run)
    options = dataclasses.replace(options, output_path=str(folder))  # the folder may have moved
    finished = system_files.read_json(folder / runs_folder.FINISHED, ANOTHER_RUN)
    begun_from = stored.get("begun_from")
    start = StartingPoint(
        options, Progress(), stored=stored, same_run=True, begun_from=begun_from, changes=changes
    )
    is_longer = run_options.is_longer(options, stored["options"])
    if finished and request.from_data_beginning and not is_longer:
        problem = (
            f"{folder}: all {finished['steps']} planned steps are done, so no step is left for the rows."
        )
        raise UserError(problem, f"{LONGER} too.")
    earlier = chosen and finished and runs_checkpoint.read_progress(chosen).step < finished["steps"]
    if finished and not (is_longer or earlier):
        say_finished(folder, finished)
        return None
    with errors.remedy("Wait for it, or stop it."):
        lock.check_free(folder)
    runs_checkpoint.finish_rename(folder)
    if chosen is None:
        chosen, problems = runs_checkpoint.newest(folder)
        _say_damaged(problems)
        if problems and chosen is None:
            fix = f"Start anew: {commands.name('finetune')} --overwrite --output_path {folder}"
            raise UserError(f"{folder}: all checkpoints are damaged.", fix, CHECKPOINT)
    else:
        _verify_chosen(chosen, folder)
    if chosen is None and begun_from:
        problem = f"{folder}: the run from {begun_from} stopped before its first save, so it cannot continue."
        raise UserError(problem, "Repeat the command that began it, with --overwrite.", CHECKPOINT)
    if chosen is None:
        say("Nothing was saved yet, so the run starts from its first step.")
        start.progress.micro_batch_tokens = stored["resolved"]["micro_batch_tokens"]
    else:
        start.checkpoint, start.progress = chosen, runs_checkpoint.read_progress(chosen)
        say(f"Continuing from {chosen} (step {start.progress.step} of {stored['resolved']['total_steps']}).")
        _check_log(folder, chosen, start)
    budget = options.micro_batch_tokens
    if "micro_batch_tokens" in explicit and budget != "auto":
        lowered = start.progress.micro_batch_tokens  # when memory ran out, perhaps
        if budget == before.micro_batch_tokens != lowered:
            changes.append(f"micro_batch_tokens {lowered} -> {budget}")
        start.progress.micro_batch_tokens = budget
    elif budget != before.micro_batch_tokens:  # auto now: it will be estimated again
        start.progress.micro_batch_tokens = 0
    if request.from_data_beginning:
        start.progress.rows_seen = 0
        changes.append("the rows start from the beginning; adapter, optimizer and learning rate go on")
    return start


def _check_log(folder: Path, chosen: Path, start: StartingPoint) -> None:
    """Raise UserError (exit 4) when the log lacks steps that the checkpoint has."""
    begun_at = start.stored["resolved"].get("begun_at", None if start.begun_from else 0)
    problem = log_check.problem(folder, start.progress, begun_at)
    if problem:
        ways = ["Bring back a copy of it"]
        earlier = log_check.covered(folder, start.progress.step, begun_at)
        if earlier:
            ways.append(f"go on from an earlier step: --resume_from_checkpoint {earlier}")
        ways.append(f"begin a new run with what {chosen.name} has learned: --resume_from_checkpoint {chosen}")
        fix = f"{'; or '.join(ways)} --output_path NEW_FOLDER."
        raise UserError(f"{folder / runs_folder.LOG} {problem}; {chosen} needs it.", fix, CHECKPOINT)


def _other_rows(source: Path, request: ContinueConfig, explicit: frozenset[str]) -> StartingPoint | None:
    _verify_chosen(source, source.parent)
    stored = _read_run(source.parent)
    before = run_options.options_of(stored, request)
    options, _ = run_options.merged(before, request, explicit, run_options.fixed_with_other_rows)
    options = dataclasses.replace(options, output_path=request.output_path)
    if finished_before(options, Path(request.output_path)):
        return None
    old = runs_checkpoint.read_progress(source)
    progress = Progress(step=old.step, updates=old.updates)
    say(f"Adapter, optimizer and learning rate go on from {source}, with the rows of {options.data_path}.")
    return StartingPoint(options, progress, source, stored=stored, begun_from=str(source))


def _read_run(folder: Path) -> dict[str, Any]:
    stored = system_files.read_json(folder / runs_folder.CONFIG, ANOTHER_RUN)
    if stored is None:
        fix = f"Start it (again) with {commands.name('finetune')}, or name the --output_path of another run."
        problem = f"{folder} holds no run: none was started there, or it stopped before its first checkpoint."
        raise UserError(problem, fix, CHECKPOINT)
    try:
        stored["options"], stored["resolved"]["total_steps"], stored["fingerprints"]
    except (KeyError, TypeError):
        problem = f"{folder / runs_folder.CONFIG} is damaged, or another program has written it."
        raise UserError(problem, ANOTHER_RUN, CHECKPOINT) from None
    return stored


def _check_code(start: StartingPoint, options: FinetuneConfig) -> None:
    """Raise UserError unless the user consents to the same code of the base as when the run began."""
    before = start.stored["fingerprints"]
    with errors.remedy(remote_code.READ_FIRST):
        remote_code.check_same("The run that goes on", before, options.remote_code)
    if options.remote_code and not before.get(remote_code.PRINT):
        problem = "--remote_code: the run's base was loaded without code of its own."
        raise UserError(
            problem, f"Leave it out, or start another run with {commands.name('finetune')}.", CHECKPOINT
        )


def _resolved_before(options: FinetuneConfig, resolved: dict[str, Any]) -> dict[str, Any]:
    """What `auto` became when the run began, to be used again; another GPU may swap bf16 and fp16."""
    if not resolved:
        return {}
    values = {}
    if options.gradient_checkpointing == "auto":
        values["gradient_checkpointing"] = resolved["gradient_checkpointing"]
    if options.dtype == "auto":
        with errors.remedy(hardware.ON_CPU, beside=True):
            device = hardware.choose_device(options.device, system_processes.local_rank()).value
        devices = hardware.devices_together(device, system_processes.local_world_size())
        now = hardware.choose_dtype("auto", *devices).value
        if device == "cpu" or {now, resolved["dtype"]} != {"bf16", "fp16"}:
            values["dtype"] = resolved["dtype"]
    return values


def _check_same(start: StartingPoint, plan: Plan) -> None:
    """Raise UserError (exit 4) when the tokenizer or the base, or in the same run the rows, have changed."""
    before = start.stored["fingerprints"]
    rows = ("rows", "encoded rows")
    compared = [name for name in plan.fingerprints if start.same_run or name not in rows]
    contents = declaration.declared(type(plan.options)).items()
    sources = {option.content: getattr(plan.options, name) for name, option in contents if option.content}
    wrong = [
        f"{name}{f' ({sources[name]})' if name in sources else ''}: "
        f"{str(before.get(name))[:12]} -> {plan.fingerprints[name][:12]}"
        for name in compared
        if before.get(name) != plan.fingerprints[name]
    ]
    if wrong:
        problem = f"What the run was trained with has changed since it began (SHA-256): {'; '.join(wrong)}."
        fix = "Bring the old files back, or go on with other rows in a new --output_path."
        raise UserError(problem, fix, CHECKPOINT)


def _announce(start: StartingPoint, plan: Plan, resolved: dict[str, Any]) -> None:
    """Add what differs on this machine to the changes, and print all of them."""
    now = {
        "device": plan.device,
        "device_name": hardware.device_name(plan.device),
        "dtype": plan.dtype,
        "processes": system_processes.world_size(),
        "threads": torch.get_num_threads(),
        **versions(),
    }
    before = {"device_name": now["device_name"], **resolved, **start.stored["versions"]}
    start.changes += [f"{name} {before[name]} -> {now[name]}" for name in now if before[name] != now[name]]
    if start.changes:
        say(f"Changed: {'; '.join(start.changes)}.")
        say("The gradient is the same up to rounding, but the dropout masks differ: the run does not go on")
        say("bit for bit as it would have without these changes.")


def _verify_chosen(chosen: Path, folder: Path) -> None:
    try:
        unknown = runs_checkpoint.verify(chosen)
    except UserError as error:
        other, _ = runs_checkpoint.newest(folder)
        fix = f"The newest undamaged one is {other}." if other else "This run has no undamaged checkpoint."
        raise UserError(error.problem, fix, CHECKPOINT) from None
    if unknown:
        say(f"{chosen}: {', '.join(unknown)} did not come from OneCard and is ignored.")


def _say_damaged(problems: list[str]) -> None:
    for problem in problems:
        say(f"damaged: {problem}")
