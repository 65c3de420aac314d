"""What makes sense in each file, written down by hand: the judge of what the readers accept.

Nothing here asks the program. Each table says for an entry what its value may be, by type and bounds; entries that are
in no table make no sense. A judge takes the text of a file, parses it in its own way, and says why it makes no sense,
or None where it does.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

Rule = Callable[[Any], bool]
LARGEST = 10**9
DEEPEST = 64


def flag(value: Any) -> bool:
    """true or false."""
    return value is True or value is False


def never(value: Any) -> bool:
    """No value at all."""
    return False


def name(value: Any) -> bool:
    """Text that names a file, a folder or something on the hub."""
    return words(value) and value != "" and all(len(part.encode()) < 256 for part in value.split("/"))


def nothing(value: Any) -> bool:
    """null."""
    return value is None


def utf8(value: Any) -> bool:
    """Text that can be written to a file."""
    return type(value) is str and not any("\ud800" <= character <= "\udfff" for character in value)


def words(value: Any) -> bool:
    """Text that can name a file."""
    return utf8(value) and "\0" not in value


def whole(least: int, most: int) -> Rule:
    """An integer in these bounds."""
    return lambda value: type(value) is int and least <= value <= most


def power(least: int, most: int) -> Rule:
    """A whole number in these bounds, which may be written as 2e8."""
    return lambda value: type(value) in (int, float) and least <= value <= most and value == int(value)


def real(least: float, most: float, *, above: bool = False, below: bool = False) -> Rule:
    """A number in these bounds; without the least one itself (above), or the largest (below)."""

    def rule(value: Any) -> bool:
        if type(value) not in (int, float) or not math.isfinite(value):
            return False
        return (least < value if above else least <= value) and (value < most if below else value <= most)

    return rule


def one_of(*values: Any) -> Rule:
    """One of these, of the same type too."""
    return lambda value: any(type(value) is type(one) and value == one for one in values)


def either(*rules: Rule) -> Rule:
    """What one of the rules allows."""
    return lambda value: any(rule(value) for rule in rules)


def many(rule: Rule) -> Rule:
    """A list of what the rule allows."""
    return lambda value: type(value) is list and all(map(rule, value))


def mapping(key: Rule, inside: Rule) -> Rule:
    """An object whose keys and values these rules allow."""
    return lambda value: type(value) is dict and all(key(k) and inside(v) for k, v in value.items())


def relative_gamma(value: Any) -> bool:
    """A strength such as `0.2*lr`."""
    found = re.fullmatch(r"([0-9.eE+-]+)\*lr", value.replace(" ", "")) if type(value) is str else None
    try:
        return found is not None and 0 <= float(found[1]) <= LARGEST
    except ValueError:
        return False


AMOUNT = real(0, LARGEST)
ABOVE_ZERO = real(0, LARGEST, above=True)
SHARE = real(0, 1, below=True)
RANK = whole(1, 65_536)
COUNT, COUNT_FROM_0 = whole(1, LARGEST), whole(0, LARGEST)
BATCH = whole(1, 1_000_000)
LIST_OR_WORDS = either(words, many(words))
OPEN_BATCH, OPEN_COUNT, OPEN_WORDS = (either(nothing, rule) for rule in (BATCH, COUNT, words))
OPEN_RANK = either(nothing, RANK)

SETTINGS: dict[str, Rule] = {
    "model": name,
    "method": one_of("sorsa", "lora", "pissa", "adalora", "dora", "olora", "full", "partial"),
    "loading.revision": OPEN_WORDS,
    "loading.trust_remote_code": flag,
    "loading.attn_implementation": one_of("auto", "eager", "sdpa", "flash_attention_2"),
    "sorsa.targets": LIST_OR_WORDS,
    "sorsa.rank": RANK,
    "sorsa.rank_pattern": mapping(words, RANK),
    "sorsa.alpha": either(nothing, ABOVE_ZERO),
    "sorsa.dropout": SHARE,
    "sorsa.svd": one_of("randomized", "exact"),
    "sorsa.svd_tolerance": ABOVE_ZERO,
    "sorsa.svd_max_iterations": whole(1, 1000),
    "sorsa.svd_cache": name,
    "baseline.pissa_iterations": whole(0, 1000),
    "baseline.adalora_init_rank": OPEN_RANK,
    "baseline.adalora_target_rank": OPEN_RANK,
    "baseline.adalora_t_init": either(nothing, COUNT_FROM_0),
    "baseline.adalora_t_final": either(nothing, COUNT_FROM_0),
    "baseline.adalora_delta_t": COUNT,
    "baseline.adalora_beta1": real(0, 1, above=True, below=True),
    "baseline.adalora_beta2": real(0, 1, above=True, below=True),
    "baseline.adalora_orthogonal_weight": AMOUNT,
    "residual.storage": one_of("auto", "fp32", "bf16", "nf4", "nf4_double", "int8"),
    "residual.block_size": one_of(64, 128, 256, 512, 1024),
    "residual.iterations": whole(1, 1000),
    "regularizer.preset": one_of("default", "reference", "paper"),
    "regularizer.form": one_of("norm", "squared", None),
    "regularizer.reduction": one_of("mean", "sum", None),
    "regularizer.gamma": either(nothing, AMOUNT, relative_gamma),
    "regularizer.divide_by_accumulation": either(nothing, flag),
    "regularizer.reorthonormalize": COUNT_FROM_0,
    "data.path": name,
    "data.name": OPEN_WORDS,
    "data.format": one_of("auto", "metamath", "codefeedback", "alpaca", "gsm8k", "chat", "text"),
    "data.train_split": words,
    "data.eval_path": either(nothing, name),
    "data.eval_split": OPEN_WORDS,
    "data.eval_size": COUNT_FROM_0,
    "data.max_length": whole(8, 10**7),
    "train.steps": OPEN_COUNT,
    "train.epochs": ABOVE_ZERO,
    "train.global_batch_size": OPEN_BATCH,
    "train.micro_batch_size": OPEN_BATCH,
    "train.gradient_accumulation_steps": OPEN_BATCH,
    "train.gradient_clipping": either(nothing, AMOUNT),
    "train.learning_rate": ABOVE_ZERO,
    "train.warmup_ratio": SHARE,
    "train.weight_decay": AMOUNT,
    "train.adam_betas": lambda value: many(SHARE)(value) and len(value) == 2,
    "train.adam_epsilon": real(0, 1, above=True),
    "train.gradient_checkpointing": flag,
    "train.precision": one_of("auto", "fp32", "mixed", "bf16"),
    "train.check_memory": flag,
    "train.eval_every": COUNT_FROM_0,
    "train.seed": whole(0, 2**32 - 1),
    "train.timeout_minutes": real(0, 30 * 24 * 60, above=True),
    "train.max_start_gap": either(nothing, ABOVE_ZERO),
    "analysis.every": COUNT_FROM_0,
    "analysis.layers": LIST_OR_WORDS,
    "output.folder": name,
    "output.name": either(nothing, lambda value: name(value) and "/" not in value and value not in (".", "..")),
    "output.save_every": COUNT_FROM_0,
    "output.keep_checkpoints": COUNT,
    "output.wandb": one_of("off", "online", "offline"),
    "output.wandb_project": words,
}
SECTIONS = {path.partition(".")[0] for path in SETTINGS if "." in path}

_SIZE, _SIZE_FROM_0 = power(1, 2**63 - 1), power(0, 2**63 - 1)
_ZERO: dict[str, Rule] = {
    "stage": power(0, 3),
    **dict.fromkeys(
        ("reduce_bucket_size", "allgather_bucket_size", "sub_group_size", "zero_hpz_partition_size"), _SIZE
    ),
    **dict.fromkeys(
        (f"stage3_{name}" for name in (
            "prefetch_bucket_size", "param_persistence_threshold", "model_persistence_threshold",
            "max_live_parameters", "max_reuse_distance", "module_granularity_threshold")), _SIZE_FROM_0,
    ),
    **dict.fromkeys(
        ("contiguous_gradients", "reduce_scatter", "use_multi_rank_bucket_allreduce", "allgather_partitions",
         "overlap_comm", "stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential",
         "ignore_unused_parameters", "parameter_alignment", "memory_efficient_linear", "override_module_apply",
         "log_trace_cache_warnings", "enable_sanity_checks"), flag,
    ),
    "super_offload": one_of(False), "round_robin_gradients": one_of(False), "compute_grad_norm": one_of(True),
    "zenflow": nothing,
}  # fmt: skip
_OFFLOAD = {"device": one_of("none", "cpu"), "pin_memory": flag}
DEEPSPEED: dict[str, Rule] = {
    "train_batch_size": power(1, 10**6),
    "train_micro_batch_size_per_gpu": power(1, 10**6),
    "gradient_accumulation_steps": power(1, 10**6),
    "gradient_clipping": AMOUNT,
    "steps_per_print": power(1, LARGEST),
    "wall_clock_breakdown": flag,
    "memory_breakdown": flag,
    "dump_state": flag,
    "bf16.enabled": flag,
    "bf16.immediate_grad_update": flag,
    "bf16.check_grad_overflow": flag,
    "fp16.enabled": one_of(False),
    "torch_autocast.enabled": flag,
    "torch_autocast.dtype": one_of("bfloat16", "bf16", "torch.bfloat16"),
    "torch_autocast.lower_precision_safe_modules": many(words),
    "data_types.grad_accum_dtype": one_of("fp32", "bf16"),
    "data_types.keep_in_fp32_modules": many(words),
    "comms_logger.enabled": flag,
    "comms_logger.prof_ops": many(words),
    **{f"zero_optimization.{key}": rule for key, rule in _ZERO.items() if key != "super_offload"},
    **{f"zero_optimization.offload_{what}.{key}": rule for what in ("param", "optimizer")
       for key, rule in _OFFLOAD.items()},
    "zero_optimization.offload_optimizer.super_offload": one_of(False),
    "zero_optimization.offload_optimizer.ratio": one_of(1, 1.0),
}  # fmt: skip
_DIGEST: Rule = lambda value: words(value) and re.fullmatch("[0-9a-f]{32}", value) is not None  # noqa: E731
_LAYER: Rule = lambda value: (  # noqa: E731
    mapping(one_of("out", "in", "rank"), COUNT)(value) and len(value) == 3 and value["rank"] <= min(value.values())
)
ADAPTER: dict[str, Rule] = {
    "base_model": name,
    "precision": one_of("fp32", "mixed", "bf16"),
    "method": SETTINGS["method"],
    "layers": mapping(words, _LAYER),
    "digests": mapping(words, _DIGEST),
    "files": mapping(one_of("adapter_model.safetensors", "initial_factors.safetensors"), _DIGEST),
    **{
        path: rule
        for path, rule in SETTINGS.items()
        if path.split(".")[0] in ("loading", "sorsa", "residual", "baseline")
    },
}
ADAPTER_NEEDS = ("base_model", "loading", "precision", "sorsa", "layers", "digests")
"""Entries without which an adapter cannot be put together."""
PEFT: dict[str, Rule] = {
    "peft_type": one_of("LORA", "ADALORA"),
    "base_model_name_or_path": OPEN_WORDS,
    "r": OPEN_RANK,
    "rank_pattern": either(nothing, mapping(words, either(RANK, lambda value: many(flag)(value) and value != []))),
}
_MEASURED = real(0, math.inf)
_LOSS = either(nothing, real(-math.inf, math.inf))
CHECKPOINT: dict[str, Rule] = {
    "format": one_of(1),
    "digest": words,
    "progress.step": one_of(3),
    "progress.seconds": _MEASURED,
    "progress.tokens": _MEASURED,
    "progress.reg_loss": either(nothing, _MEASURED),
    **dict.fromkeys((f"progress.{name}" for name in ("base_loss", "start_loss", "eval_loss_start")), _LOSS),
    "world_size": COUNT,
    "zero_stage": whole(0, 3),
    "regularizer.form": one_of("norm", "squared"),
    "regularizer.reduction": one_of("mean", "sum"),
    "regularizer.coefficient": _MEASURED,
    "regularizer.reorthonormalize": COUNT_FROM_0,
    "base": mapping(words, _DIGEST),
    "initial_factors": either(_DIGEST, one_of("")),
    "data": _DIGEST,
    "versions": mapping(words, words),
    "files": mapping(
        lambda name: words(name) and re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) is not None,
        lambda entry: type(entry) is dict and entry.keys() == {"bytes", "digest"} and whole(0, 2**63)(entry["bytes"])
        and _DIGEST(entry["digest"]),
    ),
    **{f"config.{path}": rule for path, rule in SETTINGS.items()},
    "config.train.global_batch_size": BATCH,
    "config.train.micro_batch_size": BATCH,
}  # fmt: skip
CHECKPOINT_NEEDS = (
    "format", "digest", "progress", "world_size", "zero_stage", "scheduler", "regularizer", "config", "ds_config",
    "base", "initial_factors", "data", "versions", "config.train", "config.train.global_batch_size",
    "config.train.micro_batch_size",
)  # fmt: skip
LAST_EPOCH = one_of(3)
"""What a schedule says after the third step, which is that of the checkpoint."""


class Nonsense(Exception):
    """A file makes no sense; the message says why."""


def strict_json(text: str) -> Any:
    """The value of a JSON text by the letter of the standard.

    Raises:
        Nonsense: it is not JSON, has a key twice or a number that is none, or is nested too deeply.
    """

    def constant(name: str) -> None:
        raise Nonsense(name)

    [value] = _values(text, constant, most=1)
    if depth(value) > DEEPEST:
        raise Nonsense("nested too deeply")
    return value


def json_values(text: str) -> list[Any]:
    """The values of a text in which JSON follows JSON; NaN and Infinity stand for null, as readers of data take them.

    Raises:
        Nonsense: it is not JSON, or has a key twice.
    """
    return _values(text, lambda name: None)


def _values(text: str, constant: Callable[[str], Any], most: int | None = None) -> list[Any]:

    def pairs(found: list[tuple[str, Any]]) -> dict:
        if len(dict(found)) < len(found):
            raise Nonsense("a key stands twice")
        return dict(found)

    decoder = json.JSONDecoder(object_pairs_hook=pairs, parse_constant=constant)
    found, place, blank = [], 0, " \t\r\n"
    try:
        while rest := text[place:].lstrip(blank):
            if len(found) == most:
                raise Nonsense("something follows the value")
            value, length = decoder.raw_decode(rest)
            place = len(text) - len(rest) + length
            found.append(value)
    except (ValueError, RecursionError) as error:
        raise Nonsense(f"not JSON: {error}") from error
    if most and not found:
        raise Nonsense("nothing")
    return found


def depth(value: Any) -> int:
    """How many lists and objects are inside one another."""
    level, deep = [value], 0
    while level := [inner for inner in level if isinstance(inner, list | dict)]:
        deep += 1
        level = [one for outer in level for one in (outer.values() if isinstance(outer, dict) else outer)]
    return deep


def entries(value: dict, rules: dict[str, Rule], empty: Rule, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted path and value of every entry, with sections of the table gone into.

    Raises:
        Nonsense: a section is neither an object nor what may stand for an empty one.
    """
    for key, inner in value.items():
        path = f"{prefix}{key}"
        if path in rules or not any(known.startswith(f"{path}.") for known in rules):
            yield path, inner
        elif isinstance(inner, dict):
            yield from entries(inner, rules, empty, f"{path}.")
        elif not empty(inner):
            raise Nonsense(f"{path} is no object")


def check(
    value: Any, rules: dict[str, Rule], *, needs: tuple[str, ...] = (), anywhere: Rule = never, empty: Rule = never,
    ignored: Rule = never,
) -> None:  # fmt: skip
    """Check every entry of an object against a table.

    Args:
        needs: dotted paths that must be there.
        anywhere: what may stand for any value. empty: what may stand for a section.
        ignored: whether an entry that is not in the table may be there, by its path.

    Raises:
        Nonsense: an entry is missing or not in the table, or has a value that its rule does not allow.
    """
    if not isinstance(value, dict):
        raise Nonsense("no object")
    for path, inner in entries(value, rules, empty):
        if path not in rules:
            if not ignored(path):
                raise Nonsense(f"there is no entry {path[:80]!r}")
        elif not (rules[path](inner) or anywhere(inner)):
            raise Nonsense(f"{path} is {str(inner)[:80]!r}")
    for path in needs:
        if not has(value, path):
            raise Nonsense(f"{path} is missing")


def has(value: Any, path: str) -> bool:
    """Whether an entry is there, by its dotted path."""
    for part in path.split("."):
        if not isinstance(value, dict) or part not in value:
            return False
        value = value[part]
    return True
