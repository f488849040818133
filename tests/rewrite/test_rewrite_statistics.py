"""Golden texts: what the pass makes of a few graphs, call by call. Accept a change with EXPECTTEST_ACCEPT=1."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from expecttest import TestCase
from torch import Tensor

from tests.eager_stack import Rewritten

B, T, D, V = 2, 5, 8, 40


def calls(report_after: str) -> str:
    """The calls of a graph's readable form, without types, comments and the inputs' renaming."""
    lines = [line.strip() for line in report_after.splitlines()]
    results = [line.split(";")[0] for line in lines if re.match(r"(\w+(: \"[^\"]*\")? = \w|return )", line)]
    kept = [re.sub(r": \"[^\"]*\"", "", line) for line in results if not re.match(r"\w+ = L_\w+_$", line)]
    return "\n".join(line.replace("torch.ops.", "") for line in kept) + "\n"


class RewrittenGraphs(TestCase):
    def after(self, program: Callable[..., Tensor], *operands: Tensor) -> str:
        rewritten = Rewritten(program)
        expected = program(*operands)
        torch.testing.assert_close(rewritten(*operands), expected, atol=1e-5, rtol=1e-5)
        return calls(rewritten.report.after)

    def test_a_shifted_loss_reads_fewer_rows_of_the_hidden_states(self) -> None:
        def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
            z = F.linear(h, w)[..., :-1, :].contiguous()
            return F.cross_entropy(z.view(-1, V), y.view(-1))

        h, w = torch.randn(B, T, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
        after = self.after(program, h, w, torch.randint(0, V, (B, T - 1)))
        self.assertExpectedInline(
            after,
            """\
view_1 = l_y_.view(-1)
slice_tensor = aten.slice.Tensor(l_h_, 1, 0, -1, 1)
reshape_default = aten.reshape.default(slice_tensor, [-1, 8])
valid = aten.ne.Scalar(view_1, -100)
mul_tensor = aten.mul.Tensor(view_1, valid)
unsqueeze_default = aten.unsqueeze.default(mul_tensor, 1)
no_columns = aten.new_empty.default(reshape_default, [0, 40], dtype = torch.float32)
no_rows = aten.new_empty.default(reshape_default, [0, 8], dtype = torch.float32)
unweighted = aten.new_empty.default(reshape_default, [0], dtype = torch.float32)
sum_default_1 = aten.sum.default(valid)
ones_default = aten.ones.default([], dtype = torch.float32, device = device(type='cpu'), pin_memory = False)
div_tensor_1 = aten.div.Tensor(ones_default, sum_default_1)
expand_default = aten.expand.default(div_tensor_1, [8])
scalar_tensor_default = aten.scalar_tensor.default(0, dtype = torch.float32, layout = torch.strided, device = device(type='cpu'))
where_self = aten.where.self(valid, expand_default, scalar_tensor_default)
neg_default = aten.neg.default(where_self)
select_backward_default = aten.select_backward.default(neg_default, [8, 1], 1, 0)
coefficients = aten.detach.default(where_self)
coefficients_1 = aten.detach.default(select_backward_default)
no_coefficients = aten.new_empty.default(reshape_default, [0], dtype = torch.float32)
head_1 = fusedhead.head_loss.default(reshape_default, l_w_, unsqueeze_default, no_columns, no_rows, unweighted, coefficients, coefficients_1, no_coefficients, no_coefficients, '', 'lse,picked,lse_low', 0, True, True, False, False)
getitem_4 = head_1[0]
lse_1 = aten.detach.default(getitem_4)
getitem_5 = head_1[1]
picked_1 = aten.detach.default(getitem_5)
tie = head_1[7]
lse_low_1 = head_1[8]
select_int = aten.select.int(picked_1, 1, 0)
detach_default = aten.detach.default(lse_1)
normaliser = aten.add.Tensor(lse_1, detach_default, alpha = 0)
sub_tensor = aten.sub.Tensor(normaliser, select_int)
add_tensor_1 = aten.add.Tensor(sub_tensor, lse_low_1)
where_scalar_other = aten.where.ScalarOther(valid, add_tensor_1, 0.0)
sum_default = aten.sum.default(where_scalar_other)
div_tensor = aten.div.Tensor(sum_default, sum_default_1)
tied = aten.add.Tensor(div_tensor, tie)
return (tied,)
""",
        )

    def test_per_token_log_probs_recompute(self) -> None:
        def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
            return (h @ w.t() / 0.7).log_softmax(-1).gather(-1, y[..., None]).squeeze(-1)

        h, w = torch.randn(B, T, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
        after = self.after(program, h, w, torch.randint(0, V, (B, T)))
        self.assertExpectedInline(
            after,
            """\
