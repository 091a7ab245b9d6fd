#!/usr/bin/env python3
"""Answer single instructions in a browser or, with --terminal, in the terminal.

python generate.py --help
"""

from onecard.__main__ import start

if __name__ == "__main__":
    start("generate")
