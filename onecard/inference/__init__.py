"""Engines, decoding, detokenizing, history, chat."""
