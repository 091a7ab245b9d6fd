#!/usr/bin/env python3
"""One instruction, one answer, in a browser or, with --terminal, here.

python generate.py --help
"""

from onecard.__main__ import start

if __name__ == "__main__":
    start("generate")
