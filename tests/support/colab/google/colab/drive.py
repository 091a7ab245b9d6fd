"""As in Colab: the user's Google Drive becomes a folder of this machine."""

from google import colab


def mount(path: str) -> None:
    colab.note("mount", path)
