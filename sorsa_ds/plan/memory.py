"""Bytes that one rank holds, on its GPU and in the host's memory, by what they are for.

What DeepSpeed 0.19.8 allocates on each stage was read off live tensors; tests hold the parameters, the optimizer and
the residual to them exactly. Activations are counted (`activations`); buffers are what their settings allow.

Letters: T trained numbers, N ranks, f bytes of a trained number as the model holds it (4, or 2 in a bf16 engine).
"""

from dataclasses import dataclass

import torch

from sorsa_ds.engine.optimizers import moment_bytes_8bit
from sorsa_ds.methods.registry import method_of
from sorsa_ds.model import fill, pretrained
from sorsa_ds.model.targets import Target
from sorsa_ds.plan import beside_tensors
from sorsa_ds.plan.gathering import held_whole
from sorsa_ds.plan.job import Job
from sorsa_ds.plan.logits import LOGIT_BYTES, loss_chunk
from sorsa_ds.plan.model_facts import Facts, Held
from sorsa_ds.plan.offloading import offloaded_gradients, offloaded_parameters, taken
from sorsa_ds.sorsa.expert_layer import dense_together

_MOMENTS, _MASTER, _NUMBER = 8, 4, 4
_ALL_REDUCED = 5 * 10**8
"""Without ZeRO, gradients are joined until they are more numbers than this, and averaged over the ranks."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that one rank needs.

    gpu, host: component -> bytes in training, on the GPU and in the host's memory.
    initialisation: bytes on the GPU at most while the model is made.
    reading: bytes in the host's memory at most while the model is made.
    """

    gpu: dict[str, int]
    host: dict[str, int]
    initialisation: int
    reading: int

    @property
    def total(self) -> int:
        """Bytes on the GPU at most, in training or before it."""
        return max(sum(self.gpu.values()), self.initialisation + self.gpu["context"] + self.gpu["communicators"])

    @property
    def total_host(self) -> int:
        """Bytes in the host's memory: what is offloaded, and what is read. Each rank of a node takes as much."""
        return sum(self.host.values()) + self.reading


def memory(job: Job, facts: Facts) -> Memory:
    """Memory of the rank that needs most."""
    gpu = {"residual": 0, "frozen": 0, "trained": 0, "secondary": 0, "masters": 0, "moments": 0, "gradients": 0}
    host = dict(gpu)
    optimizer_at = host if job.offloaded("optimizer") else gpu
    held = [(parameter, _held(job, parameter)) for parameter in facts.parameters]
    if job.offloaded("param"):
        host |= offloaded_parameters(job, held)
    else:
        for parameter, nbytes in held:
            gpu[parameter.kind] += nbytes
    (host if job.offloaded("param") else gpu)["secondary"] = _secondary(job, facts)
    if job.stage in (1, 2):  # one flat tensor, filled up to a whole number of aligned parts
        gpu["trained"] = _padded(job, facts) * _itemsize(job)
    mine = _mine(job, facts)
    if _has_masters(job):
        optimizer_at["masters"] = taken(_MASTER * mine, job.pinned("optimizer") and job.stage < 3)
    optimizer_at["moments"] = _moments(job, facts, mine)
    gpu["gradients"] = _gradients(job, facts)
    if job.offloaded("optimizer"):
        host["gradients"] = offloaded_gradients(job, facts, mine)
        gpu["gradients"] = _itemsize(job) * facts.trainable if job.stage == 1 else 0
    gpu["gathered"] = _gathered(job, facts)
    gpu["dense weight"] = _largest_dense(job, facts)
    if job.stage < 3:
        formats = job.precision.compute_dtype, job.precision.factor_dtype
        gpu["step copies"] = method_of(job.config).step_copies_bytes(facts.targets, *formats)
    gpu["regulariser"] = _regulariser(job, facts)
    gpu["activations"], gpu["logits"] = _activations(job, facts)
    gpu["buffers"] = _buffers(job, facts, gpu["activations"] + gpu["logits"])
    on_gpu = job.hardware.device == "cuda"
    if on_gpu and job.config.output.save_every and not job.offloaded("optimizer"):
        host["checkpoint copies"] = _MASTER * mine + gpu["moments"]
    gpu["context"] = beside_tensors.CONTEXT if on_gpu else 0
    gpu["communicators"] = beside_tensors.nccl(job) if on_gpu else 0
    largest = facts.largest
    peak = method_of(job.config).working_set(job.config, facts.targets, largest, job.storage)
    peak = max(peak, fill.reading_bytes(facts.largest_whole) if facts.whole else 0)
    shards = 0 if job.offloaded("param") else sum(gpu[name] for name in ("residual", "frozen", "trained"))
    read = 4 * largest + fill.TRIM_BYTES + pretrained.REOPEN_BYTES
    return Memory(gpu, host, shards + peak, read)


def _held(job: Job, parameter: Held) -> int:
    """Bytes of one parameter on one rank."""
    return parameter.block(_blocks(job, parameter)) * parameter.itemsize


