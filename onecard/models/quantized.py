"""Models whose weights are quantised already: GPTQ and AWQ folders, as transformers reads them.

The packages that read them are an extra of their own (bash tools/setup.sh gptq). This file knows no options.
"""

import importlib.util
import os
from typing import Any

from onecard.errors import UserError
from onecard.system import commands

GPTQ, AWQ = "gptq", "awq"
PACKAGES = ("gptqmodel", "optimum")
# gptqmodel's import, which peft does too, ends with an error on fewer cores than it expects
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, (os.cpu_count() or 1) // 2)))


def method(config: Any) -> str:
    """How a model's weights are quantised: gptq, awq, bitsandbytes, ...; "" for plain ones.

    config: transformers' of the model.
    """
    settings = _settings(config)
    name = settings.get("quant_method")
    return str(getattr(name, "value", name) or "quantised") if settings else ""


def bits(config: Any) -> int | None:
    """Bits of a quantised weight, or None where the model does not say."""
    settings = _settings(config)
    of_bitsandbytes = {"load_in_4bit": 4, "load_in_8bit": 8}
    named = [count for name, count in of_bitsandbytes.items() if settings.get(name)]
    return settings.get("bits") or (named[0] if named else None)


def _settings(config: Any) -> dict[str, Any]:
    found = getattr(config, "quantization_config", None) or {}
    return found if isinstance(found, dict) else found.to_dict()


def how_to_read(path: str, config: Any, to_train: bool) -> Any:
    """The quantization_config for from_pretrained, or None when the model's own is enough.

    to_train: products that can be differentiated, in plain torch; else the fastest the device has. Raises
    UserError when packages are missing.
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


def linear_names(model: Any) -> list[str]:
    """Last names of the layers whose weights are packed by GPTQ or AWQ."""
    return sorted(
        {name.rpartition(".")[2] for name, layer in model.named_modules() if hasattr(layer, "qweight")}
    )


def require(what: str) -> None:
    """Raise UserError, beginning with `what`, when the packages are not installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{what} {' and '.join(missing)}.", f"Run: {commands.set_up('gptq')}")


def library() -> Any:
    """The package gptqmodel, made quiet. Import it by this alone."""
    import gptqmodel
    from logbar import LogBar

    LogBar.shared().setLevel("ERROR")  # its tables are for its developers
    return gptqmodel
