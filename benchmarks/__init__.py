"""Benchmarks of the head: ``python -m benchmarks.head`` from the repository's root, and its two companions.

`compile_time` times the pass itself, `end_to_end` whole models. Nothing in the package imports this folder.
"""
