"""OneCard: a low-resource LoRA workbench. README.md says what it does, docs/decisions.md why it is so."""

import logging
import os

# bitsandbytes warns while it is imported that it misses a kernel, which models/frozen_linear.py does not use
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# large CPU tensors in huge pages; torch reads this at its first allocation (hardware.keep_large_memory_apart)
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
