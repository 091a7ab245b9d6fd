"""A GGUF file of 16 or 32 bits -> a file of another type, by the quantiser of llama.cpp; runs as a child.

python -m onecard.conversion.llama_cpp_quantizer SOURCE OUTPUT TYPE

TYPE is one of GGUF_TYPES in config/conversion.py.
"""

import ctypes
import os
import re
import sys
from typing import Any

WARNING = 3  # GGML_LOG_LEVEL_WARN; errors have a higher level


def _main(source: str, output: str, kind: str) -> None:
    from llama_cpp import llama_cpp as library

    def log(level: int, text: bytes, _: Any) -> None:
        line = text.decode("utf-8", "replace").strip()
        progress = re.search(r"\[\s*(\d+)/\s*(\d+)\]", line)
        if progress:
            print(f"Quantising: {progress[1]}/{progress[2]}", flush=True)
        elif level >= WARNING and line:
            print(line, flush=True)

    callback = library.llama_log_callback(log)
    library.llama_log_set(callback, None)
    settings = library.llama_model_quantize_default_params()
    settings.ftype = getattr(library, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    settings.nthread = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if library.llama_model_quantize(os.fsencode(source), os.fsencode(output), ctypes.byref(settings)):
        sys.exit(1)


if __name__ == "__main__":
    _main(*sys.argv[1:])
