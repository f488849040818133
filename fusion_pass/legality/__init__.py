"""Decisions: whether a head may be fused and whether it pays. A refusal has a sentence."""
