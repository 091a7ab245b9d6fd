"""Models whose weights are quantised already: folders with GPTQ or AWQ weights, as transformers reads them.

They need the packages in PACKAGES, which `bash tools/setup.sh gptq` installs. This file knows no options.
"""

import importlib.util
import os
from typing import Any

import torch
from transformers import PretrainedConfig

from onecard.errors import UserError
from onecard.system import commands

GPTQ, AWQ = "gptq", "awq"
PACKAGES = ("gptqmodel", "optimum")
# without this, importing gptqmodel (as peft does) fails on machines with fewer cores than it expects
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, (os.cpu_count() or 1) // 2)))


def method(config: PretrainedConfig) -> str:
    """How the weights of a model are quantised: "gptq", "awq", "bitsandbytes", ...; "" when they are not."""
    settings = _settings(config)
    name = settings.get("quant_method")
    return str(getattr(name, "value", name) or "quantised") if settings else ""


def bits(config: PretrainedConfig) -> int | None:
    """Bits of a quantised weight; None when the config does not say it."""
    settings = _settings(config)
    of_bitsandbytes = {"load_in_4bit": 4, "load_in_8bit": 8}
    named = [count for name, count in of_bitsandbytes.items() if settings.get(name)]
    return settings.get("bits") or (named[0] if named else None)


def _settings(config: PretrainedConfig) -> dict[str, Any]:
    settings = getattr(config, "quantization_config", None) or {}
    return settings if isinstance(settings, dict) else settings.to_dict()


def how_to_read(path: str, config: PretrainedConfig, to_train: bool) -> Any:
    """The quantization_config for from_pretrained, or None when the model's own is enough.

    path: the model, for messages. to_train: use layers in plain torch, which can be differentiated, and not
    the fastest ones of the device. Raises UserError when a package is missing.
    """
    kind = method(config)
    if kind not in (GPTQ, AWQ):
        return None
    require(f"--model_path {path}: {kind.upper()} weights need")
    library()
    if not to_train:
        return None
    from transformers import AwqConfig, GPTQConfig

    own = config.quantization_config
    if kind == AWQ:
        return AwqConfig(bits=own["bits"], group_size=own["group_size"], backend="torch_awq")
    return GPTQConfig(bits=own["bits"], backend="gptq_torch")


def linear_names(model: torch.nn.Module) -> list[str]:
    """The last parts of the names of all layers whose weights GPTQ or AWQ has packed, without duplicates."""
    return sorted(
        {name.rpartition(".")[2] for name, layer in model.named_modules() if hasattr(layer, "qweight")}
    )


def require(what: str) -> None:
    """Raise UserError when packages are not installed; what: how the message begins, "... need"."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{what} {' and '.join(missing)}.", f"Run: {commands.set_up('gptq')}")


def library() -> Any:
    """Import the package gptqmodel and silence its logger. No other place imports it."""
    import gptqmodel
    from logbar import LogBar

    LogBar.shared().setLevel("ERROR")  # it prints tables that are of use to its developers only
    return gptqmodel
