"""The learning rate goes on where the old schedule stood, whatever the number of new rows."""

import dataclasses
import json

import pytest
import torch
from transformers import get_scheduler

from onecard.config.options import build
from onecard.config.training import ContinueConfig
from onecard.errors import UserError
from onecard.runs.checkpoint import Progress
from onecard.training import continued_plan, resume
from onecard.training import plan as training_plan
from onecard.training.starting_point import StartingPoint
from tests.support import tiny

PEAK, PLANNED = 0.3, 30  # learning rate; steps of the old plan
SCHEDULES = ("linear", "cosine", "constant")
POSITIONS = range(PLANNED)  # updates of the old plan that are done
SKIPPED = [(4, 3), (6, 3), (17, 1), (26, 3)]  # updates; further steps, which the scaler of fp16 skipped
SIZES = (1, 4, 30, 31, 48)  # new rows, which are as many steps
LIBRARY_NAMES = {"constant": "constant_with_warmup"}


def rates_of(schedule: str, warmup: int, total: int) -> list[float]:
    """The learning rate of each update by transformers.get_scheduler."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = get_scheduler(
        LIBRARY_NAMES.get(schedule, schedule), optimizer, num_warmup_steps=warmup, num_training_steps=total
    )
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.fixture(scope="module")
def request_for(tiny_model, tmp_path_factory):
    """A function from a number of rows, and further options, to a request to go on with these rows."""
    place = tmp_path_factory.mktemp("rows")
    files = {count: tiny.save_rows(place / f"{count}.json", count) for count in SIZES}

    def make(count: int, **options) -> ContinueConfig:
        paths = {"model_path": tiny_model, "data_path": files[count], "output_path": place / "run"}
        settings = {"bits": 16, "dtype": "fp32", "device": "cpu", "test_size": 0, "batch_size": 1}
        settings |= {"num_epochs": 1, "learning_rate": PEAK, **paths, **options}
        return build(ContinueConfig, {name: str(value) for name, value in settings.items()})

    return make


@pytest.fixture
def prepared_once(monkeypatch):
    """Read rows and base once for all continuations with the same options, which differ in their position."""
    plans = {}

    def prepare(options, *rest, **more) -> training_plan.Plan:
        key = str(options)
        if key not in plans:
            plans[key] = training_plan.prepare(options, *rest, **more)
        return dataclasses.replace(plans[key], fingerprints={**plans[key].fingerprints})

    monkeypatch.setattr(resume, "prepare", prepare)


def older(request: ContinueConfig, step: int, skipped: int = 0, **more) -> StartingPoint:
    """An older program's checkpoint of its step `step`."""
    options = build(request.run_settings(), fields(request))
    progress = Progress(step=step, updates=step - skipped)
    return StartingPoint(options, progress, planned_steps=PLANNED, **more)


def fields(request: ContinueConfig) -> dict:
    """The options that a run has of those of a request."""
    names = {field.name for field in dataclasses.fields(request.run_settings())}
    return {name: value for name, value in dataclasses.asdict(request).items() if name in names}


def own(request: ContinueConfig, before: training_plan.Plan, step: int, skipped: int = 0) -> StartingPoint:
    """A checkpoint of OneCard's own run with this plan."""
    resolved = {"dtype": "fp32", "device": "cpu", "gradient_checkpointing": False}
    resolved |= {"total_steps": before.total_steps, "warmup_steps": before.warmup_steps}
    stored = {"options": {}, "resolved": resolved, "fingerprints": before.fingerprints}
    options = build(request.run_settings(), fields(request))
    return StartingPoint(options, Progress(step=step, updates=step - skipped), stored=stored)


