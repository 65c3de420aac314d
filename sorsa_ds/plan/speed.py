"""Floating point operations of a step, and an estimate of its seconds."""

from dataclasses import dataclass

from sorsa_ds.plan.job import Job
from sorsa_ds.plan.model_facts import Facts, Linear
from sorsa_ds.plan.traffic import Traffic


@dataclass(frozen=True, slots=True)
class Speed:
    """An estimate of one optimizer step.

    flops: floating point operations of one rank.
    compute, inside, between: seconds of computing and of communication inside and between nodes, each alone.
    dense: seconds of making packed weights dense.
    tokens: tokens of the whole job's batch, at the longest sequences.
    """

    flops: float
    compute: float
    dense: float
    inside: float
    between: float
    tokens: int

    @property
    def seconds(self) -> float:
        """The longest of three things that overlap: the GPU's work, and communication inside and between nodes.

        The GPU makes weights dense and computes in turn. Latencies, the optimizer's own arithmetic and ranks that wait
        for each other are left out.
        """
        return max(self.compute + self.dense, self.inside, self.between)

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of the whole job, at the longest sequences."""
        return self.tokens / self.seconds


@dataclass(frozen=True, slots=True)
class ModelFlops:
    """Floating point operations of a model's forward and backward passes; a product of (a, b) and (b, c) takes 2 a b c.

    A frozen linear has a forward and an input gradient, but no weight gradient; a trained one, and the two of an
    adapter, have all three. Attention is causal: half of the square, over whole sequences, whatever their window. Of
    experts, only those count to which a token is sent. What does not grow with the tokens, as the norms of DoRA's
    weights, is left out, and so is the product of a router whose class is no linear.

    body: operations per token in all linears but the head.
    head: operations of the head per position whose logits are made.
    attention: operations of attention in a sequence, divided by the square of its length.
    """

    body: float
    head: float
    attention: float

    @classmethod
    def of(cls, facts: Facts) -> "ModelFlops":
        """Those of a model."""
        body = head = 0
        for linear in facts.linears:
            product, adapter = _products(facts, linear)
            both = (3 if linear.trained else 2) * product + 3 * adapter
            body, head = (body, head + both) if linear.head else (body + both, head)
        return cls(body, head, 3 * 2 * facts.attention * len(facts.kept.blocks))

    def of_batch(self, tokens: int, logits: int, squares: int) -> float:
        """Those of a batch, with each block's forward made once.

        Args:
            tokens: without padding. logits: the positions whose logits are needed.
            squares: the sum of the squares of the sequences' lengths.
        """
        return float(tokens * self.body + logits * self.head + squares * self.attention)


def _products(facts: Facts, linear: Linear) -> tuple[int, int]:
    """What a token's forward takes in a linear, and in the adapter beside it."""
    rows = facts.rows(linear)
    return 2 * rows * linear.m * linear.n, 2 * rows * linear.rank * (linear.m + linear.n)


def flops(job: Job, facts: Facts) -> float:
    """Floating point operations of one rank in an optimizer step, at the longest sequences (`ModelFlops`).

    Every position has logits. Checkpointing makes the blocks' forward once more.
    """
    tokens, length, model = job.step_tokens, job.config.data.max_length, ModelFlops.of(facts)
    both = model.of_batch(tokens, tokens, tokens * length)
    if not job.config.train.gradient_checkpointing:
        return both
    again = sum(sum(_products(facts, linear)) for linear in facts.linears if not linear.head)
    return both + tokens * (again + length * model.attention / 3)


def densified(job: Job, facts: Facts) -> float:
    """Bytes that a rank reads and writes in an optimizer step to make packed weights dense.

    At each use it reads codes and scales, and writes the matrix in the dtype of the product.
    """
    if not job.storage.quantised:
        return 0.0
    packed = sum(p.nbytes for p in facts.parameters if p.kind == "residual")
    matrices = sum(target.numel for target in facts.targets) * job.precision.compute_dtype.itemsize
    return float(job.uses * (packed + matrices))


def speed(job: Job, facts: Facts, moved: Traffic) -> Speed:
    """Estimate the seconds of an optimizer step from the hardware's figures."""
    hardware = job.hardware
    needed = flops(job, facts)
    return Speed(
        needed,
        needed / (hardware.tflops * 1e12 * hardware.efficiency),
        densified(job, facts) / (hardware.memory_bandwidth * 1e9),
        sum(moved.inside.values()) / (hardware.gpu_bandwidth * 1e9),
        sum(moved.between.values()) / (hardware.node_bandwidth * 1e9),
        job.resolved.global_batch_size * job.config.data.max_length,
    )
