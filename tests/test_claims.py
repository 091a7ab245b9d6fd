"""What the docs call measured or tested rests on programs and tests that exist and run."""

import re
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
    sources = named("benchmarks") + named("tools") + named("tests")
    assert [path for path in sources if not (ROOT / path).is_file()] == []


def test_tests_that_need_a_gpu_are_not_called_run():
    """Where all tests of a file are skipped without a GPU, whoever names it says so in the same paragraph."""
    needing = [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tests").rglob("test_*.py")
        if re.search(r"(?m)^pytestmark = .*cuda", path.read_text(encoding="utf-8"))
    ]
    assert "tests/programs/test_cuda.py" in needing
    silent = [
        (page, path)
        for page, text in claims.pages()
        for paragraph in re.split(r"\n\s*\n", text)
        for path in needing
        if path in paragraph and "needs a GPU" not in " ".join(paragraph.split())
    ]
    assert silent == []


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
        ("It answers within half a second.", 1),
        ("Copying would cost a third of the time of a token.", 1),
        ("The transfer took a third to a half of it.", 1),
        ("The child starts within a second.", 1),
        ("Importing takes ten seconds.", 1),
        ("Another setting is much slower.", 1),
        ("It varies by a third from run to run, or by half.", 1),
        ("It needs a quarter of a millisecond for each token.", 1),
        ("A second input, half of the rows and a third option.", 0),
    ],
)
def test_a_planted_claim_is_found(text, count):
    assert len(list(claims.of_page("page", text))) == count
    sourced = f"See `benchmarks/chat_speed.py`:\n\n{text}\n\n## Next\n\nIt was tested."
    all_claims = list(claims.of_page("page", sourced))
    assert [bool(claim.sources) for claim in all_claims] == [True] * count + [False]


@pytest.mark.parametrize(
    ("text", "sources"),
    [
        ("`tests/a.py` shows that it was tested.\n\nThis was tested too.", [1, 0]),
        ("## `benchmarks/a.py`\n\nIt takes 3 s.\n\nIt was tested.\n\n# B\n\nIt was tested.", [1, 1, 0]),
        ("Of `benchmarks/a.py`:\n\nA CPU, 24 GiB RAM.\n\n| a | 3 s |\n\nThe peak is 2 s.\n\nIt was tested.",
         [1, 1, 1, 0]),
    ],
)  # fmt: skip
def test_a_source_is_in_the_same_paragraph_heading_or_table(text, sources):
    assert [len(claim.sources) for claim in claims.of_page("page", text)] == sources