def _blocks(job: Job, parameter: Held) -> int:
    """Number of ranks among which a parameter is cut."""
    if job.stage < 3:
        return 1
    return job.ranks if parameter.kind == "trained" else job.frozen_blocks


def _itemsize(job: Job) -> int:
    return job.precision.factor_dtype.itemsize


def _padded(job: Job, facts: Facts) -> int:
    """T as ZeRO stages 1 and 2 hold it: filled up to a multiple of 2 N."""
    unit = 2 * job.ranks
    return -(-facts.trainable // unit) * unit


def _mine(job: Job, facts: Facts) -> int:
    """Trained numbers that this rank's optimizer updates."""
    if job.stage == 0:
        return facts.trainable
    if job.stage < 3:
        return _padded(job, facts) // job.ranks
    return sum(p.block(job.ranks) for p in facts.parameters if p.kind == "trained")


def _moments(job: Job, facts: Facts, mine: int) -> int:
    """Bytes of AdamW's two moments; `mine` are the numbers that this rank's optimizer updates."""
    if job.config.train.optimizer == "adamw":
        whole = _NUMBER * method_of(job.config).moment_numbers(job.config, facts.targets, facts.trainable)
        return whole if job.stage == 0 else _MOMENTS * mine
    if job.stage == 0:
        return sum(moment_bytes_8bit(p.block(1)) for p in facts.parameters if p.kind == "trained")
    return moment_bytes_8bit(mine)


def _has_masters(job: Job) -> bool:
    """Whether the optimizer's tensors are copies of the parameters; without ZeRO in fp32 they are themselves."""
    return job.stage > 0 or job.precision.name == "bf16"


def _gradients(job: Job, facts: Facts) -> int:
    """Bytes of gradients on the GPU at the optimizer step, where most of them are there."""
    bf16, trainable = job.precision.name == "bf16", facts.trainable
    if job.stage == 0:
        return (_MASTER + 2 if bf16 else _MASTER) * trainable
    if job.stage == 1:
        own = _MASTER * (_padded(job, facts) if bf16 else _mine(job, facts))  # in bf16 accumulated whole, in fp32
        return own + _itemsize(job) * trainable
    return _MASTER * _mine(job, facts)


def _buffers(job: Job, facts: Facts, gone: int) -> int:
    """Bytes of the buckets for communicating gradients and updated parameters.

    Args:
        gone: bytes of activations that are freed by then; without ZeRO the buckets take their place.
    """
    if job.stage == 0:
        return max(0, largest_bucket(facts) * _itemsize(job) - gone)
    copies = 2 if job.zero["overlap_comm"] and job.stage < 3 else 1
    numbers = copies * min(job.zero["reduce_bucket_size"], facts.trainable)
    if job.offloaded("optimizer") and job.stage < 3:  # a gradient that comes back from the host to be added to
        numbers += max(p.numel for p in facts.parameters if p.kind == "trained")
    return numbers * _itemsize(job)


def largest_bucket(facts: Facts) -> int:
    """Numbers in the largest bucket of gradients that is averaged at once without ZeRO, also by a single rank."""
    joined, largest = 0, 0
    for parameter in facts.parameters:
        if parameter.kind == "trained":
            joined += parameter.numel
            largest = max(largest, joined)
            joined = 0 if joined > _ALL_REDUCED else joined
    return largest


def _gathered(job: Job, facts: Facts) -> int:
    """Bytes of the parameters that ZeRO-3 holds whole: small ones always, others as far as the settings let it."""
    gathered = [p for p in facts.parameters if _blocks(job, p) > 1 or job.offloaded("param")]
    if not gathered:
        return 0
    small = job.zero["stage3_param_persistence_threshold"]
    persistent = [p for p in gathered if p.numel <= small]
    others = [p for p in gathered if p.numel > small]
    numbers, nbytes = sum(p.numel for p in others), sum(p.nbytes for p in others)
    return sum(p.nbytes for p in persistent) + held_whole(job, facts.gathers, numbers, nbytes)


def _secondary(job: Job, facts: Facts) -> int:
    """Bytes of hpZ's second block of what is trained, which is cut among the ranks of a node only."""
    if job.stage < 3 or job.frozen_blocks == job.ranks:
        return 0
    groups, pinned = job.ranks // job.frozen_blocks, job.pinned("param")
    return sum(taken(groups * _held(job, p), pinned) for p in facts.parameters if p.kind == "trained")


def _largest_dense(job: Job, facts: Facts) -> int:
    """Bytes of the matrices that are made for one product: by the method's layer, or from a residual.

    A packed residual is made dense, of experts a few at a time; a residual in another dtype than that of the product
    is cast, of experts all at a time.
    """
    made = method_of(job.config).layer_scratch_bytes(facts.targets)
    if not any(p.kind == "residual" for p in facts.parameters):
        return made
    return max(made, *(_dense(job, target) for target in facts.targets))


def _dense(job: Job, target: Target) -> int:
    """Bytes that are made of a target's residual for one product."""
    compute, storage = job.precision.compute_dtype, job.storage
    shape = torch.Size((target.out_features, target.in_features))
    if not storage.quantised:
        kept = {kind for _, kind in storage.tensors(shape).values()}
        return 0 if kept == {compute} else target.numel * compute.itemsize
    matrix = shape.numel() * compute.itemsize
    if not target.experts:
        return matrix
    together = dense_together(target.experts, matrix)
    return (together if storage.joins(shape.numel()) else together + 1) * matrix  # else each is made apart, and copied


def _regulariser(job: Job, facts: Facts) -> int:
    """Bytes that the method's own terms take in an optimizer step, such as Gram matrices."""
    ranks = [linear.rank for linear in facts.linears for _ in range(linear.matrices)]
    return method_of(job.config).step_scratch_bytes(job.config, ranks, facts.trainable)


def _cast(job: Job, facts: Facts) -> int:
    """Copies of trained weights, which autocast makes once and holds until the forward pass ends, whatever is
    recomputed. The adapters of a method whose layers cast their own weights, one at a time, are not among them."""
    if job.precision.name != "mixed":
        return 0
    ours, numbers = method_of(job.config).layers_cast_weights, 0
    for linear in facts.linears:
        if linear.trained:  # products with the matrices of experts are no part of autocast
            numbers += 0 if linear.experts else linear.m * linear.n
        elif not ours:
            numbers += linear.matrices * linear.rank * (linear.m + linear.n)
    return numbers * job.precision.compute_dtype.itemsize


def _activations(job: Job, facts: Facts) -> tuple[int, int]:
    """Bytes of (activations, logits) at the moment when both together are largest.

    Forward ends with all that blocks keep, and with the logits, as many times as `plan.logits.LOGIT_BYTES` says:
    as the model gives them, the learned ones, and their log-probabilities, two of them in fp32. With checkpointing,
    blocks keep their inputs, and backward makes one of them whole again when the logits are gone.
    """
    kept, compute = facts.kept, job.precision.compute_dtype.itemsize
    chunk = chunk_of(job, facts)
    logits = (chunk or job.tokens) * facts.vocabulary * LOGIT_BYTES
    at_head = _beside_chunks(facts) if chunk else 0
    backward = 4 * job.tokens * facts.widest * compute
    repeated = job.tokens * facts.exchanged.repeated * compute
    if not job.config.train.gradient_checkpointing:
        return kept.rest + at_head + sum(kept.blocks) + repeated * len(kept.blocks) + backward, logits
    inputs = kept.rest + at_head + kept.inputs * len(kept.blocks) + _cast(job, facts)
    recomputed = max(kept.blocks, default=0) + repeated + backward
    return (inputs, logits) if logits >= recomputed else (inputs + recomputed, 0)


def chunk_of(job: Job, facts: Facts) -> int:
    """How many positions have their logits at once; 0 stands for all."""
    return loss_chunk(job.config.train.loss_chunk, job.tokens, facts.vocabulary)


def _beside_chunks(facts: Facts) -> int:
    """Bytes that a loss in chunks keeps until backward: the head's inputs at learned positions, and its gradients.

    The gradient by the head's own weight is made for a chunk, and added up.
    """
    trained = [4 * linear.m * linear.n for linear in facts.linears if linear.head and linear.trained]
    return 2 * facts.kept.inputs + 2 * sum(trained)


HEADROOM = 0.05
"""Share of the memory that ranks compute in, which is left for what is not planned: fragmentation and workspaces."""


@dataclass(frozen=True, slots=True)
class Place:
    """Memory that a rank takes.

    where: it is, in words. needed: bytes of it. limit: bytes that the rank may take. room: bytes of these that may be
    planned for.
    """

    where: str
    needed: int
    limit: int
    room: int


def places(job: Job, needed: Memory) -> list[Place]:
    """Where a rank takes memory, the memory in which it computes first; without that of nodes of unknown size."""
    hardware = job.hardware
    host = None if hardware.host_memory is None else hardware.host_memory // hardware.gpus
    if hardware.device == "cpu":
        assert host is not None, "a rank on a CPU has its node's memory"
        return [Place("of free memory", needed.total + needed.total_host, host, int(host * (1 - HEADROOM)))]
    found = [Place("on its GPU", needed.total, hardware.gpu_memory, room(job))]
    if host is not None:
        found.append(Place("of its node's memory", needed.total_host, host, host))
    return found


def room(job: Job) -> int:
    """Bytes of a GPU that may be planned for."""
    return int(job.hardware.gpu_memory * (1 - HEADROOM))


def of_a_node(job: Job, needed: Memory) -> int:
    """Bytes that all ranks of a node take of its own memory."""
    return job.hardware.gpus * needed.total_host


def fits(job: Job, needed: Memory) -> bool:
    """Whether a job fits into the GPU with some headroom, and into the node's memory where that is known."""
    return all(place.needed <= place.room for place in places(job, needed))
