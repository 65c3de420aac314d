"""From the words of a command line to a configuration.

A setting's default gives way to the YAML file (--config), and the file to an override. Overrides have three spellings:

    train.py --config run.yaml adapter.rank=64
    train.py --config run.yaml --adapter.rank 64
    train.py --config run.yaml --adapter.rank=64

A command with other settings or options calls `split`, `load_settings`, `find_file` and `help_text` with its own. The
files of --config and --ds_config are found by `find_settings_file` and `find_ds_config` for all commands.
"""

import contextlib
import dataclasses
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from sorsa_ds.config import other_names
from sorsa_ds.config.fields import Leaf, leaves, nearest, section_help, sections
from sorsa_ds.config.renamed import name_now, renamed_note, with_new_names
from sorsa_ds.config.schema import DataConfig, MixedSource, RunConfig
from sorsa_ds.config.yaml_io import Given, build_settings, check_value, read_value, read_yaml, to_yaml, value_text
from sorsa_ds.runtime.console import aside
from sorsa_ds.runtime.shipped import SHIPPED

__all__ = [
    "Errors", "find_ds_config", "find_file", "find_settings_file", "help_text", "load_settings", "split", "to_yaml",
    "with_absolute_paths",
]  # fmt: skip

T = TypeVar("T")
Data = TypeVar("Data", DataConfig, MixedSource)
DEFAULT_DS_CONFIG = "ds_configs/zero3.json"


class Errors(list[str]):
    """All mistakes of a command line, which are collected and reported together."""

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """A context that keeps a ValueError of its body for the report and goes on after it."""
        try:
            yield
        except ValueError as error:
            self.append(str(error))

    def stop(self) -> None:
        """Raise one ValueError with all collected mistakes, if there are any."""
        if self:
            raise ValueError("\n".join(self))


