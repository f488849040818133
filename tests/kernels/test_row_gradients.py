"""The last step of dh where entries are listed: the label's terms, without the roundings of its neighbours."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux only")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here, not interpreted: tests/gpu", allow_module_level=True)

from float8_heads import made, mean_loss, passed, sweep_on_cpu, true  # noqa: F401

from tests.kernels.interpreted import error

# numpy speaks up where a GPU stays silent (log2 0, inf - inf)
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*"),
    pytest.mark.usefixtures("sweep_on_cpu"),
]


def test_a_z_loss_and_a_head_without_labels():
    for labels in (0, 1):
        head = made(24, 200, 16, 4.0, labels)
        c = mean_loss(head)._replace(square=torch.full((24,), 1e-4))
        _, grads = passed(head, c)
        _, dh, dw = true(head, c)
        assert error(grads.h, dh) < 6e-3
        assert error(grads.w, dw) < 6e-3


def test_a_certain_label_leaves_no_rounding_of_it():
    head = made(24, 200, 32, 0.3)
    head.w[head.y[:, 0]] = 0
    head = head._replace(y=torch.arange(24)[:, None])
    head.w[:24] = 40 * torch.nn.functional.normalize(head.h, dim=1)  # p of the label is 1 to all digits in most rows
    c = mean_loss(head)
    _, grads = passed(head, c)
    _, dh, _ = true(head, c)
    assert (grads.h.double() - dh).abs().max() < 1e-6
