"""Settings and fixtures of all tests: no model hub, at most two threads, and a tiny model."""

import os

os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", TOKENIZERS_PARALLELISM="false")
if "PYTEST_XDIST_WORKER" in os.environ:  # threads of two workers that wait for a core slow both down
    os.environ["OMP_NUM_THREADS"] = "1"

import shutil
import sys
from pathlib import Path

import pytest
import torch

pytest.register_assert_rewrite("tests.support")  # so that a failing check there shows its values too
from tests.support import fresh_environment, tiny  # noqa: E402
from tests.support.harness import started  # noqa: E402
from tests.support.skips import (  # noqa: E402, F401 (hooks of pytest)
    pytest_make_collect_report,
    pytest_runtest_makereport,
)

LONG = (  # files that take minutes, the longest first
    "programs/test_demo.py",
    "conversion/test_quantize.py",
    "training/test_resume.py",
    "programs/",
    "training/",
    "conversion/",
    "ui/",
)
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests that take minutes first.

    test.sh gives each of two workers the next file when it is done with one. By their names training/ and ui/
    would come last, and a long file that begins last runs on alone.
    """
    items.sort(key=lambda item: turn(item.nodeid.removeprefix("tests/")))


def turn(name: str) -> int:
    """The place of a test in LONG, or a place after all of them for a quick test."""
    return next((number for number, start in enumerate(LONG) if name.startswith(start)), len(LONG))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """Folder of a tiny random Llama with 12 heads and 4 key/value heads."""
    return tiny.save_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tied_model(tmp_path_factory) -> Path:
    """The tiny Llama with one matrix for embedding and head, as many small models have."""
    return tiny.save_model(tmp_path_factory.mktemp("tied") / "model", tie_word_embeddings=True)


@pytest.fixture(scope="session")
def tiny_gguf(tiny_model, tmp_path_factory) -> tuple[Path, dict[str, Path]]:
    """The tiny model as a GGUF file of fp32, and two adapters of it, a and b, that change every answer."""
    from onecard.conversion import gguf
    from tests.support.adapters import save_adapter

    place, files = tmp_path_factory.mktemp("tiny-gguf"), {}
    for seed, (name, modules) in enumerate({"a": ["q_proj", "v_proj"], "b": ["down_proj"]}.items()):
        folder = save_adapter(tiny_model, place / name, seed, r=8, lora_alpha=64, target_modules=modules)
        files[name] = gguf.adapter(folder, tiny_model, place / f"{name}.gguf")
    return gguf.base(tiny_model, place / "base.gguf", any_tokenizer=True, kind="f32"), files


@pytest.fixture
def tiny_rows(tmp_path) -> Path:
    """A JSON file of 24 rows."""
    return tiny.save_rows(tmp_path / "rows.json", 24)


@pytest.fixture(scope="module")
def one_thread():
    """Use one thread, which is several times as fast as two with matrices this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def browser():
    """The system's Chromium, headless and driven by playwright; without it the test is skipped."""
    api = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("no Chromium: apt install chromium")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=flags)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def harness():
    """Trainings in forked children (tests/support/harness.py)."""
    with started() as servers:
        yield servers


@pytest.fixture(scope="session")
def copy(tmp_path_factory) -> Path:
    """The project's files in an empty folder, with the environment that runs these tests as its .venv."""
    folder = fresh_environment.copy_project(tmp_path_factory.mktemp("clone") / "onecard")
    (folder / ".venv").symlink_to(sys.prefix)
    return folder
