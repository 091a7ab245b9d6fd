"""OneCard: a low-resource LoRA workbench. README.md says what it does, docs/decisions.md why it is so."""

import logging

# bitsandbytes warns while it is imported that it misses a kernel which is not used here (frozen.py)
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
