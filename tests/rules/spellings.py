"""Every spelling of every op that a rule reads: the table that the property test runs.

A key is an ATen overload of `RULES`; its programs are expressions over ``z`` (logits), and some of

    {d} the vocabulary's dimension    {r} another dimension    {k} any dimension    {c} a constant    {v} V
    {a}:{b} a slice                   {n} the rank             {shape} a shape that z may have
    {s0}, {sr}, {sk} the lengths of the first dimension, of {r} and of {k}
    col (one number a class), row (one number a token), y (labels), yi (labels, some -1), idx (K labels a row),
    i (indices of {r}), cw (class weights), s (a 0-d tensor)
    h, w, wt, b  (projections: hidden, [V, D] weight, its [D, V] storage, bias)

A new rule needs a line here, or a test fails.
"""

from __future__ import annotations

import torch

aten = torch.ops.aten

PROJECTIONS = {
    aten.linear.default: ["F.linear(h, w)", "F.linear(h, w, b)", "torch._C._nn.linear(h, w, bias=b)"],
    aten.matmul.default: [
        "h @ wt", "torch.matmul(h, wt)", "h.matmul(wt)", "h @ w.t()", "h @ w.T", "h @ w.transpose(0, 1)",
        "h.__matmul__(w.mT)",
    ],
    aten.mm.default: ["torch.mm(h, wt)", "h.mm(w.t())"],
    aten.addmm.default: [
        "torch.addmm(b, h, wt)", "torch.addmm(b.view(1, -1), h, w.t())", "b.addmm(h, wt)",
        "torch.addmm(b, h, wt, beta=2)",
    ],
    aten.einsum.default: [
        "torch.einsum('...d,vd->...v', h, w)", "torch.einsum('nd,vd->nv', h, w)",
        "torch.einsum('btd,vd->btv', h, w)", "torch.einsum('btd,dv->btv', h, wt)",
        "torch.einsum('vd,nd->nv', w, h)", "torch.einsum('btd,vd->bvt', h, w)",
        "torch.einsum('btd,vd->tbv', h, w)", "torch.einsum('ij , kj -> ik', h, w)",
        "torch.einsum('nd,vd->vn', h, w)",
    ],
}  # fmt: skip

