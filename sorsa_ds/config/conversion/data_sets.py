"""Data sets of another trainer's file: axolotl's mappings, LLaMA-Factory's names, and plain names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sorsa_ds.config.conversion.result import Conversion, is_off, names_of
from sorsa_ds.config.typed_json import typed
from sorsa_ds.runtime.json_text import parse_json

INFO = "dataset_info.json"
"""Where LLaMA-Factory says what the names of its data sets stand for."""

_ROLES = {frozenset(pair) for pair in (("role", "content"), ("from", "value"))}
_SPEAKERS = {
    "user": {"user", "human"},
    "assistant": {"assistant", "gpt", "chatgpt", "bot", "model", "bing", "bard"},
    "system": {"system", "developer"},
    "tool": {"tool", "observation", "tool_response", "function_response"},
    "function": {"function_call", "tool_call"},
}
"""Role -> the names of it that conversations may have here in any case (docs/data.md)."""

_SAID = {"path", "type", "name", "split", "data_files", "ds_type", "chat_template"}
"""Entries of an axolotl data set that are looked at below."""
_HARMLESS = {
    "train_on_eos": ("turn",), "train_on_eot": ("turn",), "roles_to_train": (["assistant"],),
    "message_field_role": ("role", "from"),
    "message_field_content": ("content", "value"), "field_system": ("system",), "field_input": ("input",),
    "field_instruction": ("instruction",), "field_output": ("output",),
}  # fmt: skip
"""Entries of an axolotl data set -> the values with which they say what is so here in any case."""

_OTHER_HUBS = {"ms_hub_url", "om_hub_url"}
_TAGS = {
    "role_tag": {"from", "role"}, "content_tag": {"value", "content"}, "user_tag": _SPEAKERS["user"],
    "assistant_tag": _SPEAKERS["assistant"], "system_tag": _SPEAKERS["system"],
    "observation_tag": _SPEAKERS["tool"], "function_tag": _SPEAKERS["function"],
}  # fmt: skip
"""Tags of LLaMA-Factory's conversations -> the values that are read here in any case."""

_READ = ("name", "format", "columns")
"""Settings of `data` that say how rows are read, of the training data as of held-out data."""

_PLAIN = (
    "LLaMA-Factory joins plain texts and cuts them into rows of cutoff_len tokens; here a text that is longer than "
    "data.max_length loses its end: cut long texts into several rows"
)


def datasets(made: Conversion, key: str, value: Any) -> None:
    """Data sets: mappings as axolotl has them, names as LLaMA-Factory, or a file, folder or name on the hub."""
    if key == "dataset_dir":
        made.leave(key, f"data.path is read from its {INFO}")
    elif (found := _found(made, key, value)) is None:
        made.refuse(key, "it is no list of data sets with a path each")
    elif key not in made.refused:
        _carry(made, key, found)


def held_out(made: Conversion, key: str, value: Any) -> None:
    """Held-out data that is stored apart, whose rows are read as those of the training data are."""
    found = _found(made, key, value)
    if key in made.refused:
        return
    if found and isinstance(value, list) and not value[0].get("type"):
        found[0].pop("format", None)  # which says nothing of its rows
    if found is None or len(found) != 1:
        made.refuse(key, "one file, folder or name on the hub is expected: see data.eval_path")
    elif "data.mix" in made.settings:
        made.refuse(key, "several training sets have held-out data of their own: write eval_path into one of data.mix")
    elif odd := [name for name in _READ if _differs(made, found[0], name)]:
        made.refuse(
            key,
            f"held-out rows are read as training rows are: data.{odd[0]} is {found[0].get(odd[0])!r} for them and "
            f"{made.value(f'data.{odd[0]}')!r} for those",
        )
    else:
        made.set("data.eval_path", found[0]["path"], key)
        if len(found[0]) > 1:
            made.set("data.eval_split", found[0].get("train_split", "train"), key)


def _differs(made: Conversion, found: Mapping[str, Any], name: str) -> bool:
    """Whether a set of held-out rows says something else of its rows than the training set has said."""
    if "data.path" not in made.settings or "format" not in found:
        return False
    return found.get(name) != made.value(f"data.{name}")


def _found(made: Conversion, key: str, value: Any) -> list[dict[str, Any]] | None:
    """The data sets that a key names, as sources of this program; None where it names none."""
    if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
        return [one for given in value if (one := _of_axolotl(made, key, given))]
    if made.kind.title == "LLaMA-Factory" and key in ("dataset", "eval_dataset"):
        if (listing := _dataset_info(made, key)) is None:
            return []
        return [one for name in names_of(value) if (one := _of_info(made, key, name, *listing))]
    return [{"path": value}] if isinstance(value, str) else None


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
    if kind == "alpaca":
        made.notes[key] = (
            "the answer follows `### Response:` behind a blank here, as in the papers, and on a new line in axolotl"
        )
    return found


