"""Whether a head may be fused, and whether it pays: refusals, each a sentence."""
