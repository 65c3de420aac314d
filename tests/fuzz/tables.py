"""What makes sense in each file, written down by hand: the judge of what the program accepts.

Each table says for an entry, by its dotted path, what its value may be; an entry that is in no table makes no sense.
Nothing here asks the program. A change of a setting's range is written down here as well, on purpose.
"""

import math
import re

from tests.fuzz.rules import (
    LARGEST,
    Rule,
    blocks,
    either,
    flag,
    many,
    mapping,
    name,
    nothing,
    one_of,
    power,
    real,
    relative_gamma,
    whole,
    words,
)

AMOUNT = real(0, LARGEST)
ABOVE_ZERO = real(0, LARGEST, above=True)
SHARE = real(0, 1, below=True)
RANK = whole(1, 65_536)
COUNT, COUNT_FROM_0 = whole(1, LARGEST), whole(0, LARGEST)
BATCH = whole(1, 1_000_000)
LIST_OR_WORDS = either(words, many(words))
OPEN_BATCH, OPEN_COUNT, OPEN_WORDS = (either(nothing, rule) for rule in (BATCH, COUNT, words))
OPEN_RANK = either(nothing, RANK)
FORMAT = one_of("auto", "metamath", "codefeedback", "alpaca", "alpaca_chat", "gsm8k", "chat", "completion",
                "tokens", "text")  # fmt: skip
TRACKER = one_of("wandb", "tensorboard", "mlflow", "comet_ml", "trackio", "swanlab", "aim", "clearml", "dvclive")
SOURCE: dict[str, Rule] = {
    "path": name,
    "weight": either(nothing, ABOVE_ZERO),
    "name": OPEN_WORDS,
    "format": either(nothing, FORMAT),
    "columns": either(nothing, mapping(words, name)),
    "prompt": OPEN_WORDS,
    "train_split": OPEN_WORDS,
    "eval_path": either(nothing, name),
    "eval_split": OPEN_WORDS,
    "eval_size": either(nothing, COUNT_FROM_0),
}


def source(value) -> bool:
    """A source of a mix: a mapping with a path, and no entries but those of SOURCE."""
    known = isinstance(value, dict) and "path" in value and value.keys() <= SOURCE.keys()
    return known and all(SOURCE[key](inner) for key, inner in value.items())


