"""The machines that a run is planned for."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sorsa_ds.runtime.memory import GIB

if TYPE_CHECKING:  # it comes with PyTorch, which takes seconds, and the command line is read before
    from sorsa_ds.runtime.precision import Device


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What a run is planned for.

    gpus: number of GPUs per node.
    nodes: number of nodes.
    gpu_memory: bytes of one GPU that a rank may take.
    tflops: dense bf16 TFLOP/s of one GPU, as its maker says.
    efficiency: the share of `tflops` that training reaches.
    gpu_bandwidth: GB/s that a GPU receives from the others of its node.
    node_bandwidth: GB/s that a node receives from the others.
    memory_bandwidth: GB/s at which a GPU reads and writes its own memory.
    host_memory: bytes of a node's own memory that the job may take; None: unknown.
    device: what the ranks compute on; on `cpu` everything lies in the nodes' own memory, and `gpus` are ranks.

    The defaults are an H100 SXM with NVLink 4 (450 GB/s per direction) and one 400 Gb/s card per GPU, at 80 % of both.
    """

    gpus: int = 1
    nodes: int = 1
    gpu_memory: int = 80 * GIB
    tflops: float = 989.0
    efficiency: float = 0.4
    gpu_bandwidth: float = 360.0
    node_bandwidth: float = 320.0
    memory_bandwidth: float = 3350.0
    host_memory: int | None = None
    device: "Device" = "cuda"

    @property
    def ranks(self) -> int:
        """Number of ranks, one per GPU."""
        return self.gpus * self.nodes


_DENSE_BF16 = {
    r"B200": 2250.0,
    r"GB200": 2500.0,
    r"H[18]00 80GB HBM3|H800|H200|GH200 \d+GB": 989.0,
    r"H100 NVL|H200 NVL": 835.0,
    r"H[18]00 PCIe": 756.0,
    r"A[18]00(-SXM4|-PCIE)?[- ]\d+GB( PCIe)?": 312.0,
    r"A30": 165.0,
    r"A40": 149.7,
    r"A10": 125.0,
    r"L40S": 362.0,
    r"L40": 181.0,
    r"L4": 121.0,
    r"RTX A6000": 154.8,
    r"RTX 6000 Ada Generation": 364.0,
    r"GeForce RTX 3090": 71.0,
    r"GeForce RTX 4090": 165.2,
    r"GeForce RTX 5090": 209.5,
}
"""Dense bf16 TFLOP/s summed in fp32, by NVIDIA's data sheets: pattern of the name that CUDA gives -> of the whole GPU.

A part of a GPU (MIG) has its own name, which no pattern matches.
"""


def peak_tflops(name: str, *, tf32: bool = False) -> float | None:
    """Dense bf16 TFLOP/s of a GPU as its maker says, or those in TF32, which are half of them; None: it is not known.

    Args:
        name: the GPU's name, as `torch.cuda.get_device_name` gives it.
    """
    bare = name.removeprefix("NVIDIA ").strip()
    found = next((tflops for pattern, tflops in _DENSE_BF16.items() if re.fullmatch(pattern, bare)), None)
    return found / 2 if found is not None and tf32 else found
