"""One model in, another form out: merge, quantise, GGUF, LLaMA layouts, vocabulary."""
