#!/usr/bin/env python3
"""Chat in a browser or, with --terminal, in the terminal. The option --studio adds a tab for training.

python interaction.py --help
"""

from onecard.__main__ import start

if __name__ == "__main__":
    start("interaction")
