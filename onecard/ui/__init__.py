"""Browser windows and the terminal."""
