"""Shared by all tests: nothing reaches a model hub, two threads, a tiny model."""

import os

os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", TOKENIZERS_PARALLELISM="false")

from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.harness import started

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """Folder of a tiny random Llama with 12 heads and 4 key/value heads."""
    return tiny.save_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def tiny_rows(tmp_path) -> Path:
    """A JSON file of 24 rows."""
    return tiny.save_rows(tmp_path / "rows.json", 24)


@pytest.fixture(scope="session")
def harness():
    """Trainings in forked children (tests/harness.py)."""
    with started() as servers:
        yield servers
