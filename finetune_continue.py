#!/usr/bin/env python3
"""Go on with a run exactly where it stopped, or train further on other rows.

python finetune_continue.py --help
"""

from onecard.__main__ import start

if __name__ == "__main__":
    start("continue")
