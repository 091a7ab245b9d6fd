"""Writes the weights of a model in GPTQ or AWQ with gptqmodel, and prints the errors that it reports."""

import contextlib
import shutil
from pathlib import Path
from typing import Any

from onecard.config.conversion import QuantizeConfig
from onecard.hub import model_files
from onecard.models import quantized
from onecard.system import build_lock, gpus
from onecard.system import files as system_files
from onecard.system.console import say

WAITING, LOGS = ".waiting", "logs"  # folders of gptqmodel in the new folder, deleted at the end


def write(
    source: Path,
    folder: Path,
    options: QuantizeConfig,
    group: int,
    calibration_rows: list[list[int]],
    device: str,
) -> list[dict[str, Any]]:
    """Write the quantised weights into the folder; returns the library's log entries of all modules."""
    library = quantized.library()
    from gptqmodel.quantization.config import AWQConfig, GPTQConfig

    shared = {"bits": options.bits, "group_size": group, "device": gpus.torch_name(device)}
    shared["offload_to_disk_path"] = str(folder / WAITING)  # where layers wait
    if options.method == quantized.AWQ:
        settings, backend = AWQConfig(**shared), library.BACKEND.AWQ_TORCH
    else:
        grouped = group != -1 and not options.act_order  # the library's other order needs groups
        order = {"desc_act": options.act_order, "act_group_aware": grouped}
        settings, backend = GPTQConfig(damp_percent=options.damp, **order, **shared), library.BACKEND.AUTO
    examples = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in calibration_rows]
    source, folder = source.resolve(), folder.resolve()
    with contextlib.chdir(folder):  # the library writes its log into the working directory
        with build_lock.alone():
            model = library.GPTQModel.load(str(source), settings)
        log = model.quantize(examples, batch_size=1, backend=backend, calibration_data_min_length=1)
        model.save(str(folder))
    for name in (WAITING, LOGS):
        shutil.rmtree(folder / name, ignore_errors=True)
    _leave_out_waiting(folder)
    return [entry for entries in log.values() for entry in entries]


def _leave_out_waiting(folder: Path) -> None:
    """Take the path where layers waited out of the settings that gptqmodel has saved."""
    for path in (folder / model_files.MODEL_CONFIG, folder / "quantize_config.json"):
        values = system_files.read_json(path) or {}
        settings = values.get("quantization_config", values)
        if settings.get("meta", {}).pop("offload_to_disk_path", None):
            system_files.write_json(path, values)


def print_errors(log: list[dict[str, Any]]) -> None:
    """Print one line per layer: the squared error of its outputs on the calibration rows.

    log: the library's entries. An entry has no number when no token of the rows reached the module, as may
    happen to an expert; then its weights were only rounded.
    """
    layers: dict[int, list[tuple[float, str]]] = {}
    for entry in log:
        try:
            error = float(entry["loss"])
        except ValueError:
            say(f"layer {entry['layer']:<5} {entry['module']}: {entry['loss']}")
            continue
        layers.setdefault(entry["layer"], []).append((error, entry["module"]))
    for number, modules in sorted(layers.items()):
        largest, name = max(modules)
        say(
            f"layer {number:<5} squared error {sum(each for each, _ in modules):.2e}, {largest:.2e} in {name}"
        )