ROWS = {
    aten.view.default: [
        "z.view({shape})", "z.view(-1, {v})", "z.view({s0}, -1)", "z.view(-1)", "z.view(*{shape})",
    ],
    aten.reshape.default: [
        "z.reshape({shape})", "torch.reshape(z, (-1, {v}))", "z.reshape({s0}, -1)", "z.reshape(-1)",
    ],
    aten._unsafe_view.default: ["torch.ops.aten._unsafe_view.default(z, [-1, {v}])"],
    aten.flatten.using_ints: ["z.flatten(0, -2)", "torch.flatten(z, 0, 1)", "z.flatten({k})", "z.flatten()"],
    aten.contiguous.default: ["z.contiguous()"],
    aten.clone.default: ["z.clone()", "torch.clone(z)"],
    aten.alias.default: ["torch.ops.aten.alias.default(z)"],
    aten.detach.default: ["z.detach()", "torch.detach(z)", "z.log_softmax({d}).detach()"],
    aten.transpose.int: ["z.transpose({k}, {r})", "torch.transpose(z, {d}, {k})", "z.transpose(-1, -2)"],
    aten.swapaxes.default: ["z.swapaxes(0, -1)", "torch.swapaxes(z, {k}, {d})"],
    aten.swapdims.default: ["z.swapdims({k}, {r})"],
    aten.mT.default: ["z.mT"],
    aten.t.default: ["z.t()", "torch.t(z)", "(z.T if {n} == 2 else z)"],
    aten.permute.default: [
        "z.permute(*reversed(range({n})))", "torch.permute(z, [*range(1, {n}), 0])",
        "z.permute([-1, *range({n} - 1)])",
    ],
    aten.movedim.int: ["z.movedim({d}, {k})", "torch.movedim(z, {r}, {k})"],
    aten.moveaxis.int: ["torch.moveaxis(z, {k}, -1)", "z.moveaxis({d}, 0)"],
    aten.unsqueeze.default: [
        "z.unsqueeze({k})", "z.unsqueeze(-1)", "z.unsqueeze({n})", "torch.unsqueeze(z, 0)",
        "z.log_softmax({d}).unsqueeze(0)",
    ],
    aten.squeeze.dim: [
        "z.squeeze({k})", "torch.squeeze(z, {r})", "z.unsqueeze({k}).squeeze({k})",
        "z.unsqueeze(0).squeeze({d})",
    ],
    aten.squeeze.default: ["z.squeeze()", "z.unsqueeze({k}).squeeze()"],
    aten.squeeze.dims: ["z.squeeze((0, {n} - 1))", "torch.squeeze(z.unsqueeze({k}), ({k},))"],
    aten.narrow.default: ["z.narrow({r}, 0, 1)", "torch.narrow(z, {k}, -1, 1)"],
    aten.index_select.default: [
        "z.index_select({r}, i)", "torch.index_select(z, {r}, i)", "z.softmax({d}).index_select({r}, i)",
    ],
    aten.slice.Tensor: [
        "z[{a}:{b}]", "z[..., {a}:{b}]", "z[:, {a}:{b}]", "z[..., :-1]", "z[..., {a}:]", "z[::2]",
        "z[..., ::2]", "z[-1:]", "torch.ops.aten.slice.Tensor(z, {r}, {a}, {b}, 2)",
        "torch.ops.aten.slice.Tensor(z, {d}, {a}, {b})", "z.log_softmax({d})[..., 1:]",
    ],
    aten.flip.default: ["z.flip({r})", "torch.flip(z, [0, {r}])", "z.flip({k})"],
    aten.roll.default: ["z.roll(1, {r})", "torch.roll(z, (1, -1), (0, {r}))", "z.roll(1)", "z.roll(1, {k})"],
    aten.select.int: [
        "z[0]", "z[:, -1]", "z.select({r}, -1)", "torch.select(z, {k}, 0)", "z[..., 0]",
        "z.log_softmax({d})[0]",
    ],
    aten.index.Tensor: [
        "z[[0, 0]]", "z[i]", "z[:, [0, -1]]", "z[torch.tensor([[0], [0]])]", "z[i > 0]", "z[[0], [0]]",
        "z[[0, 0], [0, -1]]", "z[[[0]], [0, 0]]", "z[:, [0, 0], [0, -1]]", "z[[0, 0], :, [0, 0]]", "z[i > 0, [0]]",
        "z[..., [0]]",
    ],
    aten.split.Tensor: ["z.split(2)[0]", "torch.split(z, 1, {r})[-1]", "z.split(2, {k})[0]"],
    aten.split_with_sizes.default: [
        "z.split_with_sizes([1, {sr} - 1], {r})[1]", "torch.split_with_sizes(z, [{sk}], {k})[0]",
    ],
    aten.split.sizes: ["torch.ops.aten.split.sizes(z, [1, {sr} - 1], {r})[1]"],
    aten.chunk.default: ["z.chunk(2)[-1]", "torch.chunk(z, 3, {k})[0]"],
    aten.unbind.int: ["z.unbind()[0]", "torch.unbind(z, {r})[-1]", "z.unbind({k})[0]"],
}  # fmt: skip

