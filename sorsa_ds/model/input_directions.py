"""The input directions of a base model's linears that its texts use least: the file that `sorsa calibrate` writes.

A linear y = W x uses a direction d of its inputs as much as its second moment says, d^T E[x x^T] d, the mean being over
the tokens of texts. The file has, of every linear, the K directions with the smallest moments, in safetensors:

    NAME.directions   (K, N) fp32, orthonormal rows, the least used first
    NAME.images       (K,) fp32, the norms ||W d||, by which it shows whether a weight is the one they were made for

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
from sorsa_ds.runtime.files import write_atomic
from sorsa_ds.runtime.json_text import parse_json

FORMAT = 1
"""Part of the file. Raise it when its tensors change their names or their meaning."""
_KEY = "sorsa_ds.input_directions"
_TOLERANCE = 0.02
"""How far ||W d|| may be from what the file says, relative to it and to what a random direction has: a base model in
bf16 and the same in fp32 are four times nearer to each other."""


@dataclass(frozen=True, slots=True)
class Directions:
    """What the file has of a linear. directions: (K, N). images: (K,)."""

    directions_KN: Tensor
    images_K: Tensor


@dataclass(frozen=True, slots=True)
class Origin:
    """What the directions were made from, in words and numbers. model: the base model. texts: a sentence."""

    model: str
    texts: str
    tokens: int


def write_directions(path: Path, found: Mapping[str, Directions], origin: Origin) -> None:
    """Write the directions of linears, by their names.

    Raises:
        ValueError: the disk refuses.
    """
    tensors = {f"{name}.directions": one.directions_KN.contiguous() for name, one in found.items()}
    tensors |= {f"{name}.images": one.images_K.contiguous() for name, one in found.items()}
    metadata = {_KEY: json.dumps({"format": FORMAT, **asdict(origin)})}
    write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


class InputDirections:
    """Reads the file that `sorsa.directions` names, a linear at a time.

    Raises:
        ValueError: there is no such file, or it is another kind of file, or damaged.
    """

    def __init__(self, path: str):
        self._path = Path(path).expanduser()
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
            ValueError: the file has not as many of this linear, or they were made for another weight.
        """
        self._check_layer(name, weight.shape[1], rank)
        with safe_open(self._path, framework="pt") as file:
            kept = (file.get_slice(f"{name}.{leaf}")[:rank] for leaf in ("directions", "images"))
            directions_RN, images_R = (tensor.to(weight.device, torch.float32) for tensor in kept)
        off = (images_of(weight, directions_RN) - images_R).abs()
        typical = torch.linalg.matrix_norm(weight.float()) / weight.shape[1] ** 0.5
        if not bool((off <= _TOLERANCE * (images_R + typical)).all()):
            raise ValueError(
                f"sorsa.directions={self._path} was made from {self._model}, whose {name} has other weights; make it "
                f"anew from this base model (sorsa calibrate)"
            )
        return directions_RN

    def _check_layer(self, name: str, in_features: int, rank: int) -> None:
        shape = self._shapes.get(f"{name}.directions")
        if shape is None:
            raise ValueError(
                f"sorsa.directions={self._path} has nothing of {name}: it was made from {self._model}, of the linears "
                f"that its texts reach; make it anew, or leave this one out (adapter.exclude)"
            )
        if shape[1] != in_features:
            raise ValueError(
                f"sorsa.directions={self._path}: {name} has {in_features} inputs and {shape[1]} in the file, which was "
                f"made from {self._model}"
            )
        if shape[0] < rank:
            raise ValueError(
                f"sorsa.directions={self._path} has {shape[0]} directions of {name}, and rank {rank} takes as many as "
                f"that: make it anew with --rank {rank}"
            )


def images_of(weight: Tensor, directions_KN: Tensor) -> Tensor:
    """The norms ||W d|| (K,) of what a weight (M, N) makes of directions."""
    return torch.linalg.vector_norm(directions_KN.to(weight.device) @ weight.float().t(), dim=1)
