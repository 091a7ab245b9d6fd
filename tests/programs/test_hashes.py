"""requirements-hashes.txt lists the files of the pinned versions, which are complete for every Python.

tests/support/hashes.py writes it. That a set-up accepts no other file is tested in test_setup_whole.py.
"""

import functools
import hashlib
import http.server
import importlib.metadata
import json
import re
import threading

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support import fresh_environment, hashes
from tests.support.paths import ROOT

WITHOUT_METADATA = {"audioop-lts": []}  # name -> requirements of packages that only other Pythons need


def test_the_list_has_exactly_the_pinned_versions():
    """After a change of a pin it has to be written again."""
    listed = hashes.entries()
    assert list(listed) == [str(pin) for pin in hashes.pins()]
    assert all(listed.values())
    assert all(len(set(each)) == len(each) for each in listed.values())
    (torch,) = [each for line, each in listed.items() if line.startswith("torch==")]
    assert len(torch) > 20, "one for each Python and platform, and the build for the CPU alone"


def test_no_address_of_an_index_is_in_the_lists():
    for name in (*hashes.PINNED, "requirements-hashes.txt"):
        assert not re.search(r"https?://|--(extra-)?index", (ROOT / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_every_package_that_a_part_needs_is_pinned(python, machine):
    """With hashes pip installs no package that is not listed; which are needed differs between Pythons."""
    if "gptqmodel" not in installed():
        pytest.skip("needs gptqmodel, which .venv/gptq has: bash tools/setup.sh test")
    pins = {canonicalize_name(pin.name): pin for pin in hashes.pins()}
    system = {"python_version": python, "python_full_version": f"{python}.1", "platform_machine": machine}
    pending = [Requirement("onecard[test,gptq]"), Requirement("deepspeed"), Requirement("setuptools")]
    seen: set[tuple[str, str]] = set()
    while pending:
        requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras}:
            if (name, extra) not in seen:
                seen.add((name, extra))
                pending += [need for need in needs(name, extra) if is_needed(need, system, extra)]
    names = {name for name, _ in seen} - {"onecard"}
    assert {"torch", "deepspeed", "gptqmodel"} <= names
    assert names - set(pins) == set()
    markers = {name: pins[name].marker for name in names}
    assert all(marker is None or marker.evaluate(system) for marker in markers.values())
    assert ("audioop-lts" in names) == (python in ("3.13", "3.14"))


def needs(name: str, extra: str) -> list[Requirement]:
    """The requirements in the metadata of a package; none for a package of WITHOUT_METADATA."""
    if name == "onecard":
        return [
            Requirement(line) for line in fresh_environment.PYPROJECT["optional-dependencies"].get(extra, [])
        ]
    lines = installed()[name] if name in installed() else WITHOUT_METADATA[name]
    return [Requirement(line) for line in lines]


@functools.cache
def installed() -> dict[str, list[str]]:
    """The requirements of every package in .venv and, with gptqmodel, in .venv/gptq."""
    apart = [str(path) for path in (ROOT / ".venv/gptq").glob("lib/python*/site-packages")]
    packages = [*importlib.metadata.distributions(path=apart), *importlib.metadata.distributions()]
    return {canonicalize_name(each.name): each.requires or [] for each in packages}


def is_needed(requirement: Requirement, system: dict[str, str], extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({**system, "extra": extra})


def test_the_list_is_written_from_an_index_and_a_folder(tmp_path, monkeypatch, capsys):
    """Files of other versions and packages are left out. A build such as +cpu belongs to its version."""
    sums = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("wheel", "sdist", "other", "egg")}
    files = {
        "a_b-1.0-py3-none-any.whl": sums["wheel"],
        "a_b-1.0.tar.gz": sums["sdist"],
        "a_b-1.0.1.tar.gz": sums["other"],
        "a_b-1.0-py3.11.egg": sums["egg"],
    }
    page = json.dumps(
        {"files": [{"filename": name, "hashes": {"sha256": each}} for name, each in files.items()]}
    )

    class Index(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert (self.path, self.headers["Accept"]) == ("/simple/a-b/", hashes.JSON)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(page.encode())

        def log_message(self, *_: object) -> None:
            pass

    (tmp_path / "requirements.txt").write_text(
        "# a comment\nA_B==1.0 --config-settings=x\n", encoding="utf-8"
    )
    (tmp_path / "requirements-cuda.txt").touch()
    (tmp_path / "a_b-1.0+cpu-py3-none-any.whl").write_text("local", encoding="utf-8")
    (tmp_path / "c-1.0-py3-none-any.whl").write_text("another package", encoding="utf-8")
    monkeypatch.setattr(hashes, "pins", lambda pins=hashes.pins: pins(tmp_path))
    with http.server.HTTPServer(("127.0.0.1", 0), Index) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hashes.main(f"http://127.0.0.1:{server.server_port}/simple", str(tmp_path))
        server.shutdown()
    expected = sorted([sums["wheel"], sums["sdist"], hashlib.sha256(b"local").hexdigest()])
    output = capsys.readouterr().out.removeprefix(hashes.HEADER)
    assert output.startswith("# a_b-1.0+cpu-py3-none-any.whl\nA_B==1.0 \\\n")
    assert hashes.SUM.findall(output) == expected