COLUMNS = {
    aten.mul.Tensor: [
        "z * {c}", "{c} * z", "torch.mul(z, {c})", "z.mul({c})", "z * col", "col * z", "z * row", "row * z",
        "z * s", "z.log_softmax({d}) * {c}", "z * 3", "z * (row * col)",
        "z.softmax({d}) * z.log_softmax({d})", "z * z",
        "z.log_softmax({d}) * z.log_softmax({d})", "z.softmax({d}) * z.log_softmax({d}) * z.log_softmax({d})",
    ],
    aten.mul.Scalar: ["torch.ops.aten.mul.Scalar(z, {c})"],
    aten.multiply.Tensor: ["torch.multiply(z, 2)", "z.multiply(col)"],
    aten.multiply.Scalar: ["torch.ops.aten.multiply.Scalar(z, {c})"],
    aten.divide.Tensor: ["torch.divide(z, 2)", "z.divide(1 + col ** 2)"],
    aten.true_divide.Tensor: ["torch.true_divide(z, 4)", "z.true_divide({c})"],
    aten.subtract.Tensor: ["torch.subtract(z, col)", "z.subtract(1)"],
    aten.negative.default: ["torch.negative(z)", "z.negative()"],
    aten.div.Tensor: [
        "z / {c}", "z / 2", "torch.div(z, {c})", "z.div(2)", "z / (1 + col ** 2)", "z / (1 + row * row)",
        "z / (s * s + 1)", "z.log_softmax({d}) / {c}", "z / 0", "1 / z",
    ],
    aten.div.Scalar: ["torch.ops.aten.div.Scalar(z, {c})"],
    aten.add.Tensor: [
        "z + {c}", "{c} + z", "torch.add(z, {c})", "z.add(1)", "z + col", "col + z", "z + row", "row + z",
        "z + s", "z.add(col, alpha=2)", "z + z", "z + row * col",
    ],
    aten.add.Scalar: ["torch.ops.aten.add.Scalar(z, {c})", "torch.ops.aten.add.Scalar(z, 2, 3)"],
    aten.sub.Tensor: [
        "z - {c}", "torch.sub(z, {c})", "z.sub(1)", "z - row", "z - s", "col - z", "row - z", "z - z",
    ],
    aten.sub.Scalar: ["torch.ops.aten.sub.Scalar(z, {c})"],
    aten.rsub.Scalar: ["{c} - z", "torch.rsub(z, {c})", "torch.rsub(z, 2, alpha=2)"],
    aten.rsub.Tensor: ["torch.rsub(z, col)", "torch.rsub(z, row)"],
    aten.neg.default: ["-z", "z.neg()", "torch.neg(z)", "-z.log_softmax({d})"],
    aten.masked_fill.Scalar: [
        "z.masked_fill(col > 0, {c})", "z.masked_fill(col.detach() > 0.5, float('-inf')).softmax({d}).log()",
        "torch.masked_fill(z, row > 0, {c})",
    ],
    aten.where.ScalarOther: ["torch.where(col > 0, z, {c})", "z.where(row > 0, {c})"],
    aten.where.ScalarSelf: ["torch.where(col > 0, {c}, z)"],
    aten.tanh.default: ["z.tanh()", "torch.tanh(z)", "5 * torch.tanh(z / 5)"],
    aten.sigmoid.default: ["z.sigmoid()", "torch.sigmoid(z)", "F.sigmoid(z)"],
    aten.to.dtype: [
        "z.to(torch.float32)", "z.to(torch.bfloat16)", "z.float()", "z.to(torch.int64)", "z.double()",
        "z.log_softmax({d}).half()",
    ],
    aten._to_copy.default: ["torch.ops.aten._to_copy.default(z, dtype=torch.bfloat16)"],
    aten.to.dtype_layout: [
        "z.to('cpu', torch.bfloat16)", "torch.ops.aten.to.dtype_layout(z, dtype=torch.bfloat16)",
    ],
    aten.to.device: ["torch.ops.aten.to.device(z, 'cpu', torch.bfloat16)"],
    aten.to.other: ["z.to(row)", "torch.ops.aten.to.other(z, col)"],
    aten.type_as.default: ["z.type_as(row)", "z.type_as(idx)"],
}  # fmt: skip

