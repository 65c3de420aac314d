"""A plan in words and numbers: the whole table, a short form, and JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sorsa_ds.config.batch_size import most_positions, told_ranks
from sorsa_ds.methods.registry import method_of
from sorsa_ds.model.targets import counted
from sorsa_ds.plan.advice import Way, advice
from sorsa_ds.plan.job import Job
from sorsa_ds.plan.memory import Memory, Place, chunk_of, fits, of_a_node, room
from sorsa_ds.plan.micro_batch import size_micro_batch
from sorsa_ds.plan.model_facts import Facts
from sorsa_ds.plan.speed import Speed, speed
from sorsa_ds.plan.traffic import Traffic, traffic
from sorsa_ds.runtime.console import table
from sorsa_ds.runtime.memory import GIB


@dataclass(frozen=True, slots=True)
class Plan:
    """What a job needs; with settings that fit (`advice`) where its own do not.

    choice: a sentence on how the micro-batch was chosen; None where the settings say it.
    """

    job: Job
    facts: Facts
    memory: Memory
    traffic: Traffic
    speed: Speed
    advice: list[Way]
    choice: str | None

    @property
    def fits(self) -> bool:
        """Whether the job fits into the hardware."""
        return fits(self.job, self.memory)


def plan(folder: Path, job: Job) -> Plan:
    """Plan a job; `folder` has the model's config.json.

    Raises:
        ValueError: the model cannot be built, or has no such targets or ranks.
    """
    sized = size_micro_batch(folder, job)
    job, found, needed = sized.job, sized.facts, sized.memory
    moved = traffic(job, found)
    ways = [] if fits(job, needed) else advice(folder, job, known=found)
    return Plan(job, found, needed, moved, speed(job, found, moved), ways, sized.choice)


def as_text(planned: Plan) -> str:
    """A plan as the table that launch/plan.py prints."""
    job, needed, expected, hardware = planned.job, planned.memory, planned.speed, planned.job.hardware
    sizes, targets = job.resolved, planned.facts.targets
    what = method_of(job.config).summary(job.config, job.precision)
    rows = [
        ("model", job.config.model),
        ("parameters", f"{planned.facts.trainable:,} trainable in {counted(targets) or 'all linears'}, "
                       f"{planned.facts.frozen:,} frozen"),
        *(planned.facts.selection.rows("of them") if targets else []),
        ("hardware", f"{hardware.nodes} x {hardware.gpus} GPUs of {hardware.gpu_memory / GIB:.1f} GiB"),
        ("settings", f"ZeRO stage {job.stage}, precision {job.precision.name}, {what}"),
        ("batch", f"{sizes.global_batch_size} = {sizes.micro_batch_size} x {told_ranks(job.ranks, job.together)} x "
                  f"{sizes.gradient_accumulation_steps} accumulated, {job.config.data.max_length} tokens each, "
                  f"{_packed(job)}{_levelled(job)}{'with' if job.config.train.gradient_checkpointing else 'without'} "
                  "gradient checkpointing"),
        *_chunked(planned),
    ]  # fmt: skip
    warning = planned.facts.selection.warning if targets else None
    parts = [
        table(rows),
        *([f"  {warning}"] if warning else []),
        *([f"  {planned.choice}"] if planned.choice else []),
        "",
        "  GiB per rank on the GPU",
    ]
    parts.append(table([(f"  {name}", f"{size / GIB:8.2f}") for name, size in needed.gpu.items() if size]))
    totals = [
        ("  in all", sum(needed.gpu.values())),
        ("  while it is initialised", needed.initialisation),
        ("  in the host's memory", needed.total_host),
    ]
    parts.append(table([(name, f"{size / GIB:8.2f}") for name, size in totals]))
    if (why := planned.facts.kept.guessed) is not None:
        parts.append(f"  Activations are guessed from the linears: the model does not run without memory ({why}).")
    wire = [(f"  {name}", f"{planned.traffic.inside.get(name, 0) / 1e9:8.2f} {between / 1e9:8.2f}")
            for name, between in _both(planned.traffic)]  # fmt: skip
    if wire:
        parts += ["", "  GB per step: to a GPU from its node, to a node from the others", table(wire)]
    parts += [
        "",
        f"  {expected.seconds:.2f} s per step, {expected.tokens_per_second:,.0f} tokens/s, if the GPUs reach "
        f"{hardware.efficiency:.0%} of {hardware.tflops:g} TFLOP/s:",
        f"  computing {expected.compute:.2f} s"
        + (f" and making weights dense {expected.dense:.2f} s" if expected.dense else "")
        + f", inside nodes {expected.inside:.2f} s, between them {expected.between:.2f} s, all at the same time"
        + ("; what offloading moves over PCIe comes on top" if sum(needed.host.values()) else ""),
        "",
        _verdict(planned),
    ]
    return "\n".join(parts)


def _packed(job: Job) -> str:
    """What packing changes: the plan is of the longest examples, and shorter ones take fewer passes."""
    return "packed (shorter examples take fewer passes), " if job.config.data.packing else ""


def _levelled(job: Job) -> str:
    """What micro-batches of as many positions change; the plan is of the longest examples here too."""
    sizes, data = job.resolved, job.config.data
    positions = most_positions(job.config.train.micro_batch_tokens, sizes.micro_batch_size, data.max_length)
    return "" if positions is None else f"up to {positions:,} positions at once (shorter examples take fewer passes), "


def _chunked(planned: Plan) -> list[tuple[str, str]]:
    """How many positions have their logits at once, where it is not all of a micro-batch."""
    chunk = chunk_of(planned.job, planned.facts)
    told = f"the logits of {chunk} positions at once, of {planned.job.tokens} (train.loss_chunk)"
    return [("loss", told)] if chunk else []


def as_json(planned: Plan) -> dict:
    """A plan as one JSON object; memory in GiB, communication in bytes."""
    needed, expected, job = planned.memory, planned.speed, planned.job
    return {
        "fits": planned.fits,
        "gib_per_rank": needed.total / GIB,
        "gib": {name: size / GIB for name, size in needed.gpu.items()},
        "host_gib": {name: size / GIB for name, size in needed.host.items()},
        "host_gib_per_node": of_a_node(job, needed) / GIB,
        "initialisation": {"gib": needed.initialisation / GIB, "host_gib": needed.reading / GIB},
        "loss_chunk": chunk_of(job, planned.facts),
        "activations_counted": planned.facts.kept.counted,
        "trainable": planned.facts.trainable,
        "frozen": planned.facts.frozen,
        "share_adapted": planned.facts.selection.share,
        "zero_stage": job.stage,
        "precision": job.precision.name,
        "global_batch_size": job.resolved.global_batch_size,
        "micro_batch_size": job.resolved.micro_batch_size,
        "gradient_accumulation_steps": job.resolved.gradient_accumulation_steps,
        "bytes_per_step": {
            "inside_node_per_gpu": planned.traffic.inside,
            "between_nodes_per_node": planned.traffic.between,
        },
        "seconds_per_step": expected.seconds,
        "seconds": {
            "compute": expected.compute, "dense": expected.dense, "inside": expected.inside,
            "between": expected.between,
        },
        "tokens_per_second": expected.tokens_per_second,
        "flops_per_rank": expected.flops,
        "hardware": asdict(job.hardware),
        "advice": [
            {"settings": way.settings, "gib_per_rank": way.gpu / GIB, "host_gib_per_node": way.host / GIB}
            for way in planned.advice
        ],
    }  # fmt: skip


def short(needed: Memory, found: Sequence[Place]) -> str:
    """One line for the beginning of a run.

    Args:
        found: where a rank takes memory.
    """
    largest = sorted(needed.gpu.items(), key=lambda item: -item[1])[:4]
    told = ", ".join(f"{name} {size / GIB:.2f}" for name, size in largest)
    a_rank = ", ".join(f"{one.needed / GIB:.2f} of {one.limit / GIB:.2f} GiB {one.where}" for one in found)
    return f"Planned memory per rank: {a_rank} ({told})."


def _both(moved: Traffic) -> list[tuple[str, float]]:
    names = dict.fromkeys([*moved.inside, *moved.between])
    return [(name, moved.between.get(name, 0)) for name in names]


def _verdict(planned: Plan) -> str:
    job, hardware = planned.job, planned.job.hardware
    gpu, limit = planned.memory.total / GIB, hardware.gpu_memory / GIB
    host, host_limit = of_a_node(job, planned.memory) / GIB, hardware.host_memory and hardware.host_memory / GIB
    if planned.fits:
        node = f"if a node has {host:.1f} GiB" if host_limit is None else f"and {host:.1f} of {host_limit:.1f} GiB"
        return f"  It fits: {gpu:.1f} of {limit:.1f} GiB of a GPU, {node} of its own memory."
    lines = []
    if planned.memory.total > room(job):
        lines.append(f"  It does not fit: {gpu:.1f} GiB of a GPU are needed, {room(job) / GIB:.1f} of {limit:.1f} GiB "
                     f"can be planned for.")  # fmt: skip
    if host_limit is not None and host > host_limit:
        lines.append(f"  It does not fit: {host:.1f} GiB of a node's own memory are needed, of {host_limit:.1f} GiB.")
    if planned.advice:
        lines.append("  It would with:")
        lines += [f"    {way.settings}   ({way.gpu / GIB:.1f} GiB, {way.host / GIB:.1f} GiB of a node's own memory)"
                  for way in planned.advice]  # fmt: skip
    else:
        lines.append("  No change of settings was found with which it would; lower adapter.rank or data.max_length.")
    return "\n".join(lines)