def split(argv: Sequence[str], options: Iterable[str], errors: Errors) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Separate the command's own options (name -> text) from overrides of settings, (dotted path, text) in order.

    Args:
        options: names of the command's own options, such as `config` for `--config FILE`.
        errors: takes up what is wrong.
    """
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
            errors.append(f"{word!r} is not a setting: write key=value, --key value or --key=value")
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


def load_settings(
    schema: type[T],
    file: Path | None,
    overrides: Sequence[tuple[str, str]] = (),
    options: Iterable[str] = (),
    tell: Callable[[str], None] = aside,
) -> T:
    """A configuration from a YAML file and overrides.

    Args:
        schema: the class of the configuration.
        options: names of the command's own options, one of which an unknown setting may have been meant for.
        tell: called with a sentence on settings that are given under earlier names.

    Raises:
        ValueError: a key is unknown or a value is bad. All mistakes are reported together.
    """
    errors = Errors()
    of_file: list[tuple[str, Given]] = []
    typed: list[tuple[str, Given]] = []
    with errors.noted():
        of_file += read_yaml(file, schema).items() if file else []
    for path, text in overrides:
        with errors.noted():
            typed.append((path, read_value(text, f"command line: {path}={text}", _is_text(schema, path))))
    given: dict[str, Given] = {}
    for some in (of_file, typed):
        with errors.noted():
            given |= with_new_names(some)
    values = {}
    for path, item in given.items():
        with errors.noted():
            values[path] = check_value(_leaf(schema, path, item, options), item)
    errors.stop()
    if (note := renamed_note([*of_file, *typed])) is not None:
        tell(note)
    return build_settings(schema, values)


def _is_text(schema: type, path: str) -> bool:
    """Whether a path, or an earlier name, is that of a setting which is text and nothing else."""
    leaf = leaves(schema).get(name_now(path))
    return leaf is not None and leaf.is_text


def _leaf(schema: type, path: str, item: Given, options: Iterable[str]) -> Leaf:
    """The setting at a path; a ValueError that says which setting may have been meant where there is none."""
    known = leaves(schema)
    if path in known:
        return known[path]
    head = path.partition(".")[0]
    listing = ", ".join(key for key in known if key.startswith(f"{head}."))
    if path == head and listing:
        section = f"{path} is a section, not a setting; it holds {listing}"
        elsewhere = other_names.hint(path)
        told = section if elsewhere is None else f"unknown setting {path}: {elsewhere}; {section}"
        raise ValueError(f"{told} ({item.where})")
    name = path.rpartition(".")[2]
    near = nearest(path, [*known, *(f"--{option}" for option in options)])
    if not any(one.rpartition(".")[2] == name for one in near) and (elsewhere := other_names.hint(name)) is not None:
        hint = elsewhere
    elif near:
        hint = f"did you mean {' or '.join(near)}?"
    else:
        hint = (
            f"{head} holds {listing}"
            if listing
            else f"there are model, method, {', '.join(sections(schema))}; see --help"
        )
    raise ValueError(f"unknown setting {path}: {hint} ({item.where})")


def find_file(option: str, name: str, shipped: str) -> Path:
    """The file that an option names, relative to the current folder or, if it is not there, to what is shipped.

    Args:
        shipped: glob of the files that come with the package for this option.

    Raises:
        ValueError: there is no such file. The message lists the shipped ones.
    """
    for path in (Path(name), SHIPPED / name):
        if path.is_file():
            return path
    listing = ", ".join(str(path.relative_to(SHIPPED)) for path in sorted(SHIPPED.glob(shipped)))
    raise ValueError(f"{option} {name}: no such file; shipped are {listing}")


def find_settings_file(options: Mapping[str, str]) -> Path | None:
    """The YAML file that --config names among a command's options; None where the option is not given.

    Raises:
        ValueError: there is no such file.
    """
    return find_file("--config", options["config"], "launch/recipes/*.yaml") if "config" in options else None


def find_ds_config(options: Mapping[str, str], default: str = DEFAULT_DS_CONFIG) -> Path:
    """The DeepSpeed JSON that --ds_config names among a command's options, or the command's default.

    Raises:
        ValueError: there is no such file.
    """
    return find_file("--ds_config", options.get("ds_config", default), "ds_configs/*.json")


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The configuration with absolute paths of all existing files, so that a run can be continued from any folder."""

    def absolute(name: str) -> str:
        """The absolute path of an existing file or folder; any other name, such as one on the hub, unchanged."""
        path = Path(name).expanduser()
        return str(path.resolve()) if path.exists() else name

    def absolute_data(data: Data) -> Data:
        held_out = data.eval_path
        return dataclasses.replace(
            data, path=absolute(data.path), eval_path=None if held_out is None else absolute(held_out)
        )

    mix = [absolute_data(source) for source in config.data.mix]
    data = config.data if mix else absolute_data(config.data)
    if data.chat_template is not None:
        data = dataclasses.replace(data, chat_template=absolute(data.chat_template))
    sorsa = config.sorsa
    if sorsa.directions is not None:
        sorsa = dataclasses.replace(sorsa, directions=absolute(sorsa.directions))
    data = dataclasses.replace(data, mix=mix)
    return dataclasses.replace(config, model=absolute(config.model), data=data, sorsa=sorsa)


def help_text(schema: type, usage: str, options: Mapping[str, str]) -> str:
    """The text of `--help`: usage, the command's own options, then every setting with its type, default and meaning."""
    lines = [usage, "Each setting may be written --key value, --key=value or key=value, or stand in the --config file."]
    lines += ["", *(f"  --{name:<14} {text}" for name, text in options.items())]
    section = None
    for path, leaf in leaves(schema).items():
        head = path.rpartition(".")[0]
        if head != section:
            section = head
            lines += ["", *textwrap.wrap(section_help(schema, head), 110, break_on_hyphens=False)]
        lines.append(f"  --{path} <{leaf.type_text}> (default {value_text(leaf.default)})")
        lines += textwrap.wrap(
            leaf.help, 110, initial_indent=" " * 8, subsequent_indent=" " * 8, break_on_hyphens=False
        )
    return "\n".join(lines)
