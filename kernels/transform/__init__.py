"""Elementwise transforms of the logits: the chain, its derivative, generated functions."""
