"""A program: mutants that cosmic-ray makes of the core of OneCard, and how many of them the tests notice.

    .venv/bin/python -m pip install cosmic-ray==8.7.0
    .venv/bin/python -m tests.mutation PLACE [--mutants 330] [--seed 0] [--processes 1] [--again]

PLACE is a new folder for the session and for copies of the tree: only copies are mutated. A program that was
stopped goes on when it is called again. --again takes the tests as they are now and tries the mutants that
survived once more.

This process imports the libraries once. A forked child then runs the tests of one mutant until one fails:
those that ran the mutated line when all of them ran once without a mutant, the quickest first. Tests that
start other programs, and tests that took longer than LONGEST seconds, are left out. A mutant is killed when a
test fails, or when the tests take several times as long as without it. When pytest itself ends in an error
it is not judged, and neither are the mutants of a file some test of which fails without a mutant.

The draw leaves out annotations, and of several mutants of one kind at one place (`a < b` becoming `a <= b`,
`a > b` and so on) it holds one: most of the others would die of a TypeError and flatter the share.
"""

import argparse
import ast
import collections
import compileall
import functools
import importlib
import json
import os
import py_compile
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tenacity

from tests.support import warm_pytest
from tests.support.paths import ROOT
from tests.support.warm_pytest import LINES, Tests

FILES = {  # file of onecard/ -> files of tests/ about it
    "data/encode": ["data/test_encode.py", "data/test_end_token.py"],
    "data/packing": ["data/test_examples.py", "training/test_step.py"],
    "inference/decoding": ["inference/test_decoding.py", "inference/test_detokenizer.py"],
    "models/adapter": ["models/test_adapters.py", "models/test_frozen.py", "runs/test_adapter_paths.py"],
    "runs/adapters": [
        "runs/test_find_adapter.py",
        "runs/test_adapter_paths.py",
        "runs/test_legacy.py",
        "inference/test_resolve.py",
    ],
    "runs/checkpoint": ["runs/test_checkpoint.py", "runs/test_checkpoint_content.py"],
    "system/http_guard": ["system/test_http_guard.py"],
    "training/loop": [
        "training/test_run.py",
        "training/test_out_of_memory.py",
        "training/test_resume.py",
        "training/test_train_what.py",
    ],
    "training/plan": [
        "training/test_plan.py",
        "training/test_step.py",
        "training/test_train_what.py",
        "data/test_markers.py",
        "safety/test_bad_input.py",
        "training/test_run.py",
    ],
    "training/resume": ["training/test_resume.py", "runs/test_legacy.py"],
    "training/step": ["training/test_step.py", "training/test_run.py", "training/test_out_of_memory.py"],
    "ui/guard": ["ui/test_exposure.py"],
}
WORDS = {True: "killed", False: "SURVIVED", None: "NOT JUDGED"}
FAILED = (1, 2)  # exit codes of pytest when a test fails, and when a file of tests cannot be imported
NOT_MADE = 3  # in place of an exit code of pytest; its own 3 is an error within pytest
LONGEST = 20.0  # seconds
MOST = 60.0  # seconds of all tests of one mutant together
LOCKED = 120.0  # seconds that another process may keep the session locked
LEAST = 10  # mutants of each file, if it has so many
LIBRARIES = """accelerate anyio bitsandbytes deepspeed fastapi gradio numpy peft pyarrow pytest readline
    safetensors.torch sentencepiece torch tqdm transformers uvicorn peft.tuners.lora.bnb
    peft.utils.transformers_weight_conversion transformers.models.llama.modeling_llama"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("place", type=Path, help="folder of the session")
    parser.add_argument("--mutants", type=int, default=330, help="size of the sample")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw")
    parser.add_argument("--processes", type=int, default=1, help="mutants at a time")
    parser.add_argument("--only", nargs="*", default=[*FILES], help="files of onecard/, without .py")
    parser.add_argument("--again", action="store_true", help="try the survivors with the tests of today")
    args = parser.parse_args()
    os.environ.update(
        OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1", HF_HUB_OFFLINE="1", WANDB_MODE="offline"
    )
    sys.dont_write_bytecode = True  # Python would take that of a source that changed within a second
    place = args.place.resolve()
    place.mkdir(parents=True, exist_ok=True)
    for name in LIBRARIES.split():
        try:
            importlib.import_module(name)
        except ImportError as error:
            print(f"not imported: {error}")
    copy_tree(place / "tree", args.again)
    draw(place, args.mutants, args.seed)
    if args.again:
        forget_survivors(place)
    trees = [place / f"tree-{number}" for number in range(args.processes)]
    for tree in trees:
        shutil.copytree(place / "tree", tree, symlinks=True, dirs_exist_ok=True)
    share_out(trees, list(args.only), lambda tree, files: survey_all(place, tree, files))
    share_out(trees, pending(place, args.only), lambda tree, jobs: try_all(place, tree, jobs))
    report(place)


def copy_tree(tree: Path, tests_again: bool) -> None:
    """Copy the files that git knows; where an older copy is, nothing, or with tests_again its tests."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, stdout=subprocess.PIPE
    )
    is_new = not tree.exists()
    for name in listed.stdout.decode().split("\n"):
        if (ROOT / name).is_file() and (is_new or (tests_again and name.startswith("tests/"))):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tree / name)
    # bytecode that counts only while the source has the same hash, whatever the times of the files are
    compileall.compile_dir(tree, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)


