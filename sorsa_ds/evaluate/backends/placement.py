"""Where a model of transformers lies: on one device, or spread over the GPUs, memory and disk by accelerate."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from sorsa_ds.model.pretrained import PretrainedWeights
from sorsa_ds.runtime import collectives
from sorsa_ds.runtime.memory import GIB, free_memory
from sorsa_ds.sorsa.residual_storage import Storage, stored_bytes

ROOM = 1.15
"""Factor on the weights' bytes: what a device needs for activations and keys and values beside them."""

_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2}


@dataclass(frozen=True, slots=True)
class Placement:
    """The arguments of `from_pretrained` that place a model, and a sentence where it does not lie on one device."""

    arguments: Mapping[str, Any]
    told: str = ""


def place(folder: Path, dtype: torch.dtype | None, device: torch.device) -> Placement:
    """Put a model on the device if it fits there, else spread it over all that this process may use.

    Args:
        folder: the model in the format of transformers.
        dtype: the dtype of the loaded weights; None: the dtype that they have on disk.
        device: where this rank computes.

    Raises:
        ValueError: the model does not fit on one device, and several ranks share the machine.
    """
    needed = weight_bytes(folder, dtype)
    here = _free(device)
    if needed * ROOM <= here:
        return Placement({"device_map": {"": device}})
    size = f"the model's weights take {needed / GIB:.1f} GiB, and {here / GIB:.1f} GiB are free on {device}"
    if collectives.world_size() > 1:
        raise ValueError(
            f"--model: {size}. One process without launcher spreads a model over all GPUs: python launch/evaluate.py "
            f"...; or give --backend vllm (a run or an adapter is merged for it: launch/export.py --format merged)"
        )
    limits: dict[int | str, int] = {"cpu": int(free_memory() / ROOM)}
    gpus = range(torch.cuda.device_count() if device.type == "cuda" else 0)
    limits |= {index: int(_free(torch.device("cuda", index)) / ROOM) for index in gpus}
    on_gpus = sum(limits[index] for index in gpus)
    where = f"{len(gpus)} GPUs" if needed <= on_gpus else "memory and disk" if not gpus else "GPUs, memory and disk"
    slow = "" if needed <= on_gpus else "; expect it to be slow, since every token reads what is not on a GPU"
    return Placement(
        {"device_map": "auto", "max_memory": limits},
        f"Spread over {where}: {size}{slow}.",
    )


def check_fits(needed: int, device: torch.device, exporting: str) -> None:
    """Stop where a model that is put together from a base model and trained tensors does not fit on one device.

    Args:
        needed: bytes of its weights.
        exporting: the command, or what to do, that makes of it a model that `place` can spread.

    Raises:
        ValueError: the model's weights take more bytes than are free on the device.
    """
    if needed > (here := _free(device)):
        raise ValueError(
            f"--model: the weights of this model take {needed / GIB:.1f} GiB, and {here / GIB:.1f} GiB are free on "
            f"{device}; what is put together from a base model and trained tensors must fit on one device. Write it as "
            f"a model of its own, which is spread over all GPUs (python without launcher) or goes to --backend vllm: "
            f"{exporting}"
        )


def weight_bytes(folder: Path, dtype: torch.dtype | None, packed: Mapping[str, Storage] = MappingProxyType({})) -> int:
    """The bytes of all weights of a model once they are loaded.

    Args:
        dtype: the dtype of the loaded floating-point weights; None: the dtype that they have on disk.
        packed: how parameters are stored that are kept in another way, by name.
    """
    weights, total = PretrainedWeights(folder), 0
    for name in weights.names:
        stored, shape = weights.header(name)
        if name in packed:
            total += stored_bytes(packed[name], shape)
        else:
            floating = stored in ("F64", "F32", "F16", "BF16")
            total += shape.numel() * (dtype.itemsize if dtype and floating else _ITEM_BYTES.get(stored, 1))
    return total


def _free(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
