"""Every op of torch that writes, in every spelling, to every operand of a head: which programs there are, and a count.

``python -m tests.mutations`` runs them all. An op that is in no program is listed with the reason.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

from tests.mutations.calls import FRAGILE, Call, Samples, call_of, complete
from tests.mutations.programs import OPERANDS, D, N, NoProgram, Spelling, Verdict, judged, program, spellings

ELSEWHERE = {
    "symm_mem": "needs several GPUs",
    "_c10d_functional": "needs a process group",
    "prim": "belongs to TorchScript",
    "onednn": "needs quantised weights",
    "mkldnn": "needs opaque weights",
    "quantized": "needs quantised tensors",
}
MODES = ((False, False), (True, False), (True, True))  # whether gradients are recorded; whether the loss comes first


# parts of the names of ops for which no arguments were found, and why; the first that fits
FOREIGN = (
    (("cudnn", "miopen", "mps", "triton", "philox", "_scaled_mm", "batch_norm_gather", "batch_norm_stats",
      "batch_norm_update_stats", "bmm.dtype", "conv_depthwise2d"), "its kernel is for another device"),
    (("mkldnn", "nnpack", "fbgemm", "_sobol"), "its operands are a library's own"),
    (("quant", "q_per_channel", "per_channel_affine"), "needs quantised tensors"),
    (("sparse", "spdiags", "nested", "_to_dense", "row_indices", "csr"), "needs tensors of another layout"),
    (FRAGILE, "made-up arguments could end the process, and no sample of torch's calls it"),
)  # fmt: skip


def no_arguments(name: str, op: OpOverload) -> str:
    """Why no call of an op was found."""
    written = [a for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    if not any("Tensor" in str(a.type) for a in written):
        return "writes to a list, a dictionary or a generator, and to no tensor"
    reasons = (why for parts, why in FOREIGN if any(part in name for part in parts))
    return next(reasons, "no arguments were found: none of torch's samples calls it, and none made by type run")


@dataclass
class Tally:
    """What has been seen."""

    ops: set[str] = field(default_factory=set)
    programs: int = 0
    spellings: Counter[str] = field(default_factory=Counter)
    verdicts: Counter[str] = field(default_factory=Counter)
    telling: int = 0
    exact: int = 0
    fused: int = 0
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    differences: list[str] = field(default_factory=list)

    def add(self, name: str, spelling: Spelling, verdict: Verdict, said: str) -> None:
        self.ops.add(name)
        self.programs += 1
        self.spellings[spelling.name.partition(",")[-1].strip() or spelling.name.split(".")[0]] += 1
        self.verdicts[verdict.kind] += 1
        self.telling += verdict.telling
        self.exact += verdict.exact
        self.fused += verdict.fused
        if verdict.kind != "right":
            self.differences.append(f"{verdict.kind}: {name} as {spelling.name}, {said}: {verdict.detail}")

    def __str__(self) -> str:
        lines = [
            f"{len(self.ops)} ops in {self.programs} programs ({self.telling} with another value afterwards): "
            f"{dict(self.verdicts)}, {self.fused} fused; {self.exact} writers found out, the others feared",
            f"spellings: {dict(self.spellings.most_common())}",
        ]
        lines += [f"{len(names)} left out, {why}: {', '.join(names)}" for why, names in self.left_out.items()]
        return "\n".join([*lines, *self.differences])


def operands_for(value: object) -> list[str]:
    """The operands of a head whose memory may stand for an argument."""
    tensor = [x for x in tree_leaves(value) if isinstance(x, Tensor)][-1:]
    if not tensor:
        return []
    return {torch.bool: ["m"], torch.int64: ["y", "h", "w"]}.get(tensor[0].dtype, ["h", "w", "b"])


def calls(op: OpOverload, samples: Samples) -> Iterator[Call]:
    """A call of an op, and one in which it writes to the whole of the hidden states, where it takes their shape."""
    call = call_of(op, samples)
    if call is None:
        return
    yield call
    first = op._schema.arguments[0].name
    if first in call.written and isinstance(call.arguments[first], Tensor):
        whole = complete(op, {**call.arguments, first: torch.randn(N, D)})
        if whole is not None:
            yield whole


def check(name: str, op: OpOverload, samples: Samples, tally: Tally, every: bool, rng: random.Random) -> None:
    """One op in its programs: all, or one drawn for each spelling."""
    space = name.split("::")[0]
    if space in ELSEWHERE:
        tally.left_out[ELSEWHERE[space]].append(name)
        return
    result = list(calls(op, samples))
    reasons: list[str] = []
    for call in result:
        for spelling in spellings(call):
            ways = [(target, operand, *mode) for target in call.written for operand in
                    operands_for(call.arguments[target]) for mode in MODES]  # fmt: skip
            for target, operand, learning, after in ways if every else rng.sample(ways, 1) if ways else ():
                try:
                    case = program(call, spelling, target, operand, learning, after)
                    verdict = judged(case, learning)
                except NoProgram as error:
                    reasons.append(str(error) or "its argument fits no operand")
                    continue
                said = f"{target} in {operand}, {'training' if learning else 'no_grad'}{', after' * after}"
                tally.add(name, spelling, verdict, said)
    if not result:
        tally.left_out[no_arguments(name, op)].append(name)
    elif name not in tally.ops:
        why = Counter(reasons).most_common(1)
        tally.left_out[why[0][0] if why else "writes to no tensor"].append(name)


def check_all(ops: Iterable[tuple[str, OpOverload]], samples: Samples, every: bool, seed: int = 0) -> Tally:
    tally, rng = Tally(), random.Random(seed)
    for name, op in ops:
        check(name, op, samples, tally, every, rng)
    return tally


assert OPERANDS[0] == "h"