def same(rates: list[float], expected: list[float]) -> bool:
    return max(abs(one - other) for one, other in zip(rates, expected, strict=True)) < 1e-12


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_older_checkpoint_goes_on_with_the_rate_of_its_schedule(
    request_for, prepared_once, schedule, size
):
    """At every position the next rate is the old schedule's; so are all others when the plan is not longer.

    The warm-up of 20 steps is more than a fifth of any of these plans, and older programs never shortened it.
    """
    for warmup in (0, 6, 20):
        expected = rates_of(schedule, warmup, PLANNED)
        request = request_for(size, lr_scheduler=schedule, warmup_steps=warmup)
        for done, skipped in [*((done, 0) for done in POSITIONS), *SKIPPED]:
            plan = resume.make_plan(older(request, done + skipped, skipped), request, frozenset())
            last = PLANNED if size <= PLANNED else done + 1
            rates = [plan.learning_rate(update) for update in range(done, last)]
            assert same(rates, expected[done:last]), (warmup, done, skipped)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_other_rows_go_on_with_the_rate_of_the_old_schedule(request_for, prepared_once, schedule, size):
    """The same holds for OneCard's own checkpoints; the rest of a longer plan falls evenly to its end."""
    first = request_for(PLANNED, lr_scheduler=schedule, warmup_steps=6)
    before = training_plan.prepare(build(first.run_settings(), fields(first)))
    assert (before.total_steps, before.warmup_steps) == (PLANNED, 6)
    expected = rates_of(schedule, 6, PLANNED)
    request = request_for(size, lr_scheduler=schedule, warmup_steps=6)
    for done, skipped in [*((done, 0) for done in POSITIONS), *SKIPPED]:
        plan = resume.make_plan(own(request, before, done + skipped, skipped), request, frozenset())
        rates = [plan.learning_rate(update) for update in range(done, plan.total_steps)]
        assert same(rates[:1], expected[done : done + 1]), (done, skipped)
        assert len(rates) == max(size, PLANNED) - done
        last = plan.learning_rate(plan.total_steps)
        assert same([last], [PEAK if schedule == "constant" else 0.0]), (done, skipped)
        after_warmup = rates[max(0, 6 - done) :]
        assert sorted(after_warmup, reverse=True) == after_warmup


def test_a_warm_up_by_ratio_is_that_of_the_old_plan(request_for):
    """A tenth of 30 steps are 3 steps, whatever the number of new rows."""
    expected = rates_of("linear", 3, PLANNED)
    for size in SIZES:
        request = request_for(size, warmup_ratio=0.1)
        plan = resume.make_plan(older(request, 2), request, frozenset())
        assert plan.learning_rate(2) == pytest.approx(expected[2], abs=1e-12)


def test_a_stretched_schedule_goes_on_after_a_stop_and_with_more_rows(request_for):
    """The stretched curve is kept when the run goes on, and can be stretched again."""
    first = request_for(PLANNED, warmup_steps=6)
    before = training_plan.prepare(build(first.run_settings(), fields(first)))
    request = request_for(48, warmup_steps=6)
    start = own(request, before, 12)
    plan = resume.make_plan(start, request, frozenset())
    rates = [plan.learning_rate(update) for update in range(12, 48)]
    assert rates == pytest.approx([PEAK * 18 / 24 * (48 - done) / 36 for done in range(12, 48)])
    written = json.loads(json.dumps(continued_plan.record(plan)))
    again = own(request, plan, 20)
    again.stored["resolved"] |= written
    later = resume.make_plan(again, request, frozenset())
    assert [later.learning_rate(update) for update in range(20, 48)] == rates[8:]
    again = own(request_for(48, warmup_steps=6, num_epochs=2), plan, 20)
    again.stored["resolved"] |= written
    longer = resume.make_plan(again, request, frozenset())
    assert longer.total_steps == 96
    assert longer.learning_rate(20) == pytest.approx(rates[8], abs=1e-12)
    assert longer.learning_rate(58) == pytest.approx(rates[8] / 2)


def test_when_the_old_plan_is_done_the_longer_plan_counts(request_for, capsys):
    """Nothing would be learned with the rate at the end of the old schedule; the new rate is said.

    Its steps are done even if fp16 skipped a few: what its schedule has left then is next to nothing, and
    training all new rows with it would teach nothing.
    """
    request = request_for(48, warmup_steps=6)
    plan = resume.make_plan(older(request, PLANNED), request, frozenset())
    assert plan.learning_rate(PLANNED) == pytest.approx(PEAK * 18 / 42)
    assert "All 30 steps of the old plan are done." in capsys.readouterr().out
    plan = resume.make_plan(older(request, PLANNED, skipped=2), request, frozenset())
    assert plan.learning_rate(PLANNED - 2) == pytest.approx(PEAK * 20 / 42)
    assert "All 30 steps of the old plan are done." in capsys.readouterr().out
    request = request_for(4, warmup_steps=6)
    with pytest.raises(UserError, match="All 30 planned steps are done"):
        resume.make_plan(older(request, PLANNED), request, frozenset())


def test_options_that_give_another_rate_are_named(request_for, capsys):
    """An older checkpoint does not say its options, but its optimizer says the next learning rate."""
    request = request_for(4, warmup_steps=6)
    resume.make_plan(older(request, 3, next_rate=PEAK / 2), request, frozenset())
    assert "warning" not in capsys.readouterr().out
    resume.make_plan(older(request, 3, next_rate=2e-5, begun_from="old"), request, frozenset())
    output = capsys.readouterr().out
    assert "old was to go on with the learning rate 2e-05" in output
    assert "these options give 0.15" in output
