"""accelerate takes FSDP for a matter of GPUs: this tells its state otherwise, before anything is prepared.

What it then does to a model (`fsdp2_prepare_model`) is the same on every device.
"""

from __future__ import annotations

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

_original = AcceleratorState.__init__


def allow() -> None:
    def initialise(self: AcceleratorState, *args: object, **kwargs: object) -> None:
        first = not self._shared_state
        _original(self, *args, **kwargs)  # type: ignore[arg-type]
        if first or self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2, auto_wrap_policy="transformer_based_wrap",
                transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
                cpu_ram_efficient_loading=False,
            )  # fmt: skip

    AcceleratorState.__init__ = initialise  # type: ignore[method-assign]