SETTINGS: dict[str, Rule] = {
    "model": name,
    "method": one_of("sorsa", "lora", "pissa", "adalora", "dora", "olora", "full", "partial", "galore"),
    "loading.revision": OPEN_WORDS,
    "loading.trust_remote_code": flag,
    "loading.attn_implementation": one_of("auto", "eager", "sdpa", "flash_attention_2"),
    "adapter.targets": LIST_OR_WORDS,
    "adapter.layers": either(blocks, many(blocks)),
    "adapter.train_whole": many(words),
    "adapter.exclude": many(words),
    "adapter.experts": one_of("adapt", "frozen"),
    "adapter.expert_rank": RANK,
    "adapter.rank": RANK,
    "adapter.rank_pattern": mapping(words, RANK),
    "adapter.alpha": either(nothing, ABOVE_ZERO),
    "adapter.rslora": flag,
    "adapter.dropout": SHARE,
    "sorsa.triplets": one_of("leading", "trailing", "window", "null_space"),
    "sorsa.directions": either(nothing, name),
    "sorsa.window_start": either(nothing, COUNT_FROM_0),
    "sorsa.column_rates": one_of("equal", "inverse_sqrt", "inverse"),
    "sorsa.s_lr_ratio": ABOVE_ZERO,
    "sorsa.s_space": one_of("linear", "log"),
    "sorsa.svd": one_of("randomized", "exact"),
    "sorsa.svd_tolerance": ABOVE_ZERO,
    "sorsa.svd_max_iterations": whole(1, 1000),
    "sorsa.svd_cache": name,
    "baseline.loraplus_lr_ratio": either(nothing, ABOVE_ZERO),
    "baseline.pissa_iterations": whole(0, 1000),
    "baseline.adalora_init_rank": OPEN_RANK,
    "baseline.adalora_target_rank": OPEN_RANK,
    "baseline.adalora_t_init": either(nothing, COUNT_FROM_0),
    "baseline.adalora_t_final": either(nothing, COUNT_FROM_0),
    "baseline.adalora_delta_t": COUNT,
    "baseline.adalora_beta1": real(0, 1, above=True, below=True),
    "baseline.adalora_beta2": real(0, 1, above=True, below=True),
    "baseline.adalora_orthogonal_weight": AMOUNT,
    "baseline.galore_rank": RANK,
    "baseline.galore_update_gap": COUNT,
    "baseline.galore_scale": ABOVE_ZERO,
    "residual.storage": one_of("auto", "fp32", "bf16", "nf4", "nf4_double", "int8"),
    "residual.block_size": one_of(64, 128, 256, 512, 1024),
    "residual.iterations": whole(1, 1000),
    "regularizer.preset": one_of("default", "reference", "paper"),
    "regularizer.form": one_of("norm", "squared", None),
    "regularizer.reduction": one_of("mean", "sum", None),
    "regularizer.gamma": either(nothing, AMOUNT, relative_gamma),
    "regularizer.divide_by_accumulation": either(nothing, flag, COUNT),
    "regularizer.reorthonormalize": COUNT_FROM_0,
    "data.path": name,
    "data.name": OPEN_WORDS,
    "data.format": FORMAT,
    "data.columns": mapping(words, name),
    "data.prompt": OPEN_WORDS,
    "data.learn": one_of("all", "last"),
    "data.chat_template": either(nothing, name),
    "data.new_tokens": lambda value: many(words)(value) and "" not in value and len(set(value)) == len(value),
    "data.train_split": words,
    "data.eval_path": either(nothing, name),
    "data.eval_split": OPEN_WORDS,
    "data.eval_size": COUNT_FROM_0,
    "data.max_length": whole(8, 10**7),
    "data.truncation": one_of("right", "left", "drop", "error"),
    "data.packing": flag,
    "data.mix": either(many(source), lambda value: value == []),
    "data.mix_until": one_of("all_exhausted", "first_exhausted"),
    "data.streaming": flag,
    "data.shuffle_buffer": whole(1, 10**6),
    "train.steps": OPEN_COUNT,
    "train.epochs": ABOVE_ZERO,
    "train.global_batch_size": OPEN_BATCH,
    "train.micro_batch_size": either(OPEN_BATCH, one_of("auto")),
    "train.micro_batch_tokens": either(nothing, whole(8, 10**9), one_of("auto")),
    "train.sequence_parallel": whole(1, 4096),
    "train.gradient_accumulation_steps": OPEN_BATCH,
    "train.gradient_clipping": either(nothing, AMOUNT),
    "train.learning_rate": either(one_of("auto"), ABOVE_ZERO),
    "train.warmup_ratio": SHARE,
    "train.schedule": one_of(
        "cosine", "linear", "constant", "constant_with_warmup", "cosine_with_min_lr", "warmup_stable_decay"
    ),
    "train.min_lr_ratio": SHARE,
    "train.decay_ratio": SHARE,
    "train.optimizer": one_of("adamw", "adamw_8bit"),
    "train.weight_decay": AMOUNT,
    "train.adam_betas": lambda value: many(SHARE)(value) and len(value) == 2,
    "train.adam_epsilon": real(0, 1, above=True),
    "train.gradient_checkpointing": flag,
    "train.precision": one_of("auto", "fp32", "mixed", "bf16"),
    "train.loss_chunk": either(COUNT_FROM_0, one_of("auto")),
    "train.label_smoothing": SHARE,
    "train.neftune_noise_alpha": either(nothing, ABOVE_ZERO),
    "train.compile": one_of("auto", "off"),
    "train.check_memory": flag,
    "train.deterministic": flag,
    "train.eval_every": COUNT_FROM_0,
    "train.profile_steps": whole(0, 100),
    "train.profile_trace": flag,
    "train.seed": whole(0, 2**32 - 1),
    "train.timeout_minutes": real(0, 30 * 24 * 60, above=True),
    "train.max_start_gap": either(nothing, ABOVE_ZERO),
    "evaluation.samples": whole(0, 1000),
    "evaluation.samples_every": COUNT,
    "evaluation.sample_tokens": whole(1, 4096),
    "evaluation.last_answer": flag,
    "evaluation.keep_best": flag,
    "evaluation.patience": COUNT_FROM_0,
    "evaluation.min_delta": AMOUNT,
    "analysis.every": COUNT_FROM_0,
    "analysis.layers": LIST_OR_WORDS,
    "output.folder": name,
    "output.name": either(nothing, lambda value: name(value) and "/" not in value and value not in (".", "..")),
    "output.save_every": COUNT_FROM_0,
    "output.keep_checkpoints": COUNT,
    "output.peft_adapter": flag,
    "output.trackers": lambda value: many(TRACKER)(value) and len(set(value)) == len(value),
    "output.wandb": one_of("off", "online", "offline"),
    "output.wandb_project": words,
}
EARLIER: dict[str, Rule] = {
    f"sorsa.{name}": SETTINGS[f"adapter.{name}"]
    for name in (
        "targets",
        "exclude",
        "train_whole",
        "rank",
        "experts",
        "expert_rank",
        "rank_pattern",
        "alpha",
        "dropout",
    )
}
"""Settings under the names that they had in earlier versions."""
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
    "files": mapping(
        one_of("adapter_model.safetensors", "trained_factors.safetensors", "initial_factors.safetensors"), _DIGEST
    ),
    "new_tokens": mapping(words, COUNT_FROM_0),
    **{
        path: rule
        for path, rule in (SETTINGS | EARLIER).items()
        if path.split(".")[0] in ("loading", "adapter", "sorsa", "residual", "baseline")
    },
}
ADAPTER_NEEDS = ("base_model", "loading", "precision", "layers", "digests")
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
    **dict.fromkeys((f"progress.best.{name}" for name in ("step", "waited", "seen")), whole(0, LARGEST)),
    **dict.fromkeys((f"progress.best.{name}" for name in ("loss", "reference")), _LOSS),
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
    **{f"config.{path}": rule for path, rule in (SETTINGS | EARLIER).items()},
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
