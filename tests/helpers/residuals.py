"""Packed residuals, and the matrices that they stand for, computed by hand."""

import numpy as np
import torch

from sorsa_ds.sorsa.packed_storage import Int8, Nf4, Nf4Double

PACKED = {"nf4": Nf4(64), "nf4_double": Nf4Double(64), "int8": Int8(64)}
LEVELS = np.array([
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0, 0.0795803, 0.1609302,
    0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
])  # fmt: skip
"""NF4's, from table 5 of the QLoRA paper."""


def levels_by_hand(codes):
    """The NF4 level of every number, two of them in a byte."""
    raw = codes.numpy().ravel()
    return LEVELS[np.stack([raw >> 4, raw & 15], 1).ravel()]


def nf4_by_hand(tensors, shape, size=64):
    """The matrix that packed NF4 tensors stand for, in float64."""
    codes, scales = (t.contiguous() for t in tensors)
    absmax = np.frombuffer(scales.numpy().tobytes(), np.float32)
    numbers = levels_by_hand(codes).reshape(-1, size) * absmax[:, None]
    return torch.from_numpy(numbers.ravel()[: shape[0] * shape[1]].reshape(shape))


def packed_of(model):
    """Every packed tensor of a whole model, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.dtype == torch.uint8}


def residuals_by_hand(packed, start):
    """W_r of every layer, in fp32, from its packed NF4 tensors."""
    residuals = {}
    for name in {n.rpartition(".")[0] for n in start}:
        shape = len(start[f"{name}.U"]), len(start[f"{name}.V"])
        residuals[name] = nf4_by_hand([packed[f"{name}.{leaf}"] for leaf in Nf4.names], shape).float()
    return residuals
