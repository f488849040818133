"""Sweeps in Gluon: two groups of warps work on two tiles in turn."""
