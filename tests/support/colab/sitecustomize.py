"""Colab's kernel has google.colab from its start."""

import google.colab  # noqa: F401
