"""How many steps a run that goes on has, and how its learning rate goes on.

In its own folder a run keeps its plan, or gets that of a longer run. On other rows the longer of both plans
counts, and the learning rate of the next step is that of the old schedule.
"""

import math
from typing import Any

from onecard.config import declaration
from onecard.config.declaration import OnResume
from onecard.config.training import ContinueConfig
from onecard.errors import UserError
from onecard.system.console import say
from onecard.training import run_options
from onecard.training.plan import Plan, round_up
from onecard.training.schedule import Anchor, learning_rate, progress
from onecard.training.starting_point import StartingPoint

LARGER = declaration.names(ContinueConfig, lambda option: option.resume == OnResume.LARGER)
LONGER = f"Give a larger {declaration.flags(LARGER)}"
SAME_RATE = 1e-3  # relative difference up to which two learning rates count as equal


def keep_schedule(start: StartingPoint, plan: Plan) -> None:
    """Give the plan the warm-up of the schedule that goes on, and the point where it was stretched.

    The new rows do not count here: their plan may be much shorter or longer than the old one.
    """
    if start.stored:
        resolved = start.stored["resolved"]
        plan.warmup_steps = resolved["warmup_steps"]
        plan.anchor = Anchor(*resolved["schedule_anchor"]) if "schedule_anchor" in resolved else None
    elif start.progress.step or start.planned_steps:  # an older program, which never shortened a warm-up
        options, planned = plan.options, start.planned_steps or plan.total_steps
        ratio = options.warmup_ratio
        plan.warmup_steps = options.warmup_steps if ratio is None else round_up(ratio * planned)


def keep_or_lengthen(start: StartingPoint, plan: Plan, planned: int) -> None:
    """Set the steps of a run that goes on in its own folder. Raises UserError when it is not made longer.

    planned: steps of the run so far.
    """
    if not run_options.is_longer(start.options, start.stored["options"]):
        plan.total_steps = planned
    elif plan.total_steps <= planned:
        raise UserError(f"The run is planned for {planned} steps already.", f"{LONGER}.")
    else:
        _say_longer(start, plan, planned)


def _say_longer(start: StartingPoint, plan: Plan, planned: int) -> None:
    updates, total = start.progress.updates, plan.total_steps
    old, new = _rate_of(plan, updates, planned), plan.learning_rate(updates)
    start.changes.append(f"total_steps {planned} -> {total}")
    say(f"The run is made longer: {planned} -> {total} steps. From here on the learning rate is")
    say(f"that of a run planned for {total}: {new:.3g} for the next step instead of {old:.3g}.")


def join_plans(start: StartingPoint, plan: Plan, planned: int) -> None:
    """Set the steps of a run that goes on with other rows: the longer of both plans counts.

    planned: steps of the old plan. Raises UserError when no step is left for the new rows.
    """
    step, updates, rows_alone = start.progress.step, start.progress.updates, plan.total_steps
    plan.total_steps = max(planned, rows_alone)
    if step >= plan.total_steps:
        problem = f"All {plan.total_steps} planned steps are done, so no step is left for these rows."
        raise UserError(problem, f"{LONGER}.")
    if planned > rows_alone:
        say(f"The run was planned for {planned} steps; these rows alone would give {rows_alone}.")
        say(f"It keeps {planned}, as if these rows followed the old ones: the learning rate goes on evenly.")
    elif planned < rows_alone and step >= planned:
        say(f"All {planned} steps of the old plan are done. The learning rate is now that of a run planned")
        say(f"for {rows_alone} steps: {plan.learning_rate(updates):.3g} for the next step.")
    elif planned < rows_alone:
        _stretch(plan, updates, planned)
        say(f"The run was planned for {planned} steps; with these rows it has {rows_alone}. The learning")
        say(f"rate goes on from {plan.learning_rate(updates):.3g}, and its schedule ends with the last step.")
    _say_other_rate(start, plan)


def _stretch(plan: Plan, updates: int, planned: int) -> None:
    """Let the rest of the schedule, after so many updates, take all steps of the longer plan."""
    if updates > plan.warmup_steps:  # within the warm-up nothing but the later curve changes
        plan.anchor = Anchor(updates, progress(updates, planned, plan.warmup_steps, plan.anchor))


def _rate_of(plan: Plan, updates: int, total: int) -> float:
    return learning_rate(plan.options, updates, total, plan.warmup_steps, plan.anchor)


def _say_other_rate(start: StartingPoint, plan: Plan) -> None:
    """Warn when the options give another learning rate than the one with which an older program would go on.

    Its folder does not say its options, but its optimizer has the learning rate of the next step.
    """
    if start.next_rate is None or start.progress.step >= (start.planned_steps or math.inf):
        return
    rate = plan.learning_rate(start.progress.updates)
    if not math.isclose(rate, start.next_rate, rel_tol=SAME_RATE):
        say(f"warning: {start.begun_from} was to go on with the learning rate {start.next_rate:.3g}, and")
        say(f"these options give {rate:.3g}. Give --learning_rate, --warmup_steps (or --warmup_ratio) and")
        say("--lr_scheduler as in that training.")


def record(plan: Plan) -> dict[str, Any]:
    """What finetune_config.json says of the schedule of a run; keep_schedule reads it."""
    anchor = {"schedule_anchor": list(plan.anchor)} if plan.anchor else {}
    return {"total_steps": plan.total_steps, "warmup_steps": plan.warmup_steps, **anchor}
