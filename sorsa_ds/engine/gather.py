"""From the sharded fp32 masters of a running engine to whole tensors on rank 0, and to one adapter file."""

from collections.abc import Collection, Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from sorsa_ds.engine.engine import SorsaEngine
from sorsa_ds.model.adapter_file import FactorFile
from sorsa_ds.runtime import collectives
from sorsa_ds.runtime.files import write_atomic


def save_factors(engine: SorsaEngine, path: Path, left_out: Collection[str] = ()) -> None:
    """Gather the fp32 masters tensor by tensor to rank 0, which writes them and checks the file. A collective call.

    Args:
        left_out: names of tensors that are not written.

    Raises:
        ValueError: on rank 0, which cannot write the file or reads back something else than it wrote.
        PeerError: on the other ranks then.
    """
    whole = gathered(engine, [name for name in engine.trained_shapes if name not in left_out])
    collectives.together(lambda: _write(path, whole), engine.device, on=0)


def gathered(engine: SorsaEngine, names: Iterable[str]) -> dict[str, Tensor]:
    """Copies of whole trained tensors on rank 0, fp32 on the CPU; an empty dictionary elsewhere. A collective call."""
    mine = {fragment.name: fragment for fragment in engine.masters.fragments}
    whole: dict[str, Tensor] = {}
    for name in names:
        tensor = engine.masters.full(name, engine.trained_shapes[name], mine.get(name), engine.device)
        if collectives.rank() == 0:
            whole[name] = tensor.cpu()
    return whole


def _write(path: Path, whole: dict[str, Tensor]) -> None:
    """Write tensors to a safetensors file, and compare what it reads back with them."""
    write_atomic(path, lambda temporary: save_file(whole, temporary, metadata={"format": "pt"}))
    file = FactorFile(path)
    for name, tensor in whole.items():
        if not torch.equal(file.tensor(name), tensor):
            raise ValueError(f"{path}: {name} reads back differently from what was written; check the disk")
