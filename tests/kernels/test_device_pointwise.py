"""Generated pointwise functions inside the kernels against float64. Kernels run in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux only")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here, not interpreted: benchmarks/gpu_check.py", allow_module_level=True)


from fusedhead.kernels.contract import Windows
from fusedhead.kernels.transform import pointwise
from fusedhead.kernels.transform.transform import parse
from fusedhead.kernels.triton_engine import engine
from tests.kernels.interpreted import F32, FUNCTIONS, OPERANDS, STEPS, error, gradients, head, truth

# numpy speaks up where a GPU stays silent (log2 0, inf - inf)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_generated_function_and_its_derivative_match_float64(name):
    x, g = head(n=20, v=70, transform=FUNCTIONS[name]), gradients(20)
    stats, grads = engine.head_loss(x, g, OPERANDS, Windows(16, 70, F32))
    true, d = truth(x, g)
    for got, exact in ((stats.lse, true.lse), (stats.picked, true.picked), (grads.h, d[0]), (grads.w, d[1])):
        assert error(got, exact) < STEPS


def test_every_word_of_a_function_is_computed_by_the_kernels():
    steps = [step for transform in FUNCTIONS.values() for step in parse(transform).steps]
    functions = [pointwise.parse_function(str(step.value)) for step in steps if step.op == "fn"]
    spoken = {op for function in functions for code in function.codes for op, _ in code.instructions}
    assert spoken == set(pointwise.OPS)