M = "z.movedim({d}, 1)"  # where cross_entropy takes the classes
FLAT = "z.movedim({d}, -1).reshape(-1, {v})"
LOSSES = {
    aten.log_softmax.int: [
        "z.log_softmax({d})", "F.log_softmax(z, {d})", "torch.log_softmax(z, dim={d})",
        "F.log_softmax(z, dim={k})", "F.log_softmax(z, {d}, dtype=torch.float32)",
        "z.log_softmax({d}).log_softmax({d})",
    ],
    aten._log_softmax.default: ["torch.ops.aten._log_softmax.default(z, {d}, False)"],
    aten.special_log_softmax.default: ["torch.special.log_softmax(z, {d})"],
    aten.cross_entropy_loss.default: [
        f"F.cross_entropy({M}, y)", f"F.cross_entropy({M}, y, reduction='sum')",
        f"F.cross_entropy({M}, yi, ignore_index=-1, reduction='none')",
        f"F.cross_entropy({M}, yi, ignore_index=-1)", f"F.cross_entropy({M}, y, label_smoothing=0.2)",
        f"F.cross_entropy({M}, y, cw)",
        f"F.cross_entropy({M}, yi, weight=cw, ignore_index=-1, label_smoothing=0.3, reduction='mean')",
        f"F.cross_entropy({M}, y.to(torch.uint8))",
        f"F.cross_entropy({M}, yi, cw, None, -1, None, 'sum', 0.5)", f"F.cross_entropy({M}, {M}.softmax(1))",
        "F.cross_entropy(z, y)",
        f"F.cross_entropy({M}, yi, ignore_index=-1, label_smoothing=1.0, reduction='none')",
        f"F.cross_entropy({M}, y, ignore_index=0)",
        f"F.cross_entropy({M}, torch.full_like(y, 0), ignore_index=0)",
    ],
    aten.nll_loss_nd.default: [
        f"F.nll_loss({M}.log_softmax(1), y)",
        f"F.nll_loss({M}.log_softmax(1) * 0.5, yi, ignore_index=-1, reduction='sum')",
        f"F.nll_loss({M}.log_softmax(1), y, cw)",
        f"F.nll_loss({M}.log_softmax(1), yi, cw, ignore_index=-1, reduction='none')", f"F.nll_loss({M}, y)",
    ],
    aten.nll_loss.default: [
        f"torch.ops.aten.nll_loss.default({FLAT}.log_softmax(1), yi.reshape(-1), cw, 2, -1)",
    ],
    aten.nll_loss2d.default: [

        f"torch.ops.aten.nll_loss2d.default({FLAT}[:, :, None, None].log_softmax(1), yi.reshape(-1, 1, 1), cw, 1, -1)",
    ],
    aten.gather.default: [
        "z.gather({d}, idx)", "torch.gather(z, {d}, idx)", "z.log_softmax({d}).gather({d}, idx)",
        "(-z.log_softmax({d})).gather({d}, index=idx)",
        "(z.log_softmax({d}) * 2).gather({d}, y.unsqueeze({p}))", "z.gather({r}, idx * 0)",
    ],
    aten.take_along_dim.default: [
        "torch.take_along_dim(z, idx, {d})", "z.take_along_dim(idx - 7, {d})",
        "z.log_softmax({d}).take_along_dim(idx, dim={d})", "z.take_along_dim(idx)",
    ],
    aten.logsumexp.default: [
        "z.logsumexp({d})", "torch.logsumexp(z, dim={d}, keepdim=True)", "z.logsumexp({k})",
        "z.logsumexp((0, -1))",
    ],
    aten.special_logsumexp.default: [
        "torch.special.logsumexp(z, {d})", "torch.special.logsumexp(z, ({d},), True)",
    ],
}  # fmt: skip

STATISTICS = {
    aten.sum.dim_IntList: [
        "z.sum({d})", "torch.sum(z, dim=({d},), keepdim=True)", "z.log_softmax({d}).sum({d})",
        "(-2 * z.log_softmax({d})).sum({d})", "z.sum({k})", "(z.softmax({d}) * z.log_softmax({d})).sum({d})",
        "(z.softmax({d}) * z).sum({d}, keepdim=True)",
        "(z.log_softmax({d}).exp() * z.log_softmax({d})).sum({d})",
        "(z.softmax({d}) * z.log_softmax({d}).square() * 2).sum({d})", "(z.log_softmax({d}) ** 2).sum({d})",
        "-(z.softmax({d}) * z.log_softmax({d}) * 2).sum({d})", "z.softmax({d}).sum({d})",
    ],
    aten.sum.default: ["z.sum()", "torch.sum(z)", "z.log_softmax({d}).sum()", "z.softmax({d}).sum()"],
    aten.mean.default: ["z.mean()", "torch.mean(-z.log_softmax({d}))"],
    aten.mean.dim: [
        "z.mean({d})", "torch.mean(z, {d}, keepdim=True)", "z.log_softmax({d}).mean({d})", "z.mean({k})",
        "(z.softmax({d}) * z).mean({d})",
    ],
    aten.softmax.int: [
        "z.softmax({d})", "F.softmax(z, {d})", "torch.softmax(z, dim={d})",
        "F.softmax(z, {d}, dtype=torch.float32)", "F.softmax(z, {k})",
    ],
    aten._softmax.default: ["torch.ops.aten._softmax.default(z, {d}, False)"],
    aten.special_softmax.default: ["torch.special.softmax(z, {d})"],
    aten.argmax.default: [
        "z.argmax({d})", "torch.argmax(z, dim={d}, keepdim=True)", "z.argmax({k})", "z.argmax()",
        "z.softmax({d}).argmax({d})",
    ],
    aten.max.dim: ["z.max({d})[0]", "torch.max(z, dim={d}, keepdim=True)[1]", "z.max({k}).values"],
}  # fmt: skip

