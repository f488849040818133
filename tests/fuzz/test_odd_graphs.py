"""Random graphs, well formed and meaningless: the pass reads every one without an error, and guards nothing."""

from __future__ import annotations

import logging
import os
import random
import warnings
from collections import Counter

import pytest
import torch

from fusedhead.analysis.stacked_heads import STACKS
from fusedhead.backend import run_pass
from fusedhead.graph.op_names import HEAD_ENDS, PROJECTIONS
from fusedhead.legality.missed_heads import CARRIES_LOGITS
from fusedhead.options import Options
from tests.fuzz.odd_graphs import drawn

GRAPHS = int(os.environ.get("FUSEDHEAD_ODD_GRAPHS", "100"))
NAMED = GRAPHS // 5
# seeds of graphs that once made the pass step back
FOUND = ("y:1367", "y:1871", "y:3421", "y:1212", "y:2384", "z:1019", "k:5490", "k:6339")


@pytest.fixture(autouse=True)
def quiet() -> None:
    """Calls that fake tensors refuse are drawn by intent, and refused with a page of log each."""
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)


def test_no_well_formed_graph_is_too_odd_to_read() -> None:
    seen: Counter[str] = Counter()
    for n, seed in enumerate([*range(GRAPHS), *FOUND]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                gm, _ = drawn(seed)
            except torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode:
                continue  # a size that only the data decide cannot be drawn on
            before = str(gm.graph)
            symbols = next((v.fake_mode.shape_env for v in values(gm) if hasattr(v, "fake_mode")), None)
            guards = len(symbols.guards) if symbols else 0
            options = Options(logits=("eager", "deferred")[n % 2], min_logits=0)
            result, report, _ = run_pass(gm, options, texts=False)
        assert not report.errors, (seed, report.errors)
        assert str(gm.graph) == before, "the graph that was given has been edited"
        assert guards == (len(symbols.guards) if symbols else 0), (seed, symbols.guards[guards:])
        result.graph.lint()
        seen["fused"] += sum(head.fused for head in report.heads)
        seen["left"] += sum(not head.fused for head in report.heads)
        assert all(head.fused or head.reason for head in report.heads)
    assert seen["fused"] > GRAPHS // 50
    assert seen["left"] > GRAPHS // 20


# what the rules know by name, and what Dynamo calls the inputs of a body after: the node that is handed in
OTHERS = {"setitem", "scatter_", "one_hot", "arange", "stack"}
NAMES = sorted({*PROJECTIONS, *HEAD_ENDS, *STACKS, *CARRIES_LOGITS, *OTHERS})


def test_an_input_may_be_called_after_any_op() -> None:
    seen: Counter[bool] = Counter()
    for seed in range(NAMED):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                (gm, _), (renamed, _) = drawn(seed), drawn(seed)
            except torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode:
                continue
            rng = random.Random(seed)
            for node in renamed.graph.find_nodes(op="placeholder"):
                node.target = rng.choice(NAMES)
                node._rename(node.target)
            options = Options(logits=("eager", "deferred")[seed % 2], min_logits=0)
            (_, as_drawn, _), (_, report, _) = (run_pass(each, options, texts=False) for each in (gm, renamed))
        assert not report.errors, (seed, report.errors)
        assert [head.fused for head in report.heads] == [head.fused for head in as_drawn.heads], seed
        seen.update(head.fused for head in report.heads)
    assert seen[True]
    assert seen[False]


def values(gm: torch.fx.GraphModule) -> list[object]:
    return [node.meta.get("example_value") for node in gm.graph.nodes]
