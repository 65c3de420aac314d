"""Floating point operations of a step, and an estimate of its seconds."""

from dataclasses import dataclass

from sorsa_ds.plan.facts import Facts
from sorsa_ds.plan.job import Job
from sorsa_ds.plan.traffic import Traffic


@dataclass(frozen=True, slots=True)
class Speed:
    """Of one optimizer step. flops: of one rank. compute, inside, between: seconds of each alone.

    seconds: computing and communication overlap, so the longest of the three. Latencies, the optimizer's own step and
    ranks that wait for each other are not in it.
    """

    flops: float
    compute: float
    inside: float
    between: float
    tokens: int

    @property
    def seconds(self) -> float:
        return max(self.compute, self.inside, self.between)

    @property
    def tokens_per_second(self) -> float:
        """Of the whole job, at the longest sequences."""
        return self.tokens / self.seconds


def flops(job: Job, facts: Facts) -> float:
    """Of one rank in an optimizer step, a product of (a, b) and (b, c) being 2 a b c.

    A frozen linear has a forward and an input gradient, but no weight gradient; U and V have all three. Attention is
    causal: half of the square. Checkpointing makes the blocks' forward once more.
    """
    tokens = job.tokens
    frozen = sum(2 * t.out_features * t.in_features for t in facts.targets)
    factors = sum(2 * t.rank * (t.out_features + t.in_features) for t in facts.targets)
    attention = 2 * job.config.data.max_length * facts.hidden * len(facts.kept.blocks)
    others = sum(2 * m * n for m, n in facts.linears)
    forward = frozen + factors + attention
    again = forward if job.config.train.gradient_checkpointing else 0
    one = tokens * (2 * (frozen + others) + 3 * factors + 3 * attention + again)
    return float(one * job.resolved.gradient_accumulation_steps)


def speed(job: Job, facts: Facts, moved: Traffic) -> Speed:
    """An estimate from the hardware's figures."""
    hardware = job.hardware
    needed = flops(job, facts)
    return Speed(
        needed,
        needed / (hardware.tflops * 1e12 * hardware.efficiency),
        sum(moved.inside.values()) / (hardware.gpu_bandwidth * 1e9),
        sum(moved.between.values()) / (hardware.node_bandwidth * 1e9),
        job.resolved.global_batch_size * job.config.data.max_length,
    )
