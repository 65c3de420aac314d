"""The rules of keys that say what is trained on: data sets, their columns, and which of their tokens are learned."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sorsa_ds.config.conversion.result import Conversion, is_off, is_on, names_of
from sorsa_ds.config.typed_json import typed
from sorsa_ds.runtime.json_text import parse_json

INFO = "dataset_info.json"
"""Where LLaMA-Factory says what the names of its data sets stand for."""

_ROLES = {frozenset(pair) for pair in (("role", "content"), ("from", "value"))}
_SAID = {"path", "type", "name", "split", "data_files", "ds_type", "chat_template"}
"""Entries of an axolotl data set that are looked at below."""
_HARMLESS = {
    "train_on_eos": ("turn",), "train_on_eot": ("turn",), "roles_to_train": (["assistant"],),
    "message_field_role": ("role", "from"),
    "message_field_content": ("content", "value"), "field_system": ("system",), "field_input": ("input",),
    "field_instruction": ("instruction",), "field_output": ("output",),
}  # fmt: skip
"""Entries of an axolotl data set -> the values with which they say what is so here in any case."""


def datasets(made: Conversion, key: str, value: Any) -> None:
    """Data sets: mappings as axolotl has them, names as LLaMA-Factory, or a file, folder or name on the hub."""
    if key == "dataset_dir":
        made.leave(key, f"data.path is read from its {INFO}")
    elif isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
        found = [_of_axolotl(made, key, one) for one in value]
        if key not in made.refused:
            _carry(made, key, [one for one in found if one])
    elif made.kind.title == "LLaMA-Factory" and key in ("dataset", "eval_dataset"):
        info = _dataset_info(made, key)
        found = [_of_info(made, key, name, info) for name in names_of(value)] if info is not None else []
        if key not in made.refused:
            _carry(made, key, found)
    elif isinstance(value, str):
        _carry(made, key, [{"path": value}])
    else:
        made.refuse(key, "it is no list of data sets with a path each")


def held_out(made: Conversion, key: str, value: Any) -> None:
    """Held-out data that is stored apart."""
    single = isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict)
    if isinstance(value, str) and made.kind.title != "LLaMA-Factory":
        made.set("data.eval_path", value, key)
    elif single and isinstance(value[0].get("path"), str):
        made.set("data.eval_path", value[0]["path"], key)
        made.set("data.eval_split", value[0].get("split") or "train", key)
    else:
        made.refuse(key, "one file, folder or name on the hub is expected: see data.eval_path")


def _carry(made: Conversion, key: str, found: list[dict[str, Any]]) -> None:
    """Carry data sets over: one as the settings of `data`, several as a mix."""
    weights = [float(weight) for weight in names_of(made.keys.get("interleave_probs") or [])]
    if len(found) == 1:
        for name, value in found[0].items():
            made.set(f"data.{name}", value, key)
    elif weights and len(weights) != len(found):
        made.refuse("interleave_probs", f"there are {len(weights)} of them for {len(found)} data sets")
    else:
        mixed = [one | {"weight": weight} for one, weight in zip(found, weights, strict=True)] if weights else found
        made.set("data.mix", mixed, key)


def _of_axolotl(made: Conversion, key: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """A data set of axolotl's as a source of this program; empty, and refused, where it has no counterpart."""
    path, kind = given.get("path"), given.get("type") or "completion"
    files = given.get("data_files")
    files = files[0] if isinstance(files, list) and len(files) == 1 else files
    if files is not None and (path not in (None, "json", "csv", "parquet", "text") or not isinstance(files, str)):
        made.refuse(key, f"data_files of {path}: name one file, as path")
        return {}
    found: dict[str, Any] = {"path": files or path}
    for name, value in given.items():
        expected = _HARMLESS.get(name)
        if not (is_off(value) or name in _SAID or (expected and value in expected) or _is_role(name, value)):
            columns = _columns(kind, name, value)
            if columns is None:
                made.refuse(
                    key, f"{name}={value!r} of {path} has no counterpart; data.columns and data.prompt may help"
                )
                return {}
            found["columns"] = found.get("columns", {}) | columns
    formats = {"alpaca": "alpaca", "chat_template": "chat", "sharegpt": "chat", "completion": "text"}
    if not isinstance(kind, str) or kind not in formats:
        made.refuse(key, f"type {kind!r} of {path}: here are {', '.join(formats)}, and data.prompt for others")
        return {}
    found["format"] = formats[kind]
    found |= {ours: given[theirs] for theirs, ours in (("name", "name"), ("split", "train_split")) if given.get(theirs)}
    if given.get("chat_template") not in (None, "tokenizer_default"):
        made.notes[key] = "conversations are in the tokenizer's own template; for another one set data.chat_template"
    return found


