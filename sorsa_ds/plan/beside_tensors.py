"""Bytes that CUDA and NCCL take of a GPU beside PyTorch's tensors. PyTorch's own counters do not see them.

None of these figures was measured by this project: its GPU was one and alone (docs/results/gpu.md), where there is no
communicator, and what was compared there was PyTorch's tensors. They are others' figures, for GPUs with NVLink, and are
taken as they stand: NCCL takes less between GPUs with fewer channels.
"""

from sorsa_ds.plan.exchange import of_a_node
from sorsa_ds.plan.job import Job

CONTEXT = 600 * 2**20
"""What CUDA, its kernels and cuBLAS take in every process."""

PAIR, LARGER = 544 * 2**20, 688 * 2**20
"""A communicator of two ranks, and one of more, after an all-reduce on A100s (NVIDIA/nccl, issue 964). It does not
grow with the number of ranks beyond two nodes (issue 864)."""

PEER = 3_280_000_000 // 7
"""What an all-to-all adds for every other rank of a node, and keeps: 3.28 GB on eight H100s (NVIDIA/nccl, issue 1685).
ZeRO-3 deals out the weights by such exchanges while the model is made."""


def communicators(job: Job) -> list[int]:
    """The number of ranks in each NCCL communicator of a rank, in the order in which they are made.

    PyTorch makes the first for all ranks; DeepSpeed makes a second for all of them, and with hpZ one for those of a
    node. The ranks that compute a sequence together have one, made last.
    """
    sizes = [job.ranks, job.ranks]
    if job.stage == 3 and job.frozen_blocks < job.ranks:
        sizes.append(job.frozen_blocks)
    sizes.append(job.together)
    return [size for size in sizes if size > 1]


def nccl(job: Job) -> int:
    """Bytes of a rank's communicators in training."""
    peers = job.hardware.gpus - 1 if job.stage == 3 else 0
    peers += of_a_node(job.together, job.hardware.gpus) - 1
    return sum(map(_communicator, communicators(job))) + PEER * peers


def at_the_start(job: Job) -> int:
    """Bytes that a rank has taken when its process group is there and nothing is loaded yet."""
    return CONTEXT + sum(map(_communicator, communicators(job)[:1]))


def _communicator(ranks: int) -> int:
    return PAIR if ranks == 2 else LARGER
