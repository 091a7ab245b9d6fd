"""Base model and adapter, as modules and as tensors in files; frozen products, packed attention, loss."""
