"""Parameters that ZeRO-3 keeps whole on every rank, gathered in one collective after each step.

DeepSpeed gathers them one by one: with adapters of a small rank on every linear, hundreds of collectives of a few
thousand numbers each, every one of which takes the latency of the network.
"""

from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed import comm as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus


def gather_persistent_at_once(engine: DeepSpeedEngine) -> None:
    """Let a ZeRO-3 engine gather its persistent parameters of each dtype in one collective.

    The optimizer asks the first of them to gather all. With ZeRO++, whose gathers are others, nothing changes.
    """
    parameters = engine.optimizer.persistent_parameters
    if not parameters or engine.zero_hpz_partition_size() > 1 or engine.zero_quantized_weights():
        return
    first = parameters[0]
    one_by_one = first.all_gather

    def all_gather(param_list: Any = None, async_op: bool = False, hierarchy: int = 0) -> Any:
        if param_list is not parameters or async_op:
            return one_by_one(param_list, async_op, hierarchy)
        absent = [parameter for parameter in parameters if parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE]
        for dtype in dict.fromkeys(parameter.dtype for parameter in absent):
            _gather([parameter for parameter in absent if parameter.dtype == dtype], dtype, engine.device)
        return None

    first.all_gather = all_gather


@torch.no_grad()
def _gather(parameters: list[Any], dtype: torch.dtype, device: torch.device) -> None:
    """Make parameters of one dtype whole on every rank. A collective call."""
    sizes = [parameter.ds_tensor.ds_numel for parameter in parameters]  # of a rank's part, padding included
    mine = torch.cat([parameter.ds_tensor.view(-1).to(device) for parameter in parameters])
    world = dist.get_world_size()
    parts = torch.empty(world * len(mine), dtype=dtype, device=device)
    dist.all_gather_into_tensor(parts, mine)
    whole = torch.empty_like(parts)
    flat = whole.split([world * size for size in sizes])
    by_rank = parts.view(world, -1).split(sizes, dim=1)
    torch._foreach_copy_([one.view(world, -1) for one in flat], list(by_rank))
    for parameter, numbers in zip(parameters, flat, strict=True):
        parameter.data = numbers[: parameter.ds_numel].view(parameter.ds_shape)
        parameter.ds_status = ZeroParamStatus.AVAILABLE
