"""The files of a pre-trained model: which there are, and whether those that must be there are. No weight is read.

Nothing here imports PyTorch, so that a command can look at a model before it spends seconds on that.
"""

from fnmatch import fnmatch
from pathlib import Path

from safetensors import SafetensorError, safe_open

from sorsa_ds.model import peft_names
from sorsa_ds.runtime.json_text import parse_json

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
OWN_ADAPTER_CONFIG = "sorsa_config.json"
"""This program's description of an adapter (`model.adapter_file`), beside which PEFT's may lie."""
GGUF = ".gguf"
_RUN_SETTINGS, _RUN_ADAPTER = "config.yaml", "adapter"
"""What the folder of a run holds (`run.paths`)."""

CODE = "*.py"
"""A model's own Python."""

COMPANIONS = ["*.json", "tokenizer*", "*.model", "*.txt", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*"]
"""Files of a model beside its weights and its code: configuration, tokenizer, chat template, its terms."""

_TOKENIZERS = ("tokenizer*", "*vocab*", "*.model", "*.tiktoken")


def check_model_name(model: str) -> None:
    """Stop where a model's name can only be that of a folder, and there is none.

    Raises:
        ValueError: the folder does not exist, or it is a file.
    """
    path = Path(model).expanduser()
    if path.is_file():
        raise ValueError(
            _is_gguf(model) if path.suffix == GGUF else f"model: {model} is a file; give the folder of a model"
        )
    if not path.is_dir() and (model.count("/") > 1 or model.startswith((".", "/", "~"))):
        raise ValueError(f"model: there is no folder {model!r}")


def check_model_files(folder: Path) -> None:
    """Stop where a model's folder lacks something that will be needed, as far as that shows from names and headers.

    Raises:
        ValueError: configuration, weights or tokenizer are missing, or a file of weights is cut short.
    """
    check_no_adapter(folder)
    if not (folder / CONFIG).exists():
        refuse_other_formats(str(folder), sorted(path.name for path in folder.iterdir()))
    try:
        values = parse_json((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"model: {folder / CONFIG} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"model: {folder / CONFIG} is no JSON object")
    for file in weight_files(folder):
        _check_header(file)
    if not any(fnmatch(path.name, pattern) for path in folder.iterdir() for pattern in _TOKENIZERS):
        raise ValueError(no_tokenizer(folder))


def no_tokenizer(folder: Path) -> str:
    """The message on a model's folder without a tokenizer."""
    return f"model: {folder} has no tokenizer (tokenizer.json); copy the one of its model there"


def check_no_adapter(folder: Path) -> None:
    """Stop at a folder that holds an adapter: in place of a model, or beside one, which transformers would load too.

    Raises:
        ValueError: the folder has an adapter's description, or is that of a run; the message names the base model.
    """
    if (folder / _RUN_SETTINGS).exists() and _description(folder / _RUN_ADAPTER) is not None:
        base = _base_of(folder / _RUN_ADAPTER)
        raise ValueError(
            f"model: {folder} is a run that fine-tuned {base}, not a model: to go on with it give --resume {folder}; "
            f"to train on what it has learned export it (launch/export.py --run {folder} --format merged) and give that"
        )
    description = _description(folder)
    if description is None:
        return
    if (folder / CONFIG).exists():
        raise ValueError(
            f"model: {folder} holds the description of an adapter too ({description.name}); merge the adapter, or move "
            f"it into a folder of its own"
        )
    raise ValueError(
        f"model: {folder} is an adapter of {_base_of(folder)}, not a model: give that one, or, to train on what the "
        f"adapter has learned, merge it first (launch/export.py --format merged for a run of SORSA; merge_and_unload "
        f"and save_pretrained for PEFT's) and give the merged folder"
    )


def _description(folder: Path) -> Path | None:
    """The description of the adapter in a folder; None where there is none."""
    return next((path for name in (OWN_ADAPTER_CONFIG, peft_names.CONFIG) if (path := folder / name).exists()), None)


def _base_of(adapter: Path) -> str:
    """The base model that an adapter's description names, as SORSA or PEFT calls it."""
    try:
        description = _description(adapter)
        values = parse_json(description.read_text(encoding="utf-8")) if description else None
    except (OSError, ValueError):
        values = None
    named = [values.get(key) for key in ("base_model", "base_model_name_or_path")] if isinstance(values, dict) else []
    return next((str(name) for name in named if name), "a base model that it does not name")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model's folder: one, or the shards that an index names.

    Raises:
        ValueError: the folder holds no safetensors (pickle files are refused, and the message has the command that
            converts them), or a shard is missing.
    """
    if (folder / SINGLE).exists():  # looked for first, as in transformers: an index may be old
        return [folder / SINGLE]
    index = folder / INDEX
    if not index.exists():
        refuse_other_formats(str(folder), sorted(path.name for path in folder.iterdir()))
        raise ValueError(f"{folder}: no {SINGLE} and no {INDEX}")
    try:
        shards = sorted({str(name) for name in parse_json(index.read_text())["weight_map"].values()})
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index}: not a safetensors index: {error}") from error
    if outside := [shard for shard in shards if Path(shard).name != shard]:
        raise ValueError(f"{index}: {outside[0]!r} is not a file of this folder")
    missing = [shard for shard in shards if not (folder / shard).exists()]
    if missing:
        raise ValueError(f"{folder}: {len(missing)} shards are missing, first {missing[0]}")
    return [folder / shard for shard in shards]


def refuse_other_formats(model: str, files: list[str]) -> None:
    """Stop where there are weights in another format among the files of a model that has no safetensors.

    Raises:
        ValueError: there are pickle files (the message has the command that converts them) or GGUF files.
    """
    if any(name.endswith(GGUF) for name in files):
        raise ValueError(_is_gguf(model))
    pickles = [name for name in files if name.endswith((".bin", ".pt", ".pth"))]
    if pickles:
        target = f"{model.rstrip('/').rpartition('/')[2]}-safetensors"
        raise ValueError(
            f"{model}: only pickle files ({pickles[0]}), which can run code when they are read. If you trust their "
            f'maker, convert once: python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
            f"M.from_pretrained('{model}', dtype='auto').save_pretrained('{target}'); "
            f"T.from_pretrained('{model}').save_pretrained('{target}')\", then give {target} as the model"
        )


def _is_gguf(model: str) -> str:
    return (
        f"model: {model}: weights in GGUF, which is for inference and mostly quantised, cannot be trained on; give the "
        f"model that they were made from, in safetensors (bf16, fp16 or fp32)"
    )


def damaged(file: Path, error: Exception) -> ValueError:
    """The error for a file of weights that cannot be opened."""
    return ValueError(f"{file}: truncated or not a safetensors file ({error}); download it again")


def _check_header(file: Path) -> None:
    try:
        with safe_open(file, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise damaged(file, error) from error
