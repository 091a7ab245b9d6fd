"""This machine: files, folders that appear whole, locks, hashes, sandboxed children, hardware, signals,
console; it knows no model."""
