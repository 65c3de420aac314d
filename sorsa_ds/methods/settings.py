"""Which settings have an effect for which method.

One that would have none is refused by name where the command line sets it. Where a file sets it, which may be made for
several methods, it is left out with a note.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

from sorsa_ds.config.batch_size import AUTO
from sorsa_ds.config.fields import leaves
from sorsa_ds.config.schema import ResidualConfig, RunConfig
from sorsa_ds.methods.registry import method_named, method_of
from sorsa_ds.model.whole_modules import EMBEDDINGS
from sorsa_ds.runtime.extras import check_extra
from sorsa_ds.runtime.precision import Precision
from sorsa_ds.sorsa.regularizer import follows_rate
from sorsa_ds.sorsa.residual_storage import resolve_residual

ZERO_STAGES = (0, 1, 2, 3)
HARMLESS = "sorsa.svd_cache"
"""A setting that may stand beside any method: it names a folder, and changes no number."""


def ignored(config: RunConfig) -> dict[str, object]:
    """Settings that differ from their defaults although this method ignores them: path -> value."""
    found = {}
    patterns = method_of(config).ignored_settings
    for path, leaf in leaves(RunConfig).items():
        if path != HARMLESS and any(fnmatchcase(path, pattern) for pattern in patterns):
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
        raise ValueError(f"method {config.method} has no use for {listed(unused)}; leave it out")
    check_stage(config.method, zero_stage)
    if config.train.learning_rate == AUTO:
        _check_open_rate(config)


def check_package(config: RunConfig) -> None:
    """Stop where the method needs a package that is not installed. Planning does not need it.

    Raises:
        ValueError: with the command that installs it.
    """
    if (module := method_of(config).package) is not None:
        check_extra(module, f"method {config.method}")


def _check_open_rate(config: RunConfig) -> None:
    """Stop where `train.learning_rate=auto` has no rule, or something must be known that follows from the rate.

    Raises:
        ValueError: with the way out.
    """
    if not method_of(config).suggests_rate:
        raise ValueError(
            f"train.learning_rate=auto follows from the singular values that SORSA trains, and method {config.method} "
            f"trains others: set a number"
        )
    if not follows_rate(config.regularizer):
        raise ValueError(
            "train.learning_rate=auto is known only when the model is loaded, and the regulariser's strength is gamma "
            "over that rate: write regularizer.gamma relative to the rate, as in 0.2*lr, or set the rate"
        )


def check_open_micro_batch(config: RunConfig) -> None:
    """Stop where the planner is to choose the micro-batch, but the regulariser's strength would depend on the choice.

    Raises:
        ValueError: naming both settings and the way out.
    """
    once, twice = (
        method_of(config).regularizer(replace(config, train=replace(config.train, gradient_accumulation_steps=steps)))
        for steps in (1, 2)
    )
    if once != twice:
        raise ValueError(
            f"train.micro_batch_size=auto takes what fits into the memory, and the regulariser is divided by the "
            f"accumulation steps that follow from it (regularizer.preset={config.regularizer.preset}): say the number, "
            f"as regularizer.divide_by_accumulation=64 for the published strength, or a micro-batch"
        )


def check_stage(method: str, zero_stage: int) -> None:
    """Stop where a method, or a variant of one, cannot train on a ZeRO stage.

    Raises:
        ValueError: with the reason.
    """
    refused = method_named(method).refused_stages
    if zero_stage in refused:
        *others, last = (str(stage) for stage in ZERO_STAGES if stage not in refused)
        stages = f"{', '.join(others)} or {last}" if others else last
        file = f"zero{last}" if others else f"stage{last}"
        raise ValueError(f"method {method} needs ZeRO stage {stages} (ds_configs/{file}.json): {refused[zero_stage]}")


def without_ignored(config: RunConfig) -> RunConfig:
    """The settings with those for which the method has no use put back to their defaults."""
    return _with_defaults(config, ignored(config))


def without_unused_of_file(config: RunConfig, on_command_line: Collection[str]) -> tuple[RunConfig, dict[str, object]]:
    """The settings with those of a file for which the method has no use put back to their defaults.

    Args:
        on_command_line: the settings that the command line sets. They stay, for `check_settings` to refuse.

    Returns:
        (the settings, those that were put back: path -> value in the file).
    """
    unused = {path: value for path, value in ignored(config).items() if path not in on_command_line}
    return _with_defaults(config, unused), unused


def with_trained_tokens(config: RunConfig) -> RunConfig:
    """The settings with embeddings and head trained whole where `data.new_tokens` brings rows that must be trained.

    A method that trains every parameter needs no such setting.
    """
    asked, path = config.adapter.train_whole, "adapter.train_whole"
    ignores = any(fnmatchcase(path, pattern) for pattern in method_of(config).ignored_settings)
    if not config.data.new_tokens or EMBEDDINGS in asked or ignores:
        return config
    return with_values(config, {path: [*asked, EMBEDDINGS]})


def unused_note(method: str, unused: Mapping[str, object], file: object) -> str:
    """A sentence on the settings of a file that `without_unused_of_file` has left out."""
    return f"Method {method} has no use for {listed(unused)} in {file}: left out."


def listed(settings: Mapping[str, object]) -> str:
    """Settings as a command line would set them."""
    return ", ".join(f"{path}={value}" for path, value in settings.items())


def with_values(config: RunConfig, values: Mapping[str, object]) -> RunConfig:
    """The settings with some of them replaced: path -> value. Those of a section go together, and are set at once."""
    sections: dict[str, dict[str, object]] = {}
    for path, value in values.items():
        section, _, name = path.partition(".")
        sections.setdefault(section, {})[name] = value
    return replace(config, **{name: replace(getattr(config, name), **new) for name, new in sections.items()})


def _with_defaults(config: RunConfig, paths: Collection[str]) -> RunConfig:
    defaults = leaves(RunConfig)
    return with_values(config, {path: defaults[path].default for path in paths})


def _value(config: RunConfig, path: str) -> object:
    section, _, name = path.rpartition(".")
    return getattr(getattr(config, section) if section else config, name)