def _is_role(name: str, value: Any) -> bool:
    """Whether an entry names roles and contents of messages as data here may have them."""
    if name == "message_property_mappings":
        return isinstance(value, dict) and frozenset(value.values()) in _ROLES
    return name == "roles" and isinstance(value, dict) and all(
        isinstance(names, list) and {*map(str, names)} <= _SPEAKERS.get(role, set()) for role, names in value.items()
    )  # fmt: skip


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


def _dataset_info(made: Conversion, key: str) -> tuple[dict[str, Any], Path] | None:
    """What LLaMA-Factory's names of data sets stand for, and the folder in which their files lie.

    None, and refused, where its file is not there.
    """
    folder = Path(str(made.keys.get("dataset_dir") or "data"))
    places = [folder / INFO]
    if (beside := made.file.parent / folder / INFO).absolute() != places[0].absolute():
        places.append(beside)
    for place in places:
        if place.is_file():
            try:
                return typed(dict[str, Any], parse_json(place.read_text(encoding="utf-8"))), place.parent
            except (OSError, ValueError) as error:
                made.refuse(key, f"{place}: cannot be read ({error})")
                return None
    made.refuse(key, f"its names stand in {INFO}, which is not at {' or '.join(map(str, places))}: set dataset_dir")
    return None


def _of_info(made: Conversion, key: str, name: str, info: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A data set by LLaMA-Factory's name for it; empty, and refused, where it has no counterpart."""
    entry = info.get(name)
    if not isinstance(entry, dict):
        made.refuse(key, f"{name} is not in {INFO}")
        return {}
    known = {"file_name", "file_sha1", "hf_hub_url", "formatting", "columns", "split", "subset", "tags", *_OTHER_HUBS}
    chat, plain = entry.get("formatting") in ("sharegpt", "openai"), made.keys.get("stage") == "pt"
    odd = [word for word in entry.keys() - known if not is_off(entry[word])]
    odd += [] if {"hf_hub_url", "file_name"} & entry.keys() else sorted(_OTHER_HUBS & entry.keys())
    odd += ["formatting (of plain text)"] if chat and plain else []
    if odd:
        made.refuse(key, f"{', '.join(sorted(odd))} of {name} in {INFO} has no counterpart")
        return {}
    found: dict[str, Any] = {"path": entry.get("hf_hub_url") or str(folder / str(entry.get("file_name")))}
    found |= {ours: entry[theirs] for theirs, ours in (("subset", "name"), ("split", "train_split")) if theirs in entry}
    columns = entry.get("columns") or {}
    if plain:
        found |= {"format": "text", "columns": {"text": columns.get("prompt", "instruction")}}
        made.notes[key] = _PLAIN
    elif chat:
        found |= {"format": "chat"} | _of_conversations(made, key, name, columns, entry.get("tags") or {})
    else:
        found |= {"format": "alpaca_chat"} | _of_alpaca(made, key, name, columns)
    return found


def _of_conversations(
    made: Conversion, key: str, name: str, columns: Mapping[str, Any], tags: Mapping[str, Any]
) -> dict[str, Any]:
    """The columns of conversations; those beside them are read here by their own names."""
    beside = {"system": ("system",), "tools": ("tools", "functions")}
    odd = [role for role, column in columns.items() if role != "messages" and column not in beside.get(role, ())]
    odd += [tag for tag, value in tags.items() if value not in _TAGS.get(tag, ())]
    if odd:
        made.refuse(
            key,
            f"{', '.join(odd)} of {name} in {INFO} has no counterpart: columns system and tools, fields role and "
            "content or from and value, and the usual names of roles are read here",
        )
    return {"columns": {"messages": columns["messages"]}} if "messages" in columns else {}


def _of_alpaca(made: Conversion, key: str, name: str, columns: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of instructions, which LLaMA-Factory makes turns of in its template."""
    roles = {"prompt": "prompt", "query": "input", "response": "response", "system": "system", "history": "history"}
    if odd := sorted(columns.keys() - roles.keys()):
        made.refuse(key, f"{', '.join(odd)} of {name} in {INFO} has no counterpart for rows of instructions")
    made.notes[key] = (
        "rows of instructions become turns in the tokenizer's chat template, by data.format=alpaca_chat; "
        "data.format=alpaca lays them out as the papers do"
    )
    return {"columns": {roles[role]: column for role, column in columns.items() if role in roles}} if columns else {}
