"""Which settings mean something to which method; what would be ignored silently is refused by name."""

from dataclasses import replace
from fnmatch import fnmatchcase

from sorsa_ds.config.fields import leaves
from sorsa_ds.config.schema import ResidualConfig, RunConfig
from sorsa_ds.runtime.precision import Precision
from sorsa_ds.sorsa.residual_storage import resolve_residual

ADAPTERS = ("lora", "pissa", "adalora", "dora", "olora")
"""The methods that PEFT's layers carry."""

_LAYERS = ("sorsa.rank", "sorsa.rank_pattern", "sorsa.alpha", "sorsa.dropout")
_ONLY_SORSA = ("regularizer.*", "sorsa.svd", "sorsa.svd_tolerance", "sorsa.svd_max_iterations", "residual.*")
_UNUSED = {
    "sorsa": ("baseline.*",),
    "lora": (*_ONLY_SORSA, "baseline.*"),
    "pissa": (*_ONLY_SORSA, "baseline.adalora_*"),
    "adalora": (*_ONLY_SORSA, "baseline.pissa_*", "sorsa.rank_pattern"),
    "dora": (*_ONLY_SORSA, "baseline.*"),
    "olora": (*_ONLY_SORSA, "baseline.*"),
    "full": (*_ONLY_SORSA, "baseline.*", "sorsa.targets", *_LAYERS),
    "partial": (*_ONLY_SORSA, "baseline.*", *_LAYERS),
}


def ignored(config: RunConfig) -> dict[str, object]:
    """The settings that are not as they are by default though the method has no use for them: path -> value."""
    found = {}
    for path, leaf in leaves(RunConfig).items():
        if any(fnmatchcase(path, pattern) for pattern in _UNUSED[config.method]):
            value = _value(config, path)
            if value != leaf.default:
                found[path] = value
    return found


def check(config: RunConfig, zero_stage: int, formats: Precision) -> None:
    """Stop before anything is loaded where a setting would do nothing, or the method cannot go this way.

    Raises:
        ValueError: naming the settings, or the reason.
    """
    unused = ignored(config)
    if config.residual.storage == resolve_residual(ResidualConfig(), formats).storage:
        unused.pop("residual.storage", None)  # filled in, as the frozen weights are kept
    if unused:
        listing = ", ".join(f"{path}={value}" for path, value in unused.items())
        raise ValueError(f"method {config.method} has no use for {listing}; leave it out")
    check_stage(config.method, zero_stage)


def check_stage(method: str, zero_stage: int) -> None:
    """Stop where a method cannot go this way.

    Raises:
        ValueError: with the reason.
    """
    if method == "adalora" and zero_stage == 3:
        raise ValueError(
            "method adalora needs ZeRO stage 0, 1 or 2 (ds_configs/zero2.json): PEFT takes its orthogonal term on "
            "factors that it gathers after the forward pass, and ZeRO-3 has cut them again when the backward pass "
            "comes to that term"
        )


def adalora_ranks(config: RunConfig) -> tuple[int, int]:
    """AdaLoRA's rank at the start, and the mean rank at the end."""
    chosen = config.baseline
    return chosen.adalora_init_rank or config.sorsa.rank, chosen.adalora_target_rank or config.sorsa.rank


def without_ignored(config: RunConfig) -> RunConfig:
    """The same with what the method has no use for as it is by default."""
    defaults = leaves(RunConfig)
    for path in ignored(config):
        section, _, name = path.partition(".")
        config = replace(config, **{section: replace(getattr(config, section), **{name: defaults[path].default})})
    return config


def _value(config: RunConfig, path: str) -> object:
    section, _, name = path.rpartition(".")
    return getattr(getattr(config, section) if section else config, name)
