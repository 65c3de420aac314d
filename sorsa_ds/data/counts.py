"""What became of the rows of a data set."""

from collections.abc import Collection
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple


@dataclass(frozen=True, slots=True)
class Counts:
    """What became of some rows; counts are added with `+`. Every row is either learned or left out for a reason.

    rows: the number of rows that were read.
    learned_rows: the number of rows that have become examples.
    left_out: reason -> the number of rows that are no example.
    cut: the number of examples that lost a part to `data.max_length`.
    remarks: what of rows is learned otherwise than one might think -> the number of rows.
    tokens: the number of the examples' tokens.
    learned_tokens: the number of the examples' tokens that are learned.
    source: the file, folder or name that the rows come from, where it is known.
    """

    rows: int = 0
    learned_rows: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    cut: int = 0
    remarks: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    learned_tokens: int = 0
    source: str = ""

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            rows=self.rows + other.rows,
            learned_rows=self.learned_rows + other.learned_rows,
            left_out=_sum(self.left_out, other.left_out),
            cut=self.cut + other.cut,
            remarks=_sum(self.remarks, other.remarks),
            tokens=self.tokens + other.tokens,
            learned_tokens=self.learned_tokens + other.learned_tokens,
            source=self.source or other.source,
        )

    def as_dict(self) -> dict[str, Any]:
        """The counts as a report in JSON has them."""
        return asdict(self)

    def reasons(self) -> str:
        """The reasons for which rows are left out, in brackets; empty without any."""
        told = ", ".join(f"{reason}: {rows:,}" for reason, rows in self.left_out.items())
        return f" ({told})" if told else ""

    def notes(self, kind: str, most: int) -> list[str]:
        """A sentence for each thing that happened to rows; none where all are learned whole.

        Args:
            kind: what the rows are for, `training` or `held-out`.
            most: `data.max_length`.
        """
        cut = f"{self.cut} of {self.rows} {kind} examples are cut at {most} tokens (data.max_length)."
        left_out = (
            f"{rows} of {self.rows} {kind} examples are left out: {why}." for why, rows in self.left_out.items()
        )
        remarks = (f"In {rows} of {self.rows} {kind} conversations {what}." for what, rows in self.remarks.items())
        return [cut] * bool(self.cut) + [*left_out, *remarks]


class Taken(NamedTuple):
    """What became of a source's rows, and how many times a run has taken one of its examples."""

    counts: Counts
    examples: int


def total(counts: Collection[Counts]) -> Counts:
    """The sum of the counts of several sources."""
    return replace(sum(counts, Counts()), source=", ".join(one.source for one in counts))


def _sum(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    return {name: one.get(name, 0) + other.get(name, 0) for name in {**one, **other}}
