"""The command line: argv -> configuration. Defaults < YAML file (--config) < overrides, in three spellings:

    train.py --config run.yaml sorsa.rank=64
    train.py --config run.yaml --sorsa.rank 64
    train.py --config run.yaml --sorsa.rank=64

A command with other settings or options calls `split`, `load`, `find_file` and `help_text` with its own.
"""

import contextlib
import dataclasses
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from sorsa_ds.config.fields import Leaf, leaves, nearest, section_help, sections
from sorsa_ds.config.schema import RunConfig
from sorsa_ds.config.yaml_io import Given, build, check, read_value, read_yaml, to_yaml, value_text

__all__ = ["Errors", "absolute", "find_file", "help_text", "load", "split", "to_yaml"]

T = TypeVar("T")
REPOSITORY = Path(__file__).resolve().parents[2]
DEFAULT_DS_CONFIG = "ds_configs/zero3.json"


class Errors(list[str]):
    """Everything wrong with a command line, to be reported together."""

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Keep a ValueError of the body for the report, and go on."""
        try:
            yield
        except ValueError as error:
            self.append(str(error))

    def stop(self) -> None:
        """Raise them all, if there are any."""
        if self:
            raise ValueError("\n".join(self))


def split(argv: Sequence[str], options: Iterable[str], errors: Errors) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Tell the command's own options (`--config FILE`) from overrides (dotted path, text), in order."""
    own: dict[str, str] = {}
    overrides: list[tuple[str, str]] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            own["help"] = ""
            continue
        key, equals, text = word.removeprefix("--").partition("=")
        if not equals and not word.startswith("--"):
            errors.append(f"{word!r} is no setting: write key=value, --key value or --key=value")
            continue
        if not equals:
            if not words or words[0].startswith("--"):
                errors.append(f"{word} needs a value")
                continue
            text = words.pop(0)
        key = key.replace("-", "_")
        if word.startswith("--") and key in options:
            if key in own:
                errors.append(f"--{key} is given twice: {own[key]} and {text}")
            own[key] = text
        else:
            overrides.append((key, text))
    return own, overrides


def load(
    schema: type[T], file: Path | None, overrides: Sequence[tuple[str, str]] = (), options: Iterable[str] = ()
) -> T:
    """A configuration from a YAML file and overrides. Every unknown key and bad value is reported in one ValueError.

    `options` are the command's own, which an unknown key may have meant.
    """
    errors = Errors()
    given: dict[str, Given] = {}
    with errors.noted():
        given |= read_yaml(file, schema) if file else {}
    for path, text in overrides:
        with errors.noted():
            given[path] = read_value(text, f"command line: {path}={text}")
    values = {}
    for path, item in given.items():
        with errors.noted():
            values[path] = check(_leaf(schema, path, item, options), item)
    errors.stop()
    return build(schema, values)


def _leaf(schema: type, path: str, item: Given, options: Iterable[str]) -> Leaf:
    known = leaves(schema)
    if path in known:
        return known[path]
    head = path.partition(".")[0]
    listing = ", ".join(key for key in known if key.startswith(f"{head}."))
    if path == head and listing:
        raise ValueError(f"{path} is a section, not a setting; it holds {listing} ({item.where})")
    near = nearest(path, [*known, *(f"--{name}" for name in options)])
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    else:
        hint = (
            f"{head} holds {listing}"
            if listing
            else f"there are model, method, {', '.join(sections(schema))}; see --help"
        )
    raise ValueError(f"unknown setting {path}: {hint} ({item.where})")


def find_file(option: str, name: str, shipped: str) -> Path:
    """The file an option names, relative to the current folder or, if it is not there, to the repository."""
    for path in (Path(name), REPOSITORY / name):
        if path.is_file():
            return path
    listing = ", ".join(str(path.relative_to(REPOSITORY)) for path in sorted(REPOSITORY.glob(shipped)))
    raise ValueError(f"{option} {name}: no such file; the repository has {listing}")


def absolute(config: RunConfig) -> RunConfig:
    """The same with paths as they are from any folder, so that a run can be continued and evaluated from there."""
    model, path, eval_path = (
        str(Path(p).expanduser().resolve()) if p is not None and Path(p).expanduser().exists() else p
        for p in (config.model, config.data.path, config.data.eval_path)
    )
    data = dataclasses.replace(config.data, path=path, eval_path=eval_path)
    return dataclasses.replace(config, model=model, data=data)


def help_text(schema: type, usage: str, options: Mapping[str, str]) -> str:
    """Usage, the command's own options, then every setting with type, default and meaning, by section."""
    lines = [usage, "Each setting may be written --key value, --key=value or key=value, or stand in the --config file."]
    lines += ["", *(f"  --{name:<14} {text}" for name, text in options.items())]
    section = None
    for path, leaf in leaves(schema).items():
        head = path.rpartition(".")[0]
        if head != section:
            section = head
            lines += ["", *textwrap.wrap(section_help(schema, head), 110)]
        lines.append(f"  --{path} <{leaf.type_text}> (default {value_text(leaf.default)})")
        lines += textwrap.wrap(leaf.help, 110, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines)
