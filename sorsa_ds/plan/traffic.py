"""Bytes over the wire in an optimizer step: what each GPU receives from its node, and each node from the others.

Collectives are counted as rings that visit node after node, as NCCL makes them: of S bytes that all ranks need, a rank
receives S (N - 1) / N, and a node S (M - 1) / M of the other M - 1 nodes; an all-reduce is twice that. What only the G
ranks of a node need (`zero_hpz_partition_size`: frozen parameters, and trained ones after they were gathered once in a
step) is S (G - 1) / G, and nothing between nodes. Of what attention exchanges among the ranks that share a sequence,
each receives the same from every one of them.
"""

from collections import Counter
from dataclasses import dataclass

from sorsa_ds.methods.registry import method_of
from sorsa_ds.plan.exchange import of_a_node
from sorsa_ds.plan.job import Job
from sorsa_ds.plan.model_facts import Facts


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that one optimizer step receives, by purpose.

    inside: received by a GPU from its own node. between: received by a node from the other nodes.
    """

    inside: dict[str, float]
    between: dict[str, float]


def traffic(job: Job, facts: Facts) -> Traffic:
    """The bytes of all micro-batches of an optimizer step together."""
    ranks, nodes = job.ranks, job.hardware.nodes
    steps = job.resolved.gradient_accumulation_steps
    itemsize = job.precision.factor_dtype.itemsize
    trained = facts.trainable * itemsize
    moved: dict[str, float] = {}  # bytes of an all-gather or a reduce-scatter with the same effect, over all ranks
    at_home: dict[str, float] = {}  # and over those of a node
    if job.stage == 3:
        frozen = sum(p.nbytes for p in facts.parameters if p.kind != "trained")
        if job.frozen_blocks < ranks:
            at_home = {"frozen parameters": job.uses * frozen, "trained parameters": (job.uses - 1) * trained}
            moved["trained parameters"] = trained
        else:
            moved |= {"frozen parameters": job.uses * frozen, "trained parameters": job.uses * trained}
        moved["gradients"] = steps * trained
    elif job.stage > 0:
        moved["gradients"] = (steps if job.stage == 2 else 1) * trained
        moved["trained parameters"] = trained
    else:
        moved["gradients"] = 2 * trained
    moved |= method_of(job.config).step_traffic(job.config, facts.targets, job.stage)
    everywhere = {name: size * (ranks - 1) / ranks for name, size in moved.items()}
    between = {name: size * (nodes - 1) / nodes for name, size in moved.items()}
    # Of what a node receives, each of its GPUs takes its share from outside; the rest comes from inside.
    inside = Counter({name: size - between[name] / job.hardware.gpus for name, size in everywhere.items()})
    inside.update({name: size * (job.frozen_blocks - 1) / job.frozen_blocks for name, size in at_home.items()})
    if (exchanged := _exchanged(job, facts)) > 0:
        here = of_a_node(job.together, job.hardware.gpus)
        inside.update({"attention": exchanged * (here - 1) / job.together})
        between["attention"] = job.hardware.gpus * exchanged * (job.together - here) / job.together
    return Traffic({k: v for k, v in inside.items() if v > 0}, {k: v for k, v in between.items() if v > 0})


def _exchanged(job: Job, facts: Facts) -> int:
    """Bytes of a rank's share of what attention exchanges in a step, forward, backward and where it is recomputed.

    Of them a rank sends and receives all but those of its own heads and positions.
    """
    passes = 3 if job.config.train.gradient_checkpointing else 2
    numbers = passes * job.step_tokens * facts.exchanged.sent * len(facts.kept.blocks)
    return numbers * job.precision.compute_dtype.itemsize
