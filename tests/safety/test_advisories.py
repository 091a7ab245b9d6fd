"""No pinned version is affected by an advisory of requirements-advisories.json that nobody has judged."""

import datetime
import json
import warnings

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support import advisories, hashes
from tests.support.paths import ROOT

CONTENT = advisories.read()
RECORDS = {record["id"]: record for record in CONTENT["advisories"]}
OLD = 90  # days


def affecting(pins: list[Requirement]) -> set[str]:
    return {advisory for _, advisory in advisories.affecting(pins, RECORDS.values())}


def test_no_pin_is_affected():
    """An accepted advisory that affects no pin any more has to be removed from the list of accepted ones."""
    assert affecting(hashes.pins()) == set(CONTENT["accepted"])


@pytest.mark.parametrize("advisory", CONTENT["accepted"])
def test_what_makes_an_accepted_advisory_harmless_holds(advisory):
    """The code that it is about is named nowhere in OneCard."""
    sources = [
        path.read_text(encoding="utf-8") for path in [*ROOT.glob("*.py"), *ROOT.glob("onecard/**/*.py")]
    ]
    names = CONTENT["accepted"][advisory]["unused"]
    assert names
    assert [name for name in names if any(name in source for source in sources)] == []


@pytest.mark.parametrize("advisory", RECORDS)
def test_a_planted_version_is_found(advisory):
    """The first version of each range is affected, as is the last; the version with the correction is not."""
    (affected,) = RECORDS[advisory]["affected"]
    name = affected["package"]["name"]
    for span in affected["ranges"]:
        for event in span["events"]:
            ((kind, version),) = event.items()
            planted = affecting([Requirement(f"{name}=={version}")])
            assert (advisory in planted) == (kind in ("introduced", "last_affected")), (kind, version)


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("1.9", False),
        ("2.0", True),
        ("2.5", True),
        ("2.6", False),
        ("3.1", True),
        ("3.2", True),
        ("3.2.1", False),
    ],
)
def test_ranges(version, expected):
    """2.0 to 2.5 and 3.1 to 3.2 are affected; local versions belong to their release."""
    events = [{"introduced": "2.0"}, {"fixed": "2.6"}, {"introduced": "3.1"}, {"last_affected": "3.2"}]
    package = {"ecosystem": "PyPI", "name": "Some_Package"}
    record = {
        "id": "X",
        "affected": [{"package": package, "ranges": [{"type": "ECOSYSTEM", "events": events}]}],
    }
    hits = list(advisories.affecting([Requirement(f"some-package=={version}")], [record]))
    assert hits == ([(f"Some_Package=={version}", "X")] if expected else [])


def test_the_records_have_osv_format_and_concern_pinned_packages():
    pinned = {canonicalize_name(pin.name) for pin in hashes.pins()}
    for record in RECORDS.values():
        assert record["aliases"]
        assert record["summary"]
        datetime.date.fromisoformat(record["published"])
        for each in record["affected"]:
            assert each["package"]["ecosystem"] == "PyPI"
            assert canonicalize_name(each["package"]["name"]) in pinned
            assert {span["type"] for span in each["ranges"]} == {"ECOSYSTEM"}
    assert set(CONTENT["without_advisory"]) <= pinned
    assert len(RECORDS) == len(CONTENT["advisories"])


def test_the_age_is_known():
    """An old file is no mistake of the code, so it is a warning and not a failure."""
    assert advisories.age({"date": "2026-01-30"}, datetime.date(2026, 3, 1)) == 30
    days = advisories.age(CONTENT, datetime.datetime.now(tz=datetime.UTC).date())
    if days > OLD:
        warnings.warn(
            f"{advisories.FILE.name} is {days} days old; docs/safety.md says how to renew it", stacklevel=1
        )
    newest = max(record["published"] for record in RECORDS.values())
    assert newest <= CONTENT["date"]
    assert newest in CONTENT["source"]


def test_the_report_names_pin_advisory_and_age(monkeypatch, capsys, tmp_path):
    """A pin that nobody has judged is said to be so."""
    planted = CONTENT | {"date": "2026-01-01", "accepted": {}}
    monkeypatch.setattr(advisories, "FILE", tmp_path / "some.json")
    advisories.FILE.write_text(json.dumps(planted), encoding="utf-8")
    monkeypatch.setattr(hashes, "pins", lambda: [Requirement("transformers==5.0.0")])
    advisories.main()
    output = capsys.readouterr().out
    assert "days old" in output.splitlines()[0]
    assert "transformers==5.0.0: PYSEC-2026-2289. Nobody has judged this one." in output
    assert "torch==" not in output