t = l_w_.t()
getitem = l_y_[(Ellipsis, None)]
t_default = aten.t.default(t)
reshape_default = aten.reshape.default(l_h_, [-1, 8])
reshape_default_1 = aten.reshape.default(getitem, [-1, 1])
no_columns = aten.new_empty.default(reshape_default, [0, 40], dtype = torch.float32)
no_rows = aten.new_empty.default(reshape_default, [0, 10], dtype = torch.float32)
unweighted = aten.new_empty.default(reshape_default, [0], dtype = torch.float32)
head = fusedhead.head_stats.default(reshape_default, t_default, reshape_default_1, no_columns, no_rows, unweighted, 'mul:1.4285714285714286', 'lse,picked,lse_low', 0)
lse = head[0]
picked = head[1]
lse_low = head[6]
detach_default = aten.detach.default(lse)
normaliser = aten.add.Tensor(lse, detach_default, alpha = 0)
unsqueeze_default = aten.unsqueeze.default(normaliser, 1)
unsqueeze_default_1 = aten.unsqueeze.default(lse_low, 1)
sub_tensor = aten.sub.Tensor(picked, unsqueeze_default)
sub_tensor_1 = aten.sub.Tensor(sub_tensor, unsqueeze_default_1)
reshape_default_2 = aten.reshape.default(sub_tensor_1, [2, 5, 1])
squeeze = reshape_default_2.squeeze(-1)
return (squeeze,)
""",
        )

    def test_a_frozen_head_without_gradients_only_streams(self) -> None:
        def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(torch.tanh(h @ w.t() / 30) * 30, y, reduction="sum")

        after = self.after(program, torch.randn(T, D), torch.randn(V, D), torch.randint(0, V, (T,)))
        self.assertExpectedInline(
            after,
            """\
t = l_w_.t()
t_default = aten.t.default(t)
valid = aten.ne.Scalar(l_y_, -100)
mul_tensor = aten.mul.Tensor(l_y_, valid)
unsqueeze_default = aten.unsqueeze.default(mul_tensor, 1)
no_columns = aten.new_empty.default(l_h_, [0, 40], dtype = torch.float32)
no_rows = aten.new_empty.default(l_h_, [0, 5], dtype = torch.float32)
unweighted = aten.new_empty.default(l_h_, [0], dtype = torch.float32)
head = fusedhead.head_stats.default(l_h_, t_default, unsqueeze_default, no_columns, no_rows, unweighted, 'mul:0.03333333333333333 tanh mul:30.0', 'lse,picked,lse_low', 0)
lse = head[0]
picked = head[1]
lse_low = head[6]
select_int = aten.select.int(picked, 1, 0)
detach_default = aten.detach.default(lse)
normaliser = aten.add.Tensor(lse, detach_default, alpha = 0)
sub_tensor = aten.sub.Tensor(normaliser, select_int)
add_tensor_1 = aten.add.Tensor(sub_tensor, lse_low)
where_scalar_other = aten.where.ScalarOther(valid, add_tensor_1, 0.0)
sum_default = aten.sum.default(where_scalar_other)
return (sum_default,)
""",
        )
