"""What a process does at its first compilation and never again, done before it is forked: seconds of each child.

Modules that Inductor imports when it needs them, its tables of lowerings, what it asks of the C++ compiler. Children
find nothing compiled, no thread, and the random numbers and counters of a process that has only imported torch.
"""

from __future__ import annotations


def warm() -> None:
    """Compile a loss by Inductor, and forget it. A process that gives this function's source to another may do it too.

    Without its gradient: a backward before a fork would be none after it, where torch is built for a GPU.
    """
    import gc
    import threading

    import torch
    import torch._functorch.partitioners
    import torch._inductor.compile_fx
    import torch.nn.functional as F
    from torch._dynamo.utils import counters

    try:
        from torch.hub import tqdm

        tqdm.monitor_interval = 0  # the bar that Inductor makes would start a thread
    except (ImportError, AttributeError):
        pass

    def loss(h: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(h.sin(), w), y)

    torch.set_num_threads(1)  # a fork would wait for the others of a pool of threads
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        h, w = torch.randn(4, 8), torch.randn(20, 8)
        torch.compile(loss, backend="inductor", dynamic=False)(h, w, torch.zeros(4, dtype=torch.int64))
    torch.compiler.reset()
    counters.clear()
    gc.collect()
    assert threading.active_count() == 1, threading.enumerate()
