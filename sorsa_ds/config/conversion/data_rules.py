"""The rules of keys about the rows of data sets: how many, their columns, and which of their tokens are learned."""

from collections.abc import Callable
from typing import Any

from sorsa_ds.config.conversion.data_sets import datasets, held_out
from sorsa_ds.config.conversion.result import Conversion, is_off, is_on, names_of


def eval_size(made: Conversion, key: str, value: Any) -> None:
    """Held-out rows: their number, or their share of all."""
    limit = made.keys.get("max_samples")
    if not isinstance(value, int | float) or isinstance(value, bool):
        made.refuse(key, f"{value!r} is neither a number of rows nor a share")
    elif value >= 1 or value == 0:
        made.set("data.eval_size", int(value), key)
    elif isinstance(limit, int):
        made.set("data.eval_size", round(value * limit), key, "the last rows are held out, not random ones")
    elif abs(percent := round(100 * value) - 100 * value) > 1e-9:
        made.refuse(
            key, f"a share is cut in whole per cent, and {value} lies {percent:+.2g} off: give a number of rows"
        )
    elif (split := _whole_split(made, key)) is not None:
        rest = round(100 - 100 * value)
        made.settings["data.train_split"] = f"{split}[:{rest}%]", key
        made.set("data.eval_split", f"{split}[{rest}%:]", key, "the last rows are held out, not random ones")


def max_samples(made: Conversion, key: str, value: Any) -> None:
    """The first rows alone."""
    if (split := _whole_split(made, key)) is not None:
        made.settings["data.train_split"] = f"{split}[:{value}]", key


def _whole_split(made: Conversion, key: str) -> str | None:
    """The split of which a part is taken; None, and refused, where it is a part already, or each source has its own."""
    split = made.value("data.train_split") or "train"
    if "[" in split or any("train_split" in source for source in made.value("data.mix") or []):
        made.refuse(key, "it is a part of splits that are parts, or differ: say it in data.train_split and eval_split")
        return None
    return split


def learn(made: Conversion, key: str, value: Any) -> None:
    """Which tokens are learned: those of responses, here, and nothing else."""
    if key == "mask_history":
        made.set("data.learn", "last" if is_on(value) else "all", key)
    elif key in (
        "completion_only_loss",
        "assistant_only_loss",
        "train_on_responses_only",
        "response_only",
        "mask_prompt",
    ):
        if not is_on(value):
            made.refuse(key, "prompts are never learned here, but for data.format=text, which is learned as a whole")
    elif not is_off(value) and value not in (["assistant"], "assistant"):
        made.refuse(key, "prompts are never learned here, but for data.format=text, which is learned as a whole")


def template(made: Conversion, key: str, value: Any) -> None:
    """A chat template by another trainer's name; the model's own is nearly always that one."""
    if "jinja" in key:
        made.refuse(key, "write the template into a file, and name that by data.chat_template")
    elif made.kind.title == "LLaMA-Factory" and str(value) in ("default", "empty"):
        if made.keys.get("stage") == "pt":
            made.leave(key, "plain text is in no template")
        else:
            made.refuse(
                key, f"{value!r} is a layout of LLaMA-Factory's own; say it by data.prompt or data.chat_template"
            )
    elif str(value) not in ("tokenizer_default", "default", "empty"):
        made.leave(key, "the tokenizer's own template is taken; where it has none, set data.chat_template to a file")


def tokens(made: Conversion, key: str, value: Any) -> None:
    """New tokens; of special ones those that are added, not those that get another meaning."""
    if not isinstance(value, dict):
        made.set("data.new_tokens", names_of(value), key)
    elif odd := [name for name, token in value.items() if name != "pad_token" and token is not None]:
        made.refuse(key, f"{', '.join(map(str, odd))} would get another meaning; change the tokenizer's folder")
    else:
        made.leave(key, "padding is never learned, so its token does not matter")


def columns(made: Conversion, key: str, value: Any) -> None:
    """The column of plain text."""
    if key in ("dataset_text_field", "text_column", "text_field"):
        made.set("data.columns", {"text": value}, key)
        made.set("data.format", "text", key)
    else:
        made.refuse(key, "say it by data.columns")


def refused(why: str) -> Callable[[Conversion, str, Any], None]:
    """The rule of keys that cannot be carried over."""
    return lambda made, key, value: made.refuse(key, why)


PACKED = (
    "BATCH: a row full of examples counts as one example there. Here train.global_batch_size counts the examples in "
    "the rows: to learn as many tokens in a step, multiply it by the examples that fit into a row, which are "
    "data.max_length over their mean length (`sorsa preview` tells it)"
)
"""What differs of a batch with packing, in the form of a note."""


def packing(made: Conversion, key: str, value: Any) -> None:
    """Examples side by side, on or off."""
    if key == "packing_strategy":
        made.leave(key, "rows are filled as the examples of a step fit")
    elif is_on(value) or is_off(value):
        made.set("data.packing", is_on(value), key, PACKED if is_on(value) else None)
    else:
        made.refuse(key, f"{value!r} is neither on nor off")


def truncation(made: Conversion, key: str, value: Any) -> None:
    """What becomes of examples that are too long."""
    known = {"left": "left", "right": "right", "drop": "drop", "truncate": "right", "keep_start": "right",
             "raise": "error"}  # fmt: skip
    if str(value) in known:
        made.set("data.truncation", known[str(value)], key)
    else:
        made.refuse(key, f"{value!r}: here are right, left, drop and error")


def mix_until(made: Conversion, key: str, value: Any) -> None:
    """When a mix ends."""
    known = {"interleave_under": "first_exhausted", "interleave_over": "all_exhausted",
             "first_exhausted": "first_exhausted", "all_exhausted": "all_exhausted"}  # fmt: skip
    if str(value) in known:
        made.set("data.mix_until", known[str(value)], key)
    elif value != "concat":
        made.refuse(key, f"there is no {value!r} here")


def shares(made: Conversion, key: str, value: Any) -> None:
    """Weights of data sets, which the data sets' own rule has taken."""
    if key != "interleave_probs":
        made.refuse(key, "say it by data.mix")


RULES = {
    "data.path": datasets,
    "data.eval_path": held_out,
    "data.eval_size": eval_size,
    "data.train_split=train[:1000]": max_samples,
    "data.learn": learn,
    "data.chat_template": template,
    "data.new_tokens": tokens,
    "data.columns": columns,
    "data.prompt": refused("say it by data.prompt"),
    "data.format": refused("say it by data.format"),
    "data.packing": packing,
    "data.truncation": truncation,
    "data.mix": shares,
    "data.mix_until": mix_until,
    "data.shuffle_buffer": lambda made, key, value: made.leave(key, "data.shuffle_buffer counts rows of a stream"),
}
"""Setting, perhaps with its value -> the rule of the keys that it stands for."""
