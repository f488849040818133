"""What a layer more costs the pass, in calls of functions: the same on every machine."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import os, torch
from benchmarks.compile_time import Model, pass_calls
tokens = torch.randint(512, (2, 9))
print(*(pass_calls(Model(layers, 32, 512), tokens) for layers in (1, 1, 4)), flush=True)
os._exit(0)  # to take the process apart takes longer than what it is asked
"""
CALLS_A_LAYER = 5800  # 4,800 with torch 2.13, of 30 nodes; torch's own copy of the graph is half of it


def test_a_layer_without_a_head_costs_the_pass_little() -> None:
    """In a process of its own: where pytest hears torch's trace, torch prints every graph for it."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    first, few, many = map(int, done.stdout.split())
    assert few < first
    assert 0 < (many - few) / 3 <= CALLS_A_LAYER
