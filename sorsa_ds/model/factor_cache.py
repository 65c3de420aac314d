"""A cache of decompositions: one safetensors file for each, found by the weight that was decomposed.

The key is a hash of the weight's bytes, of its layer's name, and of everything else that decides its factors, so it
holds for every world size and ZeRO stage. A file that is damaged or belongs to another weight is made anew.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sorsa_ds.model.targets import Target
from sorsa_ds.runtime import digest
from sorsa_ds.runtime.files import write_atomic
from sorsa_ds.runtime.json_text import parse_json
from sorsa_ds.sorsa.decompose import Accuracy, Decomposition

FORMAT = 2
"""Part of the key. Raise it when the decomposition or the files change so that old files would be wrong."""

Decompose = Callable[[Target, Tensor], Decomposition]


class CachedDecompose(Protocol):
    """What `FactorCache.wrap` returns; it is a `sorsa_ds.model.fill.FactorSource`."""

    def __call__(self, target: Target, weight: Tensor, known: str | None = None, /) -> Decomposition:
        """The decomposition of a weight, whose parameter's digest may be known."""


@dataclass(slots=True)
class CachedDecomposition(Decomposition):
    """A decomposition that was read from the cache."""


class FactorCache:
    """Wraps a function that decomposes, so that it reads what the cache has and writes what it does not have.

    Args:
        folder: where the files lie; made when the first is written.
        settings: everything besides weight, rank and name that decides the factors.
        warn: called with a message when a file is made anew or cannot be written; neither stops a run.
    """

    def __init__(self, folder: Path, settings: dict, warn: Callable[[str], None]):
        self._folder = folder
        self._settings = settings
        self._warn = warn

    def wrap(self, decompose: Decompose) -> CachedDecompose:
        """The function `decompose`, answered from the cache where the cache has the weight.

        The function that is returned also takes the digest of the parameter that the weight is a view of. Given none,
        it takes the digest itself, which reads the weight once more, on a GPU by copying it back.
        """

        def cached(target: Target, weight: Tensor, known: str | None = None) -> Decomposition:
            key = self._key(target, weight, known)
            path = self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.safetensors"
            if os.path.exists(path):  # False, and no error, where the folder cannot be searched
                try:
                    return _read(path, key, weight.device)
                except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
                    self._warn(f"{path}: damaged or foreign ({error}); {target.name} is decomposed again")
            found = decompose(target, weight)
            try:
                write_atomic(path, lambda temporary: _write(temporary, key, found))
            except ValueError as error:
                self._warn(f"the factor cache is not written: {error}")
            return found

        return cached

    def _key(self, target: Target, weight: Tensor, known: str | None) -> str:
        parts: dict[str, Any] = {
            "format": FORMAT,
            "weight": known or digest.of_tensor(weight.mT if target.transposed else weight),
            "shape": list(weight.shape),
            "dtype": str(weight.dtype),
            "rank": target.rank,
            "name": target.name,  # it seeds the random numbers
            **self._settings,
        }
        if target.transposed:
            parts["transposed"] = True  # the digest is of the parameter as it is stored
        return json.dumps(parts, sort_keys=True)


def _write(path: Path, key: str, found: Decomposition) -> None:
    tensors = {"U": found.U.cpu(), "s": found.s.cpu(), "V": found.V.cpu()}
    metadata = {"key": key, "accuracy": json.dumps(asdict(found.accuracy)), "checksum": _checksum(tensors)}
    save_file(tensors, path, metadata=metadata)


def _read(path: Path, key: str, device: torch.device) -> CachedDecomposition:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name).clone() for name in ("U", "s", "V")}
    if metadata.get("key") != key:
        raise ValueError("it was made from another weight or with other settings")
    if metadata.get("checksum") != _checksum(tensors):
        raise ValueError("its numbers do not fit its checksum")
    accuracy = Accuracy(**parse_json(metadata["accuracy"]))
    U, s, V = (tensors[name].to(device) for name in ("U", "s", "V"))
    return CachedDecomposition(U, s, V, accuracy)


def _checksum(tensors: dict[str, Tensor]) -> str:
    return " ".join(f"{name}{list(t.shape)}:{digest.of_tensor(t)}" for name, t in sorted(tensors.items()))
