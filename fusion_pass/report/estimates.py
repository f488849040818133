"""Estimates of a fused head from its sizes: memory, FLOP and memory traffic, with the formulas.

They are shown in the report's page. They are no measurements, and no decision reads them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fusedhead.report.head_record import HeadRecord

# bytes a second that a device reads and writes, an order of magnitude for devices that do not tell
BANDWIDTH = {"cuda": 2.0e12, "cpu": 2.0e10}


@dataclass(frozen=True)
class Estimate:
    """bytes_unfused: memory for logits in a step without fusion. bytes_left: with it, logits or a workspace.

    flop: of the head's matrix products for one step. traffic: bytes of logits-sized reads and writes that a
    step no longer makes. milliseconds: the time of that traffic at ``bandwidth`` (bytes a second).
    """

    bytes_unfused: int
    bytes_left: int
    flop: int
    traffic: int
    bandwidth: float

    @property
    def milliseconds(self) -> float:
        return self.traffic / self.bandwidth * 1e3


def worth(head: HeadRecord) -> Estimate:
    """The estimate of one head for one step at the compiled size.

    Inductor holds the logits [N, V] and puts their gradient in their place. Beside the matrix products, it reads
    them for their statistics, and reads them and writes the gradient. A forward-only step writes and reads them.
    1 matrix product is 2 N D V FLOP.
    """
    passes, products = (2, 1) if head.forward_only else (3, 3)
    elements = head.bytes_logits // itemsize(head)
    return Estimate(
        bytes_unfused=head.bytes_logits,
        bytes_left=head.bytes_held,
        flop=head.flop or 2 * products * elements * head.hidden_size,
        traffic=0 if head.materialised else passes * head.bytes_logits,
        bandwidth=bandwidth(head.device),
    )


def itemsize(head: HeadRecord) -> int:
    """Bytes of one logit."""
    return {"float64": 8, "float32": 4}.get(head.dtype, 2)


def bandwidth(device: str) -> float:
    """Bytes a second of the device's memory, from its clock and bus width where known."""
    if device == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties()
        clock, bus = getattr(properties, "memory_clock_rate", 0), getattr(properties, "memory_bus_width", 0)
        if clock and bus:
            return 2.0 * clock * 1e3 * bus / 8  # kHz and bits; two transfers a clock
    return BANDWIDTH.get(device, BANDWIDTH["cpu"])