def draw(place: Path, count: int, seed: int) -> None:
    """Fill a new session with a sample of the mutants, in proportion to the places that each file has."""
    from cosmic_ray.commands import init as cosmic_init
    from cosmic_ray.work_db import use_db

    if (place / "session.sqlite").exists():
        return
    with use_db(place / "all.sqlite") as everything:
        cosmic_init([place / "tree/onecard" / f"{name}.py" for name in FILES], everything, {})
        items = everything.work_items
    places: dict[str, dict[Any, list[Any]]] = collections.defaultdict(lambda: collections.defaultdict(list))
    for item in sorted(items, key=lambda item: sort_key(item.mutations[0])):
        mutation = item.mutations[0]
        spans = annotations(mutation.module_path)
        if not any(start <= mutation.start_pos and mutation.end_pos <= end for start, end in spans):
            kind = mutation.operator_name.split("_")[0]
            places[str(mutation.module_path)][mutation.start_pos, kind].append(item)
    choice, drawn = random.Random(seed), []
    total = sum(map(len, places.values()))
    for kinds in places.values():
        one_each = [choice.choice(alike) for alike in kinds.values()]
        share = max(LEAST, round(count * len(one_each) / total))
        drawn += choice.sample(one_each, min(share, len(one_each)))
    with use_db(place / "unfinished.sqlite") as session:
        session.add_work_items(drawn)
    (place / "unfinished.sqlite").rename(place / "session.sqlite")
    print(f"{len(drawn)} of {len(items)} mutants at {total} places", flush=True)


def sort_key(mutation: Any) -> tuple[str, Any, str, int]:
    return str(mutation.module_path), mutation.start_pos, mutation.operator_name, mutation.occurrence


