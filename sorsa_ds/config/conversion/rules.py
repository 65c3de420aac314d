"""How the value of another trainer's key becomes that of a setting here: a rule for each setting that needs one.

Which key is which setting stands in `sorsa_ds.config.other_names`. A setting without a rule takes the value as it is.
"""

from typing import Any, get_args

from sorsa_ds.config.conversion import data_rules, output_rules
from sorsa_ds.config.conversion.result import Conversion, Rule, is_off, is_on, names_of
from sorsa_ds.config.schedules import ScheduleName

_METHODS = ("dora", "olora", "pissa", "adalora")
_ADAMW = ("adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "paged_adamw_32bit")
_IN_FP32 = ("axolotl", "TRL", "transformers")
"""Trainers that compute in fp32 where bf16 and fp16 are off."""
_ADAMW_8BIT = ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit")


def method(made: Conversion, key: str, value: Any) -> None:
    """`finetuning_type`, `adapter`, `peft_type`, `init_lora_weights`."""
    name = str(value).lower()
    if name.startswith("pissa_niter_") and name.removeprefix("pissa_niter_").isdecimal():
        made.set("method", "pissa", key)
        made.set("baseline.pissa_iterations", int(name.removeprefix("pissa_niter_")), key)
    elif name == "full":
        made.set("method", "full", key)
    elif name in _METHODS:
        made.set("method", name, key)
    elif name == "qlora":
        made.set("residual.storage", "nf4", key)
    elif name not in ("lora", "true", "gaussian"):
        made.refuse(key, f"there is no {value!r} here")


def targets(made: Conversion, key: str, value: Any) -> None:
    """Names of linears; `all`, `all-linear`, and true of `lora_target_linear`, are all of them."""
    if is_on(value) or str(value).lower() in ("all", "all-linear"):
        made.settings["adapter.targets"] = "all-linear", key  # beside others that are named
    elif not is_off(value):
        names = names_of(value)
        odd = [name for name in names if not name.replace("_", "").replace(".", "").replace("-", "").isalnum()]
        if odd:
            made.refuse(key, f"{odd[0]!r} is a pattern; name the linears, or give globs by adapter.targets")
        elif made.value("adapter.targets") != "all-linear":
            made.set("adapter.targets", names, key)


def names(path: str) -> Rule:
    """The rule of a setting that is a list of names."""

    def rule(made: Conversion, key: str, value: Any) -> None:
        made.set(path, names_of(value), key)

    return rule


def layers(made: Conversion, key: str, value: Any) -> None:
    """The numbers of blocks."""
    made.set("adapter.layers", value if isinstance(value, list) else [value], key)


def storage(made: Conversion, key: str, value: Any) -> None:
    """Bits, or the name of a format."""
    known = {"4": "nf4", "8": "int8", "nf4": "nf4", "bnb": None, "bitsandbytes": None}
    if str(value).lower() not in known:
        made.refuse(key, f"residuals are kept as nf4, nf4_double or int8 here, not as {value!r}")
    elif (kept := known[str(value).lower()]) is not None and made.value("residual.storage") != "nf4_double":
        made.set("residual.storage", kept, key)


def double(made: Conversion, key: str, value: Any) -> None:
    """Whether the scales of 4-bit codes are kept in 8 bits."""
    bits = any(is_on(made.keys.get(one)) for one in ("load_in_4bit", "use_4bit", "qlora"))
    if is_on(value) and (bits or made.keys.get("quantization_bit") == 4 or made.keys.get("adapter") == "qlora"):
        made.settings.pop("residual.storage", None)
        made.set("residual.storage", "nf4_double", key)
    elif is_on(value):
        made.leave(key, "nothing is kept in 4 bits")


def attention(made: Conversion, key: str, value: Any) -> None:
    """The kernel of attention."""
    flag = {"sdp_attention": "sdpa", "eager_attention": "eager"}.get(key)
    known = {"fa2": "flash_attention_2", "flash_attention_2": "flash_attention_2", "sdpa": "sdpa", "eager": "eager",
             "disabled": "eager", "auto": "auto", "true": "flash_attention_2"}  # fmt: skip
    kernel = flag if flag and is_on(value) else known.get(str(value).lower())
    if kernel is None:
        made.leave(key, f"there is no kernel {value!r} here; loading.attn_implementation chooses")
    else:
        made.set("loading.attn_implementation", kernel, key)


def trust(made: Conversion, key: str, value: Any) -> None:
    """Code that comes with a model, which no file of somebody's may allow."""
    made.leave(key, "only you can allow a model's own code: add loading.trust_remote_code=true to the command")


def schedule(made: Conversion, key: str, value: Any) -> None:
    """The name of a schedule, as transformers has it."""
    if value not in get_args(ScheduleName):
        made.refuse(key, f"there is no schedule {value!r}; there are {', '.join(get_args(ScheduleName))}")
    else:
        made.set("train.schedule", value, key)


def warmup(made: Conversion, key: str, value: Any) -> None:
    """Steps of the warm-up, or their share where they are fewer than one."""
    if (made.keys.get("lr_scheduler_type") or made.keys.get("lr_scheduler")) == "constant":
        made.leave(key, "a constant rate has no warm-up")
    elif not value and key != "warmup_ratio" and made.keys.get("warmup_ratio"):
        made.leave(key, "warmup_ratio says it")
    elif key == "warmup_ratio" and made.keys.get("warmup_steps"):
        made.leave(key, "warmup_steps says it")
    elif not isinstance(value, int | float) or isinstance(value, bool):
        made.refuse(key, f"{value!r} is no number of steps")
    elif value < 1:
        made.set("train.warmup_ratio", float(value), key)
    elif (share := made.of_whole(key, value)) is not None:
        made.set("train.warmup_ratio", share, key)


def floor(made: Conversion, key: str, value: Any) -> None:
    """The least learning rate, as a fraction of the largest."""
    given = {name: one for name, one in value.items() if one is not None} if isinstance(value, dict) else {key: value}
    if odd := given.keys() - {"min_lr_rate", "cosine_min_lr_ratio", "min_lr", "min_learning_rate", "lr_min", "end_lr"}:
        made.refuse(key, f"a schedule has no {', '.join(sorted(odd))} here")
        return
    if len(given) != 1 or not all(isinstance(one, int | float) for one in given.values()):
        told = ", ".join(f"{name}={one!r}" for name, one in given.items()) or "nothing"
        made.refuse(key, f"the least rate is one number, and here it is {told}: leave one of them in the file")
        return
    kept = made.value("train.schedule") or "cosine"  # which convert has looked at before
    if kept not in ("cosine", "cosine_with_min_lr", "warmup_stable_decay"):
        made.leave(key, f"the schedule {kept} has no floor")
        return
    [(name, least)] = given.items()
    rate = made.keys.get("learning_rate")
    share = least if name in ("min_lr_rate", "cosine_min_lr_ratio") else least / rate if rate else None
    if share is None:
        made.refuse(key, "it is a fraction of the learning rate, which the file does not say")
        return
    made.set("train.min_lr_ratio", share, key)
    if kept == "cosine":
        made.settings["train.schedule"] = "cosine_with_min_lr", key


def optimizer(made: Conversion, key: str, value: Any) -> None:
    """AdamW in one of its forms."""
    name = str(value).lower()
    if name in _ADAMW or name in _ADAMW_8BIT:
        note = "moments stay on the GPU" if name.startswith("paged") else None
        made.set("train.optimizer", "adamw_8bit" if name in _ADAMW_8BIT else "adamw", key, note)
    else:
        made.refuse(key, f"there is no optimizer {value!r}; there are AdamW and its 8-bit form")


def betas(made: Conversion, key: str, value: Any) -> None:
    """Both betas of AdamW, of which a file may name one."""
    first, second = (made.keys.get(f"adam_beta{number}") for number in (1, 2))
    both = value if isinstance(value, list) else [0.9 if first is None else first, 0.999 if second is None else second]
    made.set("train.adam_betas", both, key)


def batch(made: Conversion, key: str, value: Any) -> None:
    """Examples of a step: of all ranks, but axolotl's `batch_size` is that of one, from which accumulation follows."""
    if made.kind.title != "axolotl" or key != "batch_size":
        made.set("train.global_batch_size", value, key)
        return
    micro = made.keys.get("micro_batch_size") or made.kind.defaults["micro_batch_size"]
    if made.keys.get("gradient_accumulation_steps"):
        made.leave(key, "gradient_accumulation_steps says it")
    elif isinstance(value, int) and isinstance(micro, int) and value >= micro > 0:
        made.set(
            "train.gradient_accumulation_steps", value // micro, key, f"of one GPU: {value} // {micro} micro-batches"
        )
    else:
        made.refuse(key, f"{value!r} is no number of examples of one GPU that holds a micro-batch of {micro!r}")


def micro_batch(made: Conversion, key: str, value: Any) -> None:
    """Examples of a forward pass on one rank; those of an evaluation are no setting of their own."""
    if "eval" in key:
        made.leave(key, "evaluations take train.micro_batch_size")
    else:
        made.set("train.micro_batch_size", value, key)


def steps(made: Conversion, key: str, value: Any) -> None:
    """Optimizer steps; -1 stands for as many as the epochs make."""
    if isinstance(value, int | float) and value > 0:
        made.set("train.steps", int(value), key)


def epochs(made: Conversion, key: str, value: Any) -> None:
    """Passes over the data, unless a number of steps says when to end."""
    total = made.keys.get("max_steps")
    if isinstance(total, int) and total > 0:
        made.leave(key, "max_steps says when the run ends")
    else:
        made.set("train.epochs", float(value), key)


def precision(made: Conversion, key: str, value: Any) -> None:
    """A dtype of the model's weights, which here follows from the precision."""
    made.leave(key, "the weights are kept as train.precision and residual.storage say")


def half(made: Conversion, key: str, value: Any) -> None:
    """Products in bf16; a trainer that has them off, and fp16 too, computes in fp32."""
    if is_on(value):
        made.set("train.precision", "mixed", key)
    elif not is_off(value):
        made.refuse(key, f"{value!r} is neither on nor off")
    elif key == "bf16" and made.kind.title in _IN_FP32 and is_off(made.keys.get("fp16")):
        made.set("train.precision", "fp32", key, "off, and fp16 too: fp32, as there; train.precision=mixed is bf16")
    else:
        made.unset.append(key)


def checkpointing(made: Conversion, key: str, value: Any) -> None:
    """Recomputed activations, on or off."""
    if key.endswith("kwargs"):
        made.leave(key, "blocks are recomputed without reentrant checkpoints")
    elif key == "disable_gradient_checkpointing":
        made.set("train.gradient_checkpointing", not is_on(value), key)
    elif is_off(value) or is_on(value):
        made.set("train.gradient_checkpointing", is_on(value), key)
    else:
        made.set("train.gradient_checkpointing", True, key, f"{value!r} is plain recomputation here")


def left(why: str) -> Rule:
    """The rule of keys that are left out for one reason."""
    return lambda made, key, value: made.leave(key, why)


def seed(made: Conversion, key: str, value: Any) -> None:
    """The seed; the data's is the same one."""
    if key == "data_seed":
        made.leave(key, "train.seed is that of the data too")
    else:
        made.set("train.seed", value, key)


RULES: dict[str, Rule] = {
    "method": method,
    "adapter.targets": targets,
    "adapter.exclude": names("adapter.exclude"),
    "adapter.train_whole": names("adapter.train_whole"),
    "adapter.layers": layers,
    "adapter.experts": left("all experts of a mixture are adapted, with adapter.expert_rank"),
    "residual.storage": storage,
    "residual.storage=nf4_double": double,
    "residual.iterations": left("residual.iterations counts rounds, and the scheme of LoftQ is another one"),
    "loading.attn_implementation": attention,
    "loading.trust_remote_code": trust,
    "train.schedule": schedule,
    "train.warmup_ratio": warmup,
    "train.min_lr_ratio": floor,
    "train.optimizer": optimizer,
    "train.adam_betas": betas,
    "train.global_batch_size": batch,
    "train.micro_batch_size": micro_batch,
    "train.steps": steps,
    "train.epochs": epochs,
    "train.precision": precision,
    "train.precision=mixed": half,
    "train.gradient_checkpointing": checkpointing,
    "train.loss_chunk": left("train.loss_chunk=auto does what that is for"),
    "train.profile_steps": left("train.profile_steps measures the parts of a step"),
    "train.profile_trace": left("train.profile_steps measures the parts of a step"),
    "train.seed": seed,
    **data_rules.RULES,
    **output_rules.RULES,
}
"""Setting, perhaps with its value -> the rule of the keys that it stands for."""
