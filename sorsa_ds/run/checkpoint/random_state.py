"""The states of the random generators of this process, as tensors that a checkpoint can hold."""

import json
import random
from typing import cast

import numpy as np
import torch
from torch import Tensor

from sorsa_ds.runtime.device import device_type
from sorsa_ds.runtime.json_text import parse_json

PREFIX = "random/"
_TORCH, _CUDA, _OTHERS = f"{PREFIX}torch", f"{PREFIX}cuda", f"{PREFIX}python_and_numpy"


def take() -> dict[str, Tensor]:
    """All states as uint8 tensors, by name: torch on the CPU and on this rank's GPU, Python's, and numpy's."""
    name, keys, position, has_gauss, gauss = cast(tuple, np.random.get_state())  # a dictionary only if asked for
    others = json.dumps([random.getstate(), [name, keys.tolist(), position, has_gauss, gauss]])
    states = {_TORCH: torch.get_rng_state(), _OTHERS: torch.tensor(list(others.encode()), dtype=torch.uint8)}
    if torch.cuda.is_initialized():
        states[_CUDA] = torch.cuda.get_rng_state()
    return states


def put_back(states: dict[str, Tensor]) -> None:
    """Set the generators to states that `take` has returned."""
    torch.set_rng_state(states[_TORCH])
    (version, words, gauss), (name, keys, *rest) = parse_json(bytes(states[_OTHERS].tolist()))
    random.setstate((version, tuple(words), gauss))
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    if _CUDA in states and device_type() == "cuda":
        torch.cuda.set_rng_state(states[_CUDA])
