"""Reading the tensors of a checkpoint: any flat range, whichever ranks wrote it."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sorsa_ds.model.pretrained import all_finite


class SavedTensors:
    """The tensors of a checkpoint, whichever ranks wrote which part of them.

    Args:
        files: the files of all ranks.

    Raises:
        ValueError: a file is missing or damaged, or a tensor is not stored in fp32.
    """

    def __init__(self, files: list[Path]):
        self._folder = files[0].parent
        # (part, parameter) -> (first number, how many, file, key in the file) of each piece
        self._pieces: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        for path in files:
            try:
                file = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path}: missing, truncated or not a safetensors file ({error})") from error
            for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                part, _, place = key.partition("/")
                name, at, start = place.rpartition("@")
                if at:
                    piece = file.get_slice(key)
                    if piece.get_dtype() != "F32":
                        raise ValueError(f"{path}: {key} is stored as {piece.get_dtype()}, not as F32")
                    numel = piece.get_shape()[0]
                    self._pieces.setdefault((part, name), []).append((int(start), numel, file, key))

    def read(self, part: str, name: str, start: int, numel: int) -> Tensor:
        """Numbers [start, start + numel) of one part of a parameter, flat fp32 on the CPU.

        Args:
            part: `values`, `exp_avg` or `exp_avg_sq`.
            name: the parameter's name.

        Raises:
            ValueError: the files do not hold all of them.
        """
        out, found = torch.empty(numel), 0
        for first, length, file, key in self._pieces.get((part, name), []):
            low, high = max(first, start), min(first + length, start + numel)
            if low < high:
                out[low - start : high - start] = file.get_slice(key)[low - first : high - first]
                found += high - low
        if found != numel:
            raise ValueError(f"{self._folder}: it holds {found} of {numel} numbers of {name} ({part})")
        return out

    def values(self, name: str, shape: torch.Size) -> Tensor:
        """A whole trained tensor in fp32 on the CPU.

        Raises:
            ValueError: the files do not hold all of it, or a number in it is NaN or infinite.
        """
        whole = self.read("values", name, 0, shape.numel()).view(shape)
        if not all_finite(whole):
            raise ValueError(f"{self._folder}: {name} holds NaN or Inf")
        return whole


def read_own(path: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors of one rank's file whose names begin with `prefix`."""
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}  # noqa: SIM118