POINTWISE = {
    aten.exp.default: [
        "z.log_softmax({d}).exp()", "torch.exp(F.log_softmax(z, {d}))", "z.exp()", "(2 * z.log_softmax({d})).exp()",
        "(-z.exp()).exp()",
    ],
    aten.abs.default: ["z.abs()", "torch.abs(z * col)", "abs(z)"],
    aten.square.default: ["z.square()", "torch.square(z - row)", "(2 * z.log_softmax({d})).square()"],
    aten.sqrt.default: ["z.square().sqrt()", "torch.sqrt(z)", "(z.exp() + 1).sqrt()"],
    aten.rsqrt.default: ["(z * z.detach() + 1).rsqrt()", "torch.rsqrt(z.square() + 1)"],
    aten.reciprocal.default: ["(z.exp() + 0.1).reciprocal()", "1 / (z.exp() + 0.1)"],
    aten.pow.Tensor_Scalar: [
        "z ** 2", "z.pow(3)", "(z.square() + 1) ** 0.5", "torch.pow(z.square() + 1, -1.5)", "z ** 0", "z.exp() ** 0.3",
        "z.log_softmax({d}) ** 2", "z.log_softmax({d}).pow(3)",
    ],
    aten.exp2.default: ["z.exp2()", "torch.exp2(-z)"],
    aten.expm1.default: ["z.expm1()", "torch.expm1(-z)"],
    aten.log.default: ["z.sigmoid().log()", "torch.log(z.exp() + 1)", "z.log()", "z.softmax({d}).log()"],
    aten.log2.default: ["z.sigmoid().log2()", "torch.log2(z.exp() + 1)"],
    aten.log1p.default: ["z.exp().log1p()", "torch.log1p(z.square())"],
    aten.sin.default: ["z.sin()", "torch.sin(z * col)"],
    aten.cos.default: ["z.cos()", "torch.cos(z + row)"],
    aten.erf.default: ["z.erf()", "torch.erf(z / 2)"],
    aten.special_erf.default: ["torch.special.erf(z)"],
    aten.relu.default: ["z.relu()", "F.relu(z) + 1", "torch.relu(z + col)"],
    aten.relu6.default: ["F.relu6(z)", "F.relu6(3 * z)"],
    aten.leaky_relu.default: ["F.leaky_relu(z)", "F.leaky_relu(z, 0.2)", "F.leaky_relu(z, negative_slope=0.3)"],
    aten.elu.default: ["F.elu(z)", "F.elu(z, alpha=0.5)"],
    aten.celu.default: ["F.celu(z)", "F.celu(z, 2.0)"],
    aten.selu.default: ["F.selu(z)"],
    aten.silu.default: ["F.silu(z)", "torch.nn.functional.silu(z * row)"],
    aten.gelu.default: ["F.gelu(z)", "F.gelu(z, approximate='tanh')"],
    aten.mish.default: ["F.mish(z)"],
    aten.softplus.default: ["F.softplus(z)", "F.softplus(z, 2.0, 1.0)", "F.softplus(30 * z)"],
    aten.log_sigmoid.default: ["F.logsigmoid(z)", "F.logsigmoid(-z)"],
    aten.hardtanh.default: ["F.hardtanh(z)", "F.hardtanh(z, -0.5, 0.2)"],
    aten.hardsigmoid.default: ["F.hardsigmoid(z)", "F.hardsigmoid(4 * z)"],
    aten.hardswish.default: ["F.hardswish(z)", "F.hardswish(4 * z)"],
    aten.threshold.default: ["F.threshold(z, 0.1, 0.2)"],
    aten.clamp.default: ["z.clamp(-1, 1)", "z.clamp(max={c})", "torch.clamp(z, min=-0.5)", "z.clamp(None, 0.3)"],
    aten.clamp_min.default: ["z.clamp_min(0.1)"],
    aten.clamp_max.default: ["z.clamp_max({c})"],
    aten.clip.default: ["z.clip(-1, 1)", "torch.clip(z, max=0)"],
    aten.clamp.Tensor: ["z.clamp(row, col)", "z.clamp(min=col)", "torch.clamp(z, max=s)", "z.clamp(row * col)"],
    aten.clamp_min.Tensor: ["z.clamp_min(col)", "z.clamp_min(row)"],
    aten.clamp_max.Tensor: ["z.clamp_max(col)", "z.clamp_max(s)"],
    aten.maximum.default: ["torch.maximum(z, col)", "torch.maximum(row, z)", "z.maximum(z.detach() + 1)"],
    aten.minimum.default: ["torch.minimum(z, col)", "torch.minimum(s, z)", "z.minimum(row * col)"],
    aten.logaddexp.default: ["torch.logaddexp(z, col)", "torch.logaddexp(row, z)"],
}  # fmt: skip

SPELLINGS = {**PROJECTIONS, **ROWS, **COLUMNS, **POINTWISE, **LOSSES, **STATISTICS}
