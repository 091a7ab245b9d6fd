"""How good a model is: perplexity, parity of engines, fidelity of a merge."""
