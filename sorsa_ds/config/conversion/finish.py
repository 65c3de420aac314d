"""What follows from several keys of another trainer's file at once: its method, its targets, its batch."""

from collections.abc import Collection

from sorsa_ds.config.conversion.meaning import path_of
from sorsa_ds.config.conversion.result import Conversion, is_off, is_on

LORAS_SCALE = ("adapter.alpha", "adapter.rslora")
"""Settings of LoRA's scale. Its product begins at zero, and SORSA's at the singular triplets of the weight."""


def finish(made: Conversion, without: Collection[str]) -> None:
    """Complete a conversion whose keys have been looked at one by one.

    Args:
        without: keys that are left out as asked.
    """
    _finish_method(made)
    _finish_scale(made)
    _check_targets(made, without)
    _finish_held_out(made)
    _finish_batch(made)
    made.notes |= {key: note for key, note in made.kind.notes.items() if key not in made.keys}


def _finish_method(made: Conversion) -> None:
    """The method of training."""
    adapters = any(path_of(key).startswith("adapter.") and not is_off(value) for key, value in made.keys.items())
    if made.method is not None:
        made.settings["method"] = made.method, "--method"
    elif "method" not in made.settings and (key := _trains_all(made)):
        made.settings["method"] = "full", key
        made.notes[key] = f"without it, {made.kind.title} trains all weights; --method sorsa trains an adapter"
    elif "method" not in made.settings:
        made.settings["method"] = "sorsa", "method"
        told = "SORSA takes the place of LoRA; --method lora keeps LoRA"
        made.notes["method"] = told if adapters else "the file does not say it: SORSA, as this program's defaults"
        if adapters and "train.learning_rate" in made.settings:
            made.notes["learning_rate"] = "SORSA wants a much smaller one than LoRA: docs/sorsa_for_lora_users.md"


def _trains_all(made: Conversion) -> str:
    """The key by which the other trainer trains all weights; empty where it trains an adapter, or the file is silent.

    TRL's arguments of a script say which model is trained, and those of a trainer alone say nothing of either.
    """
    if made.kind.title == "axolotl" and is_off(made.keys.get("adapter")):
        return "adapter"
    if made.kind.title == "TRL" and not is_on(made.keys.get("use_peft")):
        return "use_peft" if {"use_peft", "model_name_or_path"} & made.keys.keys() else ""
    return ""


def _finish_scale(made: Conversion) -> None:
    """LoRA's scale, which has no meaning for SORSA, and which LLaMA-Factory takes from the rank."""
    rank = made.value("adapter.rank")
    silent = "adapter.alpha" not in made.settings and not any(path_of(key) == "adapter.alpha" for key in made.keys)
    if made.value("method") != "sorsa":
        if made.kind.title == "LLaMA-Factory" and isinstance(rank, int) and silent and made.value("method") != "full":
            made.settings["adapter.alpha"] = 2 * rank, "lora_alpha"
            made.defaulted.append(f"lora_alpha={2 * rank}")
        return
    for path in LORAS_SCALE:
        if path in made.settings:
            value, key = made.settings.pop(path)
            assumed = f"{key}={value}"
            if assumed in made.defaulted:
                made.defaulted.remove(assumed)
            elif is_off(value):
                made.unset.append(key)
            else:
                made.leave(key, "it scales LoRA's product; SORSA's is the weight's own, with scale 1")


def _check_targets(made: Conversion, without: Collection[str]) -> None:
    """Stop where the other trainer would choose the linears by a table that is not in the file.

    With `--without` of the key all linears are taken, as this program does by default.
    """
    key = made.kind.targets
    chosen = "adapter.targets" in made.settings or any(
        not is_off(made.keys.get(one)) for one in (key, "adapter.targets")
    )
    if not key or chosen or made.value("method") == "full":
        return
    if made.kind.title == "TRL" and not is_on(made.keys.get("use_peft")):
        return
    if key in without:
        made.leave(key, "left out as asked: all linears are adapted")
    else:
        made.refuse(
            key,
            "PEFT chooses them by the model's architecture, often q_proj and v_proj alone, and the file does not name "
            "them; without it all linears are adapted",
        )


def _finish_held_out(made: Conversion) -> None:
    """Rows of the training data that this program would hold out, where the other trainer holds out none.

    A file of PEFT's says nothing of training, which is all by this program's defaults then.
    """
    if made.kind.title == "PEFT":
        return
    held = {"data.eval_size", "data.eval_path", "data.eval_split"} & made.settings.keys()
    if not held and not any(path_of(key) == "data.eval_size" and not is_off(made.keys[key]) for key in made.keys):
        made.settings["data.eval_size"] = 0, "held-out rows"
        made.defaulted.append("no held-out rows")


def _finish_batch(made: Conversion) -> None:
    """The batch of all ranks, where their number is known."""
    micro, each = made.value("train.micro_batch_size"), made.value("train.gradient_accumulation_steps") or 1
    if made.gpus is not None and isinstance(micro, int) and isinstance(each, int):
        if "train.global_batch_size" not in made.settings:
            made.settings["train.global_batch_size"] = micro * each * made.gpus, "--gpus"
        if (said := made.settings.pop("train.gradient_accumulation_steps", None)) is not None:
            made.notes[said[1]] = "it is within train.global_batch_size, and follows on any number of GPUs"
