"""What the settings of several data sets, and of data that are streamed, have to fulfil."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from sorsa_ds.config.schema import DataConfig, MixedSource

T = TypeVar("T")

OWN = ("path", "name", "eval_path")
"""Settings of `data` that mean one data set, so that with `data.mix` only its sources have them."""


def check_mix(data: "DataConfig") -> None:
    """Stop at a mix whose settings contradict one another.

    Raises:
        ValueError: naming the settings.
    """
    if not data.mix:
        return
    defaults = {field.name: field.default for field in dataclasses.fields(data)}
    if given := [f"data.{name}" for name in OWN if getattr(data, name) != defaults[name]]:
        raise ValueError(
            f"{', '.join(given)}: with data.mix each source names its own; make it a source or leave it out"
        )
    bare = [source.path for source in data.mix if source.weight is None]
    if 0 < len(bare) < len(data.mix):
        raise ValueError(f"data.mix: give every source a weight, or none; there is none at {', '.join(bare)}")


def check_streaming(data: "DataConfig", generated: str) -> None:
    """Stop where data are to be streamed that cannot be.

    Args:
        generated: name of the generated data, which are no stream.

    Raises:
        ValueError: naming the setting and, in a mix, the source.
    """
    if not data.streaming:
        return
    if data.packing:
        raise ValueError("data.packing: the rows of a stream are not packed; set it or data.streaming to false")
    if data.mix_until != "all_exhausted":
        raise ValueError("data.mix_until: a stream has no epochs: it is read again when it ends, so leave it out")
    if len(data.mix) > 1 and data.mix[0].weight is None:
        raise ValueError("data.mix: a stream has no length, so give each source the weight with which it is drawn")
    sources: Sequence[DataConfig | MixedSource] = data.mix or [data]
    for source in sources:
        where = f"data.mix, {source.path}: " if data.mix else "data."
        split, size = source.train_split or data.train_split, source.eval_size
        if source.path == generated:
            raise ValueError(f"{where}path: {generated} are generated, and no stream; set data.streaming: false")
        if "[" in split or "+" in split:
            raise ValueError(f"{where}train_split: a stream is a whole split, but {split} is none")
        if (data.eval_size if size is None else size) and not (
            source.eval_path or source.eval_split or data.eval_split
        ):
            raise ValueError(
                f"{where}eval_size: the last rows of a stream cannot be held out; name held-out rows (eval_path or "
                "eval_split), or set eval_size to 0"
            )


def sources_of(data: "DataConfig") -> dict[str, "DataConfig"]:
    """The settings of each source by its name: those of the mix, or of the only one where there is no mix."""
    settings = [_settings_of(data, source) for source in data.mix] or [data]
    names = [_name_of(one) for one in settings]
    seen: Counter[str] = Counter()
    named = {}
    for name, one in zip(names, settings, strict=True):
        seen[name] += 1
        named[f"{name} ({seen[name]})" if names.count(name) > 1 else name] = one
    return named


def of_source(data: "DataConfig", name: str, action: Callable[[], T]) -> T:
    """What an action gives; its error says which source of a mix it is about."""
    try:
        return action()
    except ValueError as error:
        if not data.mix:
            raise
        raise ValueError(f"data.mix, {name}: {error}") from error


def _settings_of(data: "DataConfig", source: "MixedSource") -> "DataConfig":
    own = {name: value for name, value in dataclasses.asdict(source).items() if value is not None and name != "weight"}
    return dataclasses.replace(data, mix=[], **own)


def _name_of(data: "DataConfig") -> str:
    """A short name: of files and folders without the path to them."""
    name = Path(data.path).name if Path(data.path).expanduser().exists() else data.path
    return f"{name}:{data.name}" if data.name else name