def _is_role(name: str, value: Any) -> bool:
    """Whether an entry names roles and contents of messages as data here may have them."""
    if name == "message_property_mappings":
        return isinstance(value, dict) and frozenset(value.values()) in _ROLES
    return name == "roles" and value == {"user": ["user"], "assistant": ["assistant"]}


def _columns(kind: Any, name: str, value: Any) -> dict[str, Any] | None:
    """Which column an entry of a data set names, by its role here; None where it names none."""
    roles = {
        ("chat_template", "field_messages"): "messages", ("sharegpt", "field_messages"): "messages",
        ("completion", "field"): "text",
        ("alpaca", "field_instruction"): "prompt", ("alpaca", "field_output"): "response",
        ("alpaca", "field_input"): "input", ("alpaca", "field_system"): "system",
    }  # fmt: skip
    role = roles.get((kind, name)) if isinstance(kind, str) else None
    return {role: value} if role and isinstance(value, str) else None


def _dataset_info(made: Conversion, key: str) -> dict[str, Any] | None:
    """What LLaMA-Factory's names of data sets stand for; None, and refused, where the file is not there."""
    folder = Path(str(made.keys.get("dataset_dir") or "data"))
    places = [folder / INFO]
    if (beside := made.file.parent / folder / INFO).absolute() != places[0].absolute():
        places.append(beside)
    for place in places:
        if place.is_file():
            try:
                return typed(dict[str, Any], parse_json(place.read_text(encoding="utf-8")))
            except (OSError, ValueError) as error:
                made.refuse(key, f"{place}: cannot be read ({error})")
                return None
    made.refuse(key, f"its names stand in {INFO}, which is not at {' or '.join(map(str, places))}: set dataset_dir")
    return None


def _of_info(made: Conversion, key: str, name: str, info: Mapping[str, Any]) -> dict[str, Any]:
    """A data set by LLaMA-Factory's name for it."""
    entry = info.get(name)
    if not isinstance(entry, dict):
        made.refuse(key, f"{name} is not in {INFO}")
        return {}
    known = {"file_name", "hf_hub_url", "formatting", "columns", "split", "subset", "tags"}
    columns = entry.get("columns") or {}
    roles = {"prompt": "prompt", "query": "input", "response": "response", "messages": "messages", "system": "system",
             "history": "history"}  # fmt: skip
    if odd := [*(entry.keys() - known), *(columns.keys() - roles.keys())]:
        made.refuse(key, f"{', '.join(sorted(odd))} of {name} in {INFO} has no counterpart")
        return {}
    path = entry.get("hf_hub_url")
    if path is None:
        path = str(Path(str(made.keys.get("dataset_dir") or "data")) / str(entry.get("file_name")))
    chat = entry.get("formatting") == "sharegpt"
    if chat and entry.get("tags", {}).keys() - {"role_tag", "content_tag", "user_tag", "assistant_tag", "system_tag"}:
        made.refuse(key, f"tags of {name} in {INFO} have no counterpart")
    found: dict[str, Any] = {"path": path, "format": "chat" if chat else "alpaca"}
    found |= {ours: entry[theirs] for theirs, ours in (("subset", "name"), ("split", "train_split")) if theirs in entry}
    if columns:
        found["columns"] = {roles[role]: column for role, column in columns.items()}
    return found


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


def packing(made: Conversion, key: str, value: Any) -> None:
    """Examples side by side, on or off."""
    if key == "packing_strategy":
        made.leave(key, "rows are filled as the examples of a step fit")
    elif is_on(value) or is_off(value):
        made.set("data.packing", is_on(value), key)
    else:
        made.refuse(key, f"{value!r} is neither on nor off")


def truncation(made: Conversion, key: str, value: Any) -> None:
    """What becomes of examples that are too long."""
    known = {"left": "left", "right": "right", "drop": "drop", "truncate": "right", "keep_start": "right"}
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
