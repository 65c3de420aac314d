"""The input directions of a base model's linears that its texts use least: the file that `sorsa calibrate` writes.

A linear y = W x uses a direction d of its inputs as much as its second moment says, d^T E[x x^T] d, the mean being over
the tokens of texts. The file has, of every linear, the K directions with the smallest moments, in safetensors:

    NAME.directions   (K, N) fp32, orthonormal rows, the least used first
    NAME.probe        (M,) fp32, W p with a random p that belongs to the name, by which W is recognised

What the weight makes of the directions could not tell it: fine-tuning hardly changes that.
Shapes: W (M, N), K directions that are kept, R that are trained.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sorsa_ds.model.targets import Target
from sorsa_ds.runtime import digest
from sorsa_ds.runtime.files import write_atomic
from sorsa_ds.runtime.json_text import parse_json
from sorsa_ds.runtime.numerics import full_fp32_products

FORMAT = 1
"""Part of the file. Raise it when its tensors change their names or their meaning."""
_KEY = "sorsa_ds.input_directions"
_TOLERANCE = 0.005
"""How far W p may be from what the file says, relative to its norm. Rounding a base model to bf16 or fp16 moves it by
up to 0.002 (tested); training moves it by as much as it moves the weights."""
_ORTHONORMAL = 1e-4
"""How far products of directions may be from those of orthonormal ones: their rounding to fp32 is far below."""


@dataclass(frozen=True, slots=True)
class Directions:
    """What the file has of a linear. directions_KN: orthonormal rows. probe_M: the image of `probe_vector`."""

    directions_KN: Tensor
    probe_M: Tensor


@dataclass(frozen=True, slots=True)
class Origin:
    """What the directions were made from. model: the base model's name. texts: a sentence on the texts."""

    model: str
    texts: str
    tokens: int


def write_directions(path: Path, found: Mapping[str, Directions], origin: Origin) -> None:
    """Write the directions of linears, by their names.

    Raises:
        ValueError: the disk refuses.
    """
    tensors = {f"{name}.directions": one.directions_KN.contiguous() for name, one in found.items()}
    tensors |= {f"{name}.probe": one.probe_M.contiguous() for name, one in found.items()}
    metadata = {_KEY: json.dumps({"format": FORMAT, **asdict(origin)})}
    write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


class InputDirections:
    """Reads the file that `sorsa.directions` names, a linear at a time.

    Raises:
        ValueError: there is no such file, or it is another kind of file, or damaged.
    """

    def __init__(self, path: str):
        self._path = Path(path).expanduser()
        if not self._path.is_file():
            raise ValueError(f"sorsa.directions={path}: there is no such file; `sorsa calibrate` writes it")
        try:
            with safe_open(self._path, framework="pt") as file:
                described = parse_json((file.metadata() or {}).get(_KEY, "null"))
                self._shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError) as error:
            raise ValueError(f"sorsa.directions={path} cannot be read: {error}") from error
        if not isinstance(described, dict) or described.get("format") != FORMAT:
            raise ValueError(f"sorsa.directions={path} is no file of directions; `sorsa calibrate` writes one")
        self._model = str(described.get("model"))

    def check(self, targets: Sequence[Target]) -> None:
        """Stop before weights are read where the file does not have what the layers need.

        Raises:
            ValueError: naming the first such layer.
        """
        for target in targets:
            if target.experts:
                raise ValueError(
                    f"sorsa.triplets=null_space: {target.name} holds experts, whose inputs are not measured; leave it "
                    f"out (adapter.exclude, or adapter.experts=frozen) or train other triplets"
                )
            self._check_layer(target.name, target.in_features, target.rank)

    def of(self, name: str, weight: Tensor, rank: int) -> Tensor:
        """The R least used input directions (R, N) of a linear, in fp32 on the weight's device.

        Args:
            weight: (M, N), for which they are.
            rank: R.

        Raises:
            ValueError: the file has not as many of this linear, is damaged, or was made for another weight.
        """
        self._check_layer(name, weight.shape[1], rank)
        with safe_open(self._path, framework="pt") as file:
            directions_RN = file.get_slice(f"{name}.directions")[:rank].to(weight.device, torch.float32)
            probe_M = file.get_tensor(f"{name}.probe").to(weight.device, torch.float32)
        off_RR = directions_RN @ directions_RN.t() - torch.eye(rank, device=weight.device)
        if not bool(off_RR.abs().max() < _ORTHONORMAL):
            raise ValueError(f"{self._path} is damaged: its directions of {name} are not orthonormal; make it anew")
        if probe_M.shape != weight.shape[:1] or not _are_near(probe_of(name, weight), probe_M):
            raise ValueError(
                f"{self._path} was made from {self._model}, whose {name} has other weights; make it anew from this "
                f"base model (sorsa calibrate)"
            )
        return directions_RN

    def _check_layer(self, name: str, in_features: int, rank: int) -> None:
        shape = self._shapes.get(f"{name}.directions")
        if shape is None:
            raise ValueError(
                f"{self._path} has no input directions of {name}: it was made from {self._model}, of the linears that "
                f"enough of its texts' tokens reach; make it anew with more texts, or leave this linear out"
            )
        if len(shape) != 2 or f"{name}.probe" not in self._shapes:
            raise ValueError(f"{self._path} is damaged: it has not all of {name}; make it anew (sorsa calibrate)")
        if shape[1] != in_features:
            raise ValueError(
                f"{self._path} was made from {self._model}, whose {name} has {shape[1]} inputs, and here it has "
                f"{in_features}; make it anew from this base model (sorsa calibrate)"
            )
        if shape[0] < rank:
            raise ValueError(
                f"{self._path} has {shape[0]} directions of {name}, and rank {rank} takes as many as that: make it "
                f"anew with --rank {rank}"
            )


def is_directions_file(path: Path) -> bool:
    """Whether a file is one of directions, of any format."""
    try:
        with safe_open(path, framework="pt") as file:
            return _KEY in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def probe_of(name: str, weight: Tensor) -> Tensor:
    """W p (M,) in fp32: what a weight (M, N) makes of the random vector that belongs to a linear's name."""
    seed = int(digest.of_bytes(name.encode())[:12], 16)
    vector_N = torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(seed))
    with full_fp32_products():
        return weight.float() @ vector_N.to(weight.device)


def _are_near(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).norm() <= _TOLERANCE * other.norm())
