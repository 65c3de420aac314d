"""Which settings have an effect for which method; a setting that would have none is refused by name."""

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

from sorsa_ds.config.fields import leaves
from sorsa_ds.config.schema import ResidualConfig, RunConfig
from sorsa_ds.methods.registry import method_named, method_of
from sorsa_ds.runtime.precision import Precision
from sorsa_ds.sorsa.residual_storage import resolve_residual

ZERO_STAGES = (0, 1, 2, 3)


def ignored(config: RunConfig) -> dict[str, object]:
    """Settings that differ from their defaults although this method ignores them: path -> value."""
    found = {}
    patterns = method_of(config).ignored_settings
    for path, leaf in leaves(RunConfig).items():
        if any(fnmatchcase(path, pattern) for pattern in patterns):
            value = _value(config, path)
            if value != leaf.default:
                found[path] = value
    return found


def check_settings(config: RunConfig, zero_stage: int, formats: Precision) -> None:
    """Stop before anything is loaded where a setting would do nothing, or the method cannot train on that stage.

    Raises:
        ValueError: naming the settings, or the reason.
    """
    unused = ignored(config)
    if config.residual.storage == resolve_residual(ResidualConfig(), formats).storage:
        unused.pop("residual.storage", None)  # resolved settings name the dtype in which the frozen weights are kept
    if unused:
        listing = ", ".join(f"{path}={value}" for path, value in unused.items())
        raise ValueError(f"method {config.method} has no use for {listing}; leave it out")
    check_stage(config.method, zero_stage)


def check_stage(method: str, zero_stage: int) -> None:
    """Stop where a method, or a variant of one, cannot train on a ZeRO stage.

    Raises:
        ValueError: with the reason.
    """
    refused = method_named(method).refused_stages
    if zero_stage in refused:
        *others, last = (str(stage) for stage in ZERO_STAGES if stage not in refused)
        raise ValueError(
            f"method {method} needs ZeRO stage {', '.join(others)} or {last} (ds_configs/zero{last}.json): "
            f"{refused[zero_stage]}"
        )


def without_ignored(config: RunConfig) -> RunConfig:
    """The settings with those for which the method has no use put back to their defaults."""
    defaults = leaves(RunConfig)
    return with_values(config, {path: defaults[path].default for path in ignored(config)})


def with_values(config: RunConfig, values: Mapping[str, object]) -> RunConfig:
    """The settings with some of them replaced: path -> value."""
    for path, value in values.items():
        section, _, name = path.partition(".")
        config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    return config


def _value(config: RunConfig, path: str) -> object:
    section, _, name = path.rpartition(".")
    return getattr(getattr(config, section) if section else config, name)
