#!/usr/bin/env python3
"""Continue a run exactly where it stopped, or train its result further on other rows.

python finetune_continue.py --help
"""

from onecard.__main__ import start

if __name__ == "__main__":
    start("continue")
