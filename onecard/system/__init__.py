"""This machine: files, whole folders, locks, hashes, sandboxed children, hardware, signals; no model."""
