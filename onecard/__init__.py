"""OneCard: a low-resource LoRA workbench. docs/architecture is in README.md and docs/decisions.md."""