@functools.cache
def annotations(path: Path) -> list[tuple[Any, Any]]:
    """Beginnings and ends, as (line, column), of the annotations in a file."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    types_of = [getattr(node, "annotation", None) or getattr(node, "returns", None) for node in nodes]
    return [((n.lineno, n.col_offset), (n.end_lineno, n.end_col_offset)) for n in types_of if n]


def share_out(trees: list[Path], items: list[Any], work: Callable[[Path, list[Any]], None]) -> None:
    """Let one process per tree do its share of the work; raises SystemExit when one fails."""
    children = []
    for number, tree in enumerate(trees):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                work(tree, items[number :: len(trees)])
                code = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stdout.flush()
                os._exit(code)
        children.append(pid)
    statuses = [os.waitpid(pid, 0)[1] for pid in children]
    if any(statuses):
        sys.exit("error: a process failed")


# Tests without a mutant


def survey_all(place: Path, tree: Path, files: list[str]) -> None:
    """Write the quick tests of each file, with their seconds and lines, unless that is done already."""
    for name in files:
        result = list_of_tests(place, name)
        if result.exists():
            continue

        def work(name: str = name, result: Path = result) -> int:
            tests = warm_pytest.survey(tree / "onecard" / f"{name}.py", FILES[name])
            quick = {test: value for test, value in tests.items() if value[0] <= LONGEST}
            result.write_text(json.dumps(quick), encoding="utf-8")
            print(f"{len(quick)} of {len(tests)} tests that pass are quick")
            return 0 if quick else 1

        code, output = warm_pytest.in_child(tree, 1800, work)
        if code != 0:
            result.unlink(missing_ok=True)
            sys.exit(f"error: no test of {name} passes without a mutant.\n{output[-3000:]}")
        print(f"{name}: {output.strip().splitlines()[-1]}", flush=True)


def list_of_tests(place: Path, name: str) -> Path:
    return place / f"{name.replace('/', '-')}.json"


# Mutants


def pending(place: Path, only: list[str]) -> list[Any]:
    from cosmic_ray.work_db import use_db

    with use_db(place / "session.sqlite") as session:
        items = [item for item in session.pending_work_items if file_of(item) in only]
    return sorted(items, key=lambda item: random.Random(str(sort_key(item.mutations[0]))).random())


def file_of(item: Any) -> str:
    return path_name(item.mutations[0].module_path)


def path_name(path: str | Path) -> str:
    """data/encode for .../onecard/data/encode.py."""
    return "/".join(Path(path).with_suffix("").parts[-2:])


def try_all(place: Path, tree: Path, items: list[Any]) -> None:
    """Try one mutant after the other, and record each result in the session."""
    from cosmic_ray import mutating, plugins, work_item

    sound: dict[str, bool] = {}
    for number, item in enumerate(items):
        name, mutation = file_of(item), item.mutations[0]
        path = tree / "onecard" / f"{name}.py"
        everything = json.loads(list_of_tests(place, name).read_text(encoding="utf-8"))
        if name not in sound:
            sound[name] = passes(tree, everything)
        if not sound[name]:
            print(f"{number + 1}/{len(items)} NOT JUDGED {where(item)}: a test fails without a mutant")
            continue
        tests = choose(everything, path, mutation)
        started, operator = time.monotonic(), plugins.get_operator(mutation.operator_name)()
        original, diff = path.read_bytes(), ""
        try:
            with mutating.use_mutation(path, operator, mutation.occurrence) as (old, new):
                code, output = run_tests(tree, tests)
            diff = "\n".join(mutating._make_diff(old, new, name))
        except AttributeError as error:  # cosmic-ray cannot replace `except a.b`, for example
            path.write_bytes(original)
            code, output = NOT_MADE, f"cosmic-ray could not make it: {error}"
        verdict = judged(code)
        output = "timeout" if code is None else output[-2000:]
        worker = work_item.WorkerOutcome.EXCEPTION if verdict is None else work_item.WorkerOutcome.NORMAL
        outcomes = {
            True: work_item.TestOutcome.KILLED,
            False: work_item.TestOutcome.SURVIVED,
            None: work_item.TestOutcome.INCOMPETENT,
        }
        result = work_item.WorkResult(worker, output, outcomes[verdict], diff)
        record(place, item.job_id, result)
        print(
            f"{number + 1}/{len(items)} {WORDS[verdict]} {where(item)} "
            f"{len(tests)} tests, {time.monotonic() - started:.0f} s",
            flush=True,
        )


def record(place: Path, job: str, result: Any) -> None:
    """Write a result into the session, once no other process or reader has it locked."""
    from cosmic_ray.work_db import use_db
    from sqlalchemy.exc import OperationalError

    patience = tenacity.stop_after_delay(LOCKED)
    for attempt in tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(OperationalError), stop=patience, wait=tenacity.wait_fixed(0.5)
    ):
        with attempt, use_db(place / "session.sqlite") as session:
            session.set_result(job, result)


def passes(tree: Path, tests: Tests) -> bool:
    """Whether all these tests pass as they run for a mutant, but without one."""
    code, output = run_tests(tree, tests)
    if code != 0:
        print(output[-2000:], flush=True)
    return code == 0


def run_tests(tree: Path, tests: Tests) -> tuple[int | None, str]:
    """What warm_pytest.in_child returns for these tests, up to the first that fails."""
    files = sorted({test.split("::")[0].removeprefix("tests/") for test in tests})
    plugin = warm_pytest.Chosen(list(tests))
    work = functools.partial(warm_pytest.run_pytest, files, plugin, "-x")
    return warm_pytest.in_child(tree, 20 + sum(value for value, _ in tests.values()), work)


def judged(code: int | None) -> bool | None:
    """Whether a mutant was killed; None when that is not known.

    code: of pytest in a child; None if it took too long, negative for a signal. That
    pytest had an error of its own, found no tests or was called wrongly says nothing about the mutant.
    """
    return True if code is None or code < 0 or code in FAILED else False if code == 0 else None


def choose(tests: Tests, path: Path, mutation: Any) -> Tests:
    """The tests that run the mutated lines, or else lines of the same function, or else all; by seconds."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    first, last = mutation.start_pos[0], mutation.end_pos[0]
    functions = [n for n in nodes if isinstance(n, ast.FunctionDef) and n.lineno <= first <= n.end_lineno]
    inner = max(functions, key=lambda node: node.lineno, default=None)
    spans = [(first, last)] + ([(inner.body[0].lineno, inner.end_lineno)] if inner else []) + [(0, LINES)]
    for start, end in spans:
        chosen = {
            name: value for name, value in tests.items() if any(start <= line <= end for line in value[1])
        }
        if chosen or (start, end) == spans[-1]:
            break
    order, total = {}, 0.0
    for name, value in sorted((chosen or tests).items(), key=lambda pair: pair[1][0]):
        if total < MOST:
            order[name] = value
            total += value[0]
    return order


