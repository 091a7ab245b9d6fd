"""What the docs call measured or tested rests on programs and tests that exist and run."""

import subprocess
import sys

import pytest

from tests.support import claims
from tests.support.paths import ROOT

SCRIPTS = sorted([*ROOT.glob("*.sh"), *(ROOT / "tools").glob("*.sh"), *(ROOT / "onecard").rglob("*.py")])


def named(folder: str) -> list[str]:
    """The files of a folder that the claims of the docs name."""
    sources = {source for claim in claims.of_project() for source in claim.sources}
    return sorted(source for source in sources if source.startswith(f"{folder}/"))


def test_every_claim_names_what_it_rests_on():
    """A figure without a program is measured by one, or it leaves the sentence."""
    assert [(claim.page, claim.sentence) for claim in claims.of_project() if not claim.sources] == []


def test_named_tests_are_collected_and_run():
    """Each file that a claim names has tests that one of the two tiers runs; `slow` ones do not count."""
    files = [path for path in named("tests") if path.rsplit("/", 1)[-1].startswith("test_")]
    collected: dict[str, int] = dict.fromkeys(files, 0)

    class Collector:
        def pytest_collection_finish(self, session: pytest.Session) -> None:
            for item in session.items:
                collected[item.nodeid.partition("::")[0]] += 1

    arguments = [
        "--collect-only",
        "-q",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "not slow",
        f"--rootdir={ROOT}",
    ]
    code = pytest.main([*arguments, *(str(ROOT / path) for path in files)], plugins=[Collector()])
    assert code == pytest.ExitCode.OK
    assert [path for path, count in collected.items() if count == 0] == []


@pytest.mark.ci
@pytest.mark.parametrize("path", [*named("benchmarks"), *named("tools")])
def test_named_programs_start(path):
    ended = subprocess.run(
        [sys.executable, ROOT / path, "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, "usage" in ended.stdout) == (0, True), ended.stderr[-2000:]


def test_named_programs_exist():
    assert [path for path in named("benchmarks") + named("tools") if not (ROOT / path).is_file()] == []


def test_messages_promise_no_duration():
    """A comment or message cannot name a benchmark, and how long something takes depends on the machine."""
    lines = {path.relative_to(ROOT).as_posix(): claims.promised_durations(path) for path in SCRIPTS}
    assert {path: spoken for path, spoken in lines.items() if spoken} == {}


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("It reaches 300 tokens/s.", 1),
        ("It was tested on a CPU. It works.", 1),
        ("A run continues bit for bit; so does another.", 1),
        ("All this takes minutes on two cores.", 1),
        ("19 of 20 seeds were equal, and 3.5 GiB were used.", 1),
        ("No GPU was measured.", 0),
        ("Nothing of this was tested on GPUs.", 0),
        ("Rank 8, 512 tokens and 3 epochs are the defaults.", 0),
        ("```text\nabout 5 minutes\n```\n", 0),
        ("| speed | 32 % |\n| size | 4 |", 1),
    ],
)
def test_a_planted_claim_is_found(text, count):
    assert len(list(claims.of_page("page", text))) == count
    source = "\n\nSee `benchmarks/chat_speed.py`.\n\n## Next\n\nIt was tested."
    all_claims = list(claims.of_page("page", text + source))
    assert [bool(claim.sources) for claim in all_claims] == [True] * count + [False]
