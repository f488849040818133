"""``fusedhead.defer(module)``: heads of one eager model, by hand."""

from __future__ import annotations

from torch import nn

from fusedhead.compat import unusable
from fusedhead.eager import tied_heads
from fusedhead.eager.heads import install, linears, register_layers


def defer(module: nn.Module) -> nn.Module:
    """Let the heads of an eager model hand out deferred logits: a loss of them is fused, and they are never built.

    ``module`` is a head, or a model that holds some: every `torch.nn.Linear` in it with a weight [V, D] of at least
    1,024 classes, 8 D, or 30,000 classes; or, where it holds none, every other parameter of these sizes, an embedding's
    for one, that the model multiplies by itself (``F.linear(h, self.embedding.weight)``, ``h @
    self.embedding.weight.T``) in ``forward`` or another public method of its class. Returns ``module``.

    No compilation is needed: ``F.cross_entropy(head(h), y)`` in eager mode, or compiled on its own, is computed as in a
    model that is compiled with this backend, with the same numbers and the same report. Calls of fewer logits than
    ``fusedhead.min_logits`` stay as they are; so does what runs inside compiled functions, which the backend sees
    itself, under modes and transforms, and in regions of activation checkpointing. Once its
    logits are read by anything but a loss, a head is computed at once.

    The module itself is not changed: it is copied, pickled and saved as before, and a copy does not defer. Where it
    multiplies itself, a mode of torch functions is on while its methods run: one more call in Python for each of
    torch's, for this module alone.

    Raises TypeError if ``module`` is no `torch.nn.Module`, ValueError if it holds no such weight, RuntimeError where
    this torch, or another package, has a `torch.nn.Linear` of its own. ``fusedhead.enable()`` does it for the
    `torch.nn.Linear` layers of every module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"fusedhead.defer expects a torch.nn.Module, got {type(module).__name__}")
    layers = list(linears(module))
    tables = [] if layers else list(tied_heads.weights(module))
    if not layers and not tables:
        raise ValueError(
            f"fusedhead.defer: {type(module).__name__} holds no torch.nn.Linear that looks like a head, and no other "
            "parameter that does: at least 1,024 classes, and 8 times its input's size or 30,000. Give logits of "
            "another kind to a compiled function, or call fusedhead.linear_cross_entropy"
        )
    if why := unusable():
        raise RuntimeError(f"fusedhead.defer: {why}")
    if layers:
        install()
        register_layers(layers)
    if tables:
        tied_heads.watch_products(module)
    return module
