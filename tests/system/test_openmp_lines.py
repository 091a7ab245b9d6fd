"""Programs that compute for minutes on the CPU say before they begin how their threads wait."""

import os
from pathlib import Path

import pytest

from onecard.config.conversion import MergeConfig, QuantizeConfig
from onecard.config.options import build
from onecard.conversion import quantize
from onecard.data import template as data_template
from onecard.evaluation import merge_fidelity, parity
from onecard.models import base_model
from onecard.models import tokenizer as models_tokenizer
from onecard.runs.adapters import Adapter
from onecard.system import hardware, openmp
from tests.support import tiny


class LoadedError(Exception):
    """A model was about to be loaded."""


def compare_gguf(model: Path, place: Path) -> None:
    tokenizer = models_tokenizer.load_tokenizer(str(model))
    parity.reference(model, None, data_template.load("alpaca", tokenizer), tokenizer)


def report_merge(model: Path, place: Path) -> None:
    options = MergeConfig(data_path="rows.json")
    merge_fidelity.run(options, [], model, Adapter("adapter", model), model)


def quantise(model: Path, place: Path) -> None:
    paths = {"model_path": model, "data_path": tiny.save_rows(place / "rows.json", 12)}
    settings = {**paths, "output_path": place / "small", "method": "bnb", "report_rows": 1, "device": "cpu"}
    quantize.run(build(QuantizeConfig, {name: str(value) for name, value in settings.items()}))


@pytest.mark.parametrize("program", [compare_gguf, report_merge, quantise])
def test_it_is_said_before_the_model_is_loaded(program, tiny_model, tmp_path, monkeypatch, capsys):
    def stop(*_: object, **__: object) -> None:
        raise LoadedError

    for name in openmp.USERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(openmp.SPINS, openmp.OURS)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(openmp, "container_cores", lambda: None)
    monkeypatch.setattr(hardware.gpus, "cuda", lambda: hardware.gpus.Cuda((), ()))
    monkeypatch.setattr(base_model, "load_base", stop)
    openmp._say.cache_clear()
    with pytest.raises(LoadedError):
        program(tiny_model, tmp_path)
    assert f"{openmp.SLEEP} ({openmp.SPINS}={openmp.OURS})" in capsys.readouterr().out
