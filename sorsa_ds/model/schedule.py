"""Which rank reads and decomposes which layer: a static schedule that every rank computes alike."""

from dataclasses import dataclass

import torch

from sorsa_ds.model.targets import Target


@dataclass(frozen=True, slots=True)
class Item:
    """One unit of loading work: a target linear to decompose, or a frozen parameter to copy (`target` None)."""

    name: str
    shape: torch.Size
    target: Target | None

    @classmethod
    def of(cls, target: Target) -> "Item":
        """The item that stands for a target linear."""
        return cls(target.name, target.shaped(target.out_features, target.in_features), target)

    @property
    def cost(self) -> float:
        """Relative work: m n min(m, n) for a decomposition, the count of numbers for a copy."""
        numel = float(self.shape.numel())
        return numel * min(self.shape[-2:]) if self.target else numel


def schedule(items: list[Item], world_size: int) -> list[list[Item | None]]:
    """Deal the items out into rounds of at most one item per rank: rank r does `rounds[k][r]` in round k.

    Items are sorted by cost and dealt out in that order, so that the items of one round cost nearly the same: the
    ranks of a round wait for each other when they exchange their results.
    """
    order = sorted(items, key=lambda item: (-item.cost, item.name))
    rounds: list[list[Item | None]] = []
    for first in range(0, len(order), world_size):
        some: list[Item | None] = list(order[first : first + world_size])
        rounds.append(some + [None] * (world_size - len(some)))
    return rounds


def describe_schedule(rounds: list[list[Item | None]]) -> str:
    """The schedule in one line per rank: how many decompositions and copies it makes, and its share of the work."""
    total = sum(item.cost for one in rounds for item in one if item)
    lines = []
    for rank in range(len(rounds[0])):
        mine = [item for one in rounds if (item := one[rank]) is not None]
        targets = sum(item.target is not None for item in mine)
        share = sum(item.cost for item in mine) / total
        lines.append(f"  rank {rank}: {targets} decompositions, {len(mine) - targets} copies, {share:.1%} of the work")
    return "\n".join(lines)
