"""Whether what is planned fits into the hardware."""

from sorsa_ds.plan.job import Job
from sorsa_ds.plan.memory import Memory

HEADROOM = 0.05
"""Share of a GPU's memory that is left to what is not planned: fragmentation, kernels' workspaces."""


def room(job: Job) -> int:
    """Bytes of a GPU that may be planned for."""
    return int(job.hardware.gpu_memory * (1 - HEADROOM))


def of_a_node(job: Job, needed: Memory) -> int:
    """Bytes that all ranks of a node take of its own memory."""
    return job.hardware.gpus * needed.total_host


def fits(job: Job, needed: Memory) -> bool:
    """Whether it fits into the GPU with some headroom, and into the node's memory where that is known."""
    limit = job.hardware.host_memory
    return needed.total <= room(job) and (limit is None or of_a_node(job, needed) <= limit)
