"""A run on disk: its folder, checkpoints, adapters, log, and its process."""
