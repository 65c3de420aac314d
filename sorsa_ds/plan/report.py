"""A plan in words and numbers: the whole table, a short form, and JSON."""

from dataclasses import asdict, dataclass
from pathlib import Path

from sorsa_ds.console import table
from sorsa_ds.plan.advice import advice
from sorsa_ds.plan.facts import Facts, facts
from sorsa_ds.plan.job import GIB, Job
from sorsa_ds.plan.memory import Memory, memory
from sorsa_ds.plan.speed import Speed, speed
from sorsa_ds.plan.traffic import Traffic, traffic
from sorsa_ds.residual import describe, settle

HEADROOM = 0.05
"""Share of a GPU's memory that is left to what is not planned: fragmentation, kernels' workspaces."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a job needs. advice: settings that fit (and the bytes they take), where these do not."""

    job: Job
    facts: Facts
    memory: Memory
    traffic: Traffic
    speed: Speed
    advice: list[tuple[str, int]]

    @property
    def fits(self) -> bool:
        """Whether it fits into the GPU with some headroom."""
        return self.memory.total <= room(self.job)


def room(job: Job) -> int:
    """Bytes of a GPU that may be planned for."""
    return int(job.hardware.gpu_memory * (1 - HEADROOM))


def plan(folder: Path, job: Job) -> Plan:
    """Plan a job; `folder` has the model's config.json.

    Raises:
        ValueError: the model cannot be built, or has no such targets or ranks.
    """
    found = facts(folder, job)
    needed, moved = memory(job, found), traffic(job, found)
    ways = [] if needed.total <= room(job) else advice(folder, job, room(job))
    return Plan(job, found, needed, moved, speed(job, found, moved), ways)


def as_text(planned: Plan) -> str:
    """The table."""
    job, needed, expected, hardware = planned.job, planned.memory, planned.speed, planned.job.hardware
    sizes, targets = job.resolved, planned.facts.targets
    kept = describe(settle(job.config.residual, job.precision))
    what = f"residual {kept}" if job.config.method == "sorsa" else f"method {job.config.method}"
    rows = [
        ("model", job.config.model),
        ("parameters", f"{planned.facts.trainable:,} trainable in {len(targets) or 'all'} linears, "
                       f"{planned.facts.frozen:,} frozen"),
        ("hardware", f"{hardware.nodes} x {hardware.gpus} GPUs of {hardware.gpu_memory / GIB:.1f} GiB"),
        ("settings", f"ZeRO stage {job.stage}, precision {job.precision.name}, {what}"),
        ("batch", f"{sizes.global_batch_size} = {sizes.micro_batch_size} x {job.ranks} ranks x "
                  f"{sizes.gradient_accumulation_steps} accumulated, {job.config.data.max_length} tokens each, "
                  f"{'with' if job.config.train.gradient_checkpointing else 'without'} gradient checkpointing"),
    ]  # fmt: skip
    parts = [table(rows), "", "  GiB a rank on the GPU"]
    parts.append(table([(f"  {name}", f"{size / GIB:8.2f}") for name, size in needed.gpu.items() if size]))
    totals = [
        ("  in all", sum(needed.gpu.values())),
        ("  while it is initialised", needed.initialisation),
        ("  in the host's memory", needed.total_host),
    ]
    parts.append(table([(name, f"{size / GIB:8.2f}") for name, size in totals]))
    if not needed.counted:
        parts.append("  Activations are guessed from the linears: this model's kernels need a GPU.")
    wire = [(f"  {name}", f"{planned.traffic.inside.get(name, 0) / 1e9:8.2f} {between / 1e9:8.2f}")
            for name, between in _both(planned.traffic)]  # fmt: skip
    if wire:
        parts += ["", "  GB a step: to a GPU from its node, to a node from the others", table(wire)]
    parts += [
        "",
        f"  {expected.seconds:.2f} s a step, {expected.tokens_per_second:,.0f} tokens/s, if the GPUs reach "
        f"{hardware.efficiency:.0%} of {hardware.tflops:g} TFLOP/s:",
        f"  computing {expected.compute:.2f} s, inside nodes {expected.inside:.2f} s, between them "
        f"{expected.between:.2f} s, all at the same time"
        + ("; what offloading moves over PCIe comes on top" if sum(needed.host.values()) else ""),
        "",
        _verdict(planned),
    ]
    return "\n".join(parts)


def as_json(planned: Plan) -> dict:
    """The same as one object; sizes in GiB, wire in bytes."""
    needed, expected, job = planned.memory, planned.speed, planned.job
    return {
        "fits": planned.fits,
        "gib_per_rank": needed.total / GIB,
        "gib": {name: size / GIB for name, size in needed.gpu.items()},
        "host_gib": {name: size / GIB for name, size in needed.host.items()},
        "initialisation": {"gib": needed.initialisation / GIB, "host_gib": needed.reading / GIB},
        "activations_counted": needed.counted,
        "trainable": planned.facts.trainable,
        "frozen": planned.facts.frozen,
        "zero_stage": job.stage,
        "precision": job.precision.name,
        "global_batch_size": job.resolved.global_batch_size,
        "bytes_per_step": {
            "inside_node_per_gpu": planned.traffic.inside,
            "between_nodes_per_node": planned.traffic.between,
        },
        "seconds_per_step": expected.seconds,
        "seconds": {"compute": expected.compute, "inside": expected.inside, "between": expected.between},
        "tokens_per_second": expected.tokens_per_second,
        "flops_per_rank": expected.flops,
        "hardware": asdict(job.hardware),
        "advice": [{"settings": settings, "gib_per_rank": size / GIB} for settings, size in planned.advice],
    }


def short(needed: Memory, limit: int, where: str) -> str:
    """One line for the beginning of a run."""
    largest = sorted(needed.gpu.items(), key=lambda item: -item[1])[:4]
    told = ", ".join(f"{name} {size / GIB:.2f}" for name, size in largest)
    return f"Planned memory: {needed.total / GIB:.2f} GiB a rank of {limit / GIB:.1f} GiB {where} ({told})."


def _both(moved: Traffic) -> list[tuple[str, float]]:
    names = dict.fromkeys([*moved.inside, *moved.between])
    return [(name, moved.between.get(name, 0)) for name in names]


def _verdict(planned: Plan) -> str:
    total, limit = planned.memory.total, planned.job.hardware.gpu_memory
    if planned.fits:
        return f"  It fits: {total / GIB:.1f} of {limit / GIB:.1f} GiB."
    lines = [f"  It does not fit: {total / GIB:.1f} GiB are needed, {room(planned.job) / GIB:.1f} of {limit / GIB:.1f} "
             f"GiB can be planned for."]  # fmt: skip
    if planned.advice:
        lines.append("  It would with:")
        lines += [f"    {settings}   ({size / GIB:.1f} GiB)" for settings, size in planned.advice]
    else:
        lines.append("  No change of settings was found with which it would; lower sorsa.rank or data.max_length.")
    return "\n".join(lines)
