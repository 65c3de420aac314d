"""The machines that a run is planned for."""

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
