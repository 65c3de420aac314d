"""Stopping where a run would learn rows that it holds out, in another source of a mix or by another path."""

from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path

from sorsa_ds.config.mixing import of_source, sources_of
from sorsa_ds.config.schema import DataConfig
from sorsa_ds.data.selection import RowRange, overlap
from sorsa_ds.data.source import absolute, select
from sorsa_ds.data.stream_rows import places_of


def check_apart(data: DataConfig, seed: int) -> None:
    """Stop where rows that one source holds out are learned. What a stored source does by itself, `select` checks.

    Args:
        seed: the seed with which the embedded data are generated.

    Raises:
        ValueError: some row is learned and held out; the message names the sources. Or a source cannot be read.
    """
    sources = sources_of(data)
    pairs = [
        (holder, learner)
        for holder, one in sources.items()
        for learner, other in sources.items()
        if one.eval_size and (data.streaming or holder != learner) and _related(one.eval_path or one.path, other.path)
    ]
    find = _streamed if data.streaming else partial(_stored, seed=seed)
    places = {name: of_source(data, name, partial(find, sources[name])) for name in dict.fromkeys(chain(*pairs))}
    for holder, learner in pairs:
        if common := overlap(places[learner][0], places[holder][1]):
            raise ValueError(_fault(sources, holder, learner, common))


def held_out_of(data: DataConfig) -> tuple[str, str | None]:
    """Where the held-out rows of a stream are: path and name of their data set."""
    if data.eval_path is None or absolute(data.eval_path) == absolute(data.path):
        return data.path, data.name
    return data.eval_path, None


def _related(one: str, other: str) -> bool:
    """Whether two paths may lead to the same rows: one is the other, or lies in it."""
    if not Path(one).expanduser().exists():
        return one == other
    first, second = absolute(one), absolute(other)
    return first.is_relative_to(second) or second.is_relative_to(first)


def _stored(data: DataConfig, seed: int) -> tuple[Sequence[RowRange], Sequence[RowRange]]:
    """What a source learns, and what it holds out."""
    train, held_out = select(data, seed)
    return train.places(), held_out.places() if held_out else []


def _streamed(data: DataConfig) -> tuple[Sequence[RowRange], Sequence[RowRange]]:
    """What a stream learns, and what it holds out."""
    learned = places_of(data.path, data.name, data.train_split, "data.path")
    if not data.eval_size:
        return learned, []
    return learned, places_of(*held_out_of(data), data.eval_split or data.train_split, "data.eval_split")


def _fault(sources: dict[str, DataConfig], holder: str, learner: str, common: str) -> str:
    if holder == learner:
        own = sources[holder]
        split = own.eval_split or own.train_split
        return f"data.eval_split: {split} is learned ({common}), so the held-out loss would be taken on it"
    return (
        f"data.mix: {holder} holds out rows of {common} that {learner} learns, so the held-out loss would be taken on "
        "rows that were learned; give one of the two other rows with train_split, eval_split or eval_path"
    )