def where(item: Any) -> str:
    mutation = item.mutations[0]
    return f"{file_of(item)}.py:{mutation.start_pos[0]} {mutation.operator_name.removeprefix('core/')}"


def forget_survivors(place: Path) -> None:
    """Let survivors and what was not judged be tried again, with the tests as they are now."""
    import sqlite3

    with sqlite3.connect(place / "session.sqlite") as session:
        survived = "where test_outcome in ('SURVIVED', 'INCOMPETENT')"
        paths = session.execute(
            f"select module_path from mutation_specs natural join work_results {survived}"
        ).fetchall()
        for (path,) in paths:
            list_of_tests(place, path_name(path)).unlink(missing_ok=True)
        session.execute(f"delete from work_results {survived}")


def report(place: Path) -> None:
    """Print the table of the files and the list of the survivors, with what each changes."""
    from cosmic_ray.work_db import use_db
    from cosmic_ray.work_item import WorkerOutcome

    with use_db(place / "session.sqlite") as session:
        completed, waiting = session.completed_work_items, session.pending_work_items
    results = [pair for pair in completed if pair[1].worker_outcome == WorkerOutcome.NORMAL]
    print("\n| file of onecard/ | mutants | killed | share |\n|---|---:|---:|---:|")
    for name in [*FILES, ""]:
        mine = [result for item, result in results if name in ("", file_of(item))]
        killed = sum(result.is_killed for result in mine)
        if mine:
            print(f"| {name or 'together'} | {len(mine)} | {killed} | {100 * killed / len(mine):.0f} % |")
    late = sum(result.output == "timeout" for _, result in results)
    print(f"\n{late} of the killed took several times as long as usual. Survivors:\n")
    for item, result in sorted(results, key=lambda pair: sort_key(pair[0].mutations[0])):
        if not result.is_killed:
            lines = [line for line in result.diff.split("\n")[3:] if line[:1] in "+-"]
            print(where(item), *lines, sep="\n    ")
    errors = [pair for pair in completed if pair[1].worker_outcome != WorkerOutcome.NORMAL]
    print(f"\nNot judged: {len(errors)} that cosmic-ray could not make, or with an error within pytest.")
    print(f"{len(waiting)} were not tried.\n")
    for item, result in errors:
        print(where(item), *result.output.strip().splitlines()[-1:], sep="\n    ")


if __name__ == "__main__":
    main()
