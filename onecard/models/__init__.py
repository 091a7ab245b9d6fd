"""Base model and adapter, as torch modules and as tensors in files; frozen products, packed attention,
loss."""
