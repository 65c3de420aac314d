"""What the settings of several data sets, of data that are streamed, and of conversations have to fulfil."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from sorsa_ds.config.schema import DataConfig, MixedSource

T = TypeVar("T")

OWN = ("path", "name", "eval_path")
"""Settings of `data` that mean one data set, so that with `data.mix` only its sources have them."""

WITH_PROMPT = ", with data.prompt"
"""What stands behind the name of a format whose prompt is the user's own."""

_PLAIN = ("tokens", "alpaca", "metamath", "codefeedback", "gsm8k", "text")
_OF_CONVERSATIONS = ("learn", "chat_template")


def check_mix(data: "DataConfig") -> None:
    """Stop at a mix whose settings contradict one another.

    Raises:
        ValueError: naming the settings.
    """
    weighted = any(source.weight is not None for source in data.mix)
    if not weighted and not data.streaming and _given(data, ["mix_until"]):
        raise ValueError(
            f"data.mix_until={data.mix_until}: it says when an epoch of a weighted mix ends, and there is none; give "
            "every source of data.mix a weight, or leave it out"
        )
    if not data.mix:
        return
    if given := _given(data, OWN):
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
        if _given(data, ["shuffle_buffer"]):
            raise ValueError(
                f"data.shuffle_buffer={data.shuffle_buffer}: only a stream is shuffled in blocks, other data as a "
                "whole; leave it out, or set data.streaming: true"
            )
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


def check_conversations(data: "DataConfig", kinds: Collection[str] | None = None) -> None:
    """Stop at settings of conversations where no source can hold any.

    Args:
        kinds: how the rows of each source become texts, in words: a format, perhaps WITH_PROMPT; by default as far as
            the settings say it.

    Raises:
        ValueError: naming the settings.
    """
    if kinds is None:
        sources: Sequence[DataConfig | MixedSource] = data.mix or [data]
        kinds = [_kind(source, data) for source in sources]
    given = _given(data, _OF_CONVERSATIONS)
    if given and all(map(_is_plain, kinds)):
        raise ValueError(
            f"{', '.join(given)}: only conversations have that, and the data are none ({', '.join(kinds)}); leave it "
            "out, or give the data as messages (data.format: chat)"
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
    """The settings of one source, without those that are meant for all, or for other sources."""
    own = {name: value for name, value in dataclasses.asdict(source).items() if value is not None and name != "weight"}
    foreign = ["mix_until", *(_OF_CONVERSATIONS if _is_plain(_kind(source, data)) else ())]
    defaults = _defaults(data)
    return dataclasses.replace(data, mix=[], **own, **{name: defaults[name] for name in foreign})


def _given(data: "DataConfig", names: Iterable[str]) -> list[str]:
    """Those of the settings that are not as they are by default, with the section."""
    defaults = _defaults(data)
    return [f"data.{name}" for name in names if getattr(data, name) != defaults[name]]


def _defaults(data: "DataConfig") -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(data)}


def _kind(source: "DataConfig | MixedSource", data: "DataConfig") -> str:
    """How the rows of a source become texts, as far as its settings say it, or else those of all sources."""
    return f"{source.format or data.format}{WITH_PROMPT if source.prompt or data.prompt else ''}"


def _is_plain(kind: str) -> bool:
    """Whether rows of that kind are never conversations."""
    return kind in _PLAIN or kind.endswith(WITH_PROMPT)


def _name_of(data: "DataConfig") -> str:
    """A short name: of files and folders without the path to them."""
    name = Path(data.path).name if Path(data.path).expanduser().exists() else data.path
    return f"{name}:{data.name}" if data.name else name
