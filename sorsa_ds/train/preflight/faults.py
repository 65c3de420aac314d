"""What is wrong with a job, from the facts of all its ranks; each fault begins with the node that has it."""

from collections import Counter
from collections.abc import Iterator, Mapping

from sorsa_ds.runtime.memory import GIB
from sorsa_ds.train.preflight.rank_facts import COMMAND_LINE, RankFacts

LEAST_DISK, LEAST_MEMORY = GIB, GIB // 2
"""Free bytes below which no job is started, on a disk and for each rank of a node. Any model needs more: the limits are
for finding the node whose disk is full or whose memory another process holds."""
_SHOWN_NODES = 16


def ranks_by_node(facts: list[RankFacts]) -> dict[tuple[str, int], list[RankFacts]]:
    """The ranks of each host and launcher, in rank order."""
    grouped: dict[tuple[str, int], list[RankFacts]] = {}
    for one in sorted(facts, key=lambda one: one.rank):
        grouped.setdefault((one.node, one.launcher), []).append(one)
    return grouped


def rank_map(facts: list[RankFacts]) -> str:
    """One line per node: its ranks, their devices, and how much memory and disk is free."""
    grouped = ranks_by_node(facts)
    lines = [f"{len(facts)} ranks on {len(grouped)} nodes"] if len(grouped) > 1 else []
    for (node, _), ranks in list(grouped.items())[:_SHOWN_NODES]:
        devices = ", ".join(f"{count} x {name}" for name, count in Counter(one.device for one in ranks).items())
        disk = min(min(one.disks.values()) for one in ranks)
        free = min(one.memory for one in ranks)
        lines.append(f"  {node}  {_span(ranks)}, {devices}; free: {_gib(free)} memory, {_gib(disk)} disk")
    if len(grouped) > _SHOWN_NODES:
        lines.append(f"  and {len(grouped) - _SHOWN_NODES} nodes more")
    return "\n".join(lines)


def faults(facts: list[RankFacts]) -> list[str]:
    """Everything that is wrong with a job, node by node; empty if nothing is."""
    grouped = list(ranks_by_node(facts).values())
    first = grouped[0]
    found = []
    for ranks in grouped:
        found += [f"node {ranks[0].node} ({_span(ranks)}): {wrong}" for wrong in _of_node(ranks, first)]
    return found + list(_shared_gpus(facts))


def _of_node(ranks: list[RankFacts], first: list[RankFacts]) -> Iterator[str]:
    reference = first[0]
    for one in ranks:
        if one.device == "no GPU":
            yield f"local rank {one.local_rank} has no GPU, {one.gpus} are visible (CUDA_VISIBLE_DEVICES)"
    if bool(ranks[0].gpus) != bool(reference.gpus):
        yield f"{ranks[0].gpus} GPUs are visible, on {reference.node} {reference.gpus}"
    for name, (here, there) in _differences(ranks[0].versions, reference.versions).items():
        yield f"{name} is {here}, on {reference.node} {there}"
    said = _differences(ranks[0].said, reference.said)
    if len(said) > 1:
        said.pop(COMMAND_LINE, None)  # the settings tell it better
    for name, (here, there) in said.items():
        yield f"{name} is {here!r}, on {reference.node} {there!r}"
    if min(one.memory for one in ranks) < LEAST_MEMORY * len(ranks):
        yield f"only {_gib(min(one.memory for one in ranks))} of memory are free for {len(ranks)} ranks"
    for folder, free in ranks[0].disks.items():
        if free < LEAST_DISK:
            yield f"only {_gib(free)} are free on the disk of the {folder}"


def _shared_gpus(facts: list[RankFacts]) -> Iterator[str]:
    holders: dict[tuple[str, str], int] = {}
    for one in facts:
        if one.device_id and (holder := holders.setdefault((one.node, one.device_id), one.rank)) != one.rank:
            yield f"node {one.node}: ranks {holder} and {one.rank} have the same GPU ({one.device_id})"


def _differences(here: Mapping, there: Mapping) -> dict[str, tuple]:
    names = [*there, *(name for name in here if name not in there)]
    return {name: (here.get(name), there.get(name)) for name in names if here.get(name) != there.get(name)}


def _span(ranks: list[RankFacts]) -> str:
    numbers = [one.rank for one in ranks]
    return f"rank {numbers[0]}" if len(numbers) == 1 else f"ranks {numbers[0]}-{numbers[-1]}"


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
