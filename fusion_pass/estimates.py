"""What a fused head is worth, from its sizes alone: memory, FLOP and memory traffic, with the formulas.

These are estimates for a page that people read, not measurements; nothing is decided by them.
"""

from __future__ import annotations

from dataclasses import dataclass

from fusedhead.report import HeadRecord

# bytes a second a device reads and writes, where the device does not say: order of magnitude
BANDWIDTH = {"cuda": 2.0e12, "cpu": 2.0e10}


@dataclass(frozen=True)
class Estimate:
    """bytes_unfused: the most logits-sized memory that exists at once without fusion; bytes_left: and with
    it.

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


def estimate(head: HeadRecord) -> Estimate:
    """For one head and one step at the compiled size.

    Without fusion a training step holds the logits in the dtype of the head while it builds their gradient,
    both [N, V], next to float32 log-probabilities [N, V]; it writes and reads each of the three at least
    once. A forward-only step holds and moves the logits alone. 1 matrix product is 2 N D V FLOP.
    """
    forward_only = head.engine.endswith("forward only")
    elements = head.bytes_logits // itemsize(head)
    parts = [head.bytes_logits] if forward_only else [head.bytes_logits, 4 * elements, head.bytes_logits]
    left = head.bytes_logits if "built" in head.logits.split(" / ") else 0
    if not head.fused:
        left = sum(parts)
    products = 1 if forward_only else 3
    return Estimate(
        bytes_unfused=sum(parts),
        bytes_left=left,
        flop=2 * products * elements * head.hidden_size,
        traffic=2 * sum(parts) - 2 * left if head.fused else 0,
        bandwidth=bandwidth(head.device),
    )


def itemsize(head: HeadRecord) -> int:
    """Bytes of one logit."""
    return {"float64": 8, "float32": 4}.get(head.dtype, 2)


def bandwidth(device: str) -> float:
    """Bytes a second of the device's memory, from its clock and bus where it tells them."""
    import torch

    if device == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties()
        clock, bus = getattr(properties, "memory_clock_rate", 0), getattr(properties, "memory_bus_width", 0)
        if clock and bus:
            return 2.0 * clock * 1e3 * bus / 8  # kHz and bits, two transfers a clock
    return BANDWIDTH.get(device, BANDWIDTH["cpu"])
