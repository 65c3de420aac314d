"""Another trainer's file: read, and recognised by its keys."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sorsa_ds.config.yaml_reader import MOST_BYTES, fault_of, line_of, parse_yaml


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of file.

    marks: keys of which it has one at least, and other kinds have none.
    defaults: what it takes for keys that are left out, where this program takes something else.
    adapter_defaults: such of adapters, where it trains one because `use_peft` is on.
    targets: its key for the linears to adapt, where it chooses them by a table of its own if the file does not.
    notes: key -> what it does otherwise where the file does not have that key.
    """

    title: str
    marks: frozenset[str]
    defaults: Mapping[str, Any]
    adapter_defaults: Mapping[str, Any] = field(default_factory=dict)
    targets: str = ""
    notes: Mapping[str, str] = field(default_factory=dict)


KINDS = (
    Kind(
        "PEFT", frozenset({"peft_type"}), {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0}, targets="target_modules"
    ),
    Kind(
        "axolotl",
        frozenset({"base_model", "base_model_config"}),
        {"micro_batch_size": 1, "bf16": "auto", "excess_length_strategy": "drop", "seed": 42},
    ),
    Kind(
        "LLaMA-Factory",
        frozenset({"finetuning_type", "cutoff_len", "template", "stage"}),
        {
            "lora_rank": 8, "lora_target": "all", "cutoff_len": 2048, "num_train_epochs": 3,
            "learning_rate": 5e-5, "lr_scheduler_type": "linear", "warmup_steps": 0, "per_device_train_batch_size": 8,
            "disable_gradient_checkpointing": False, "seed": 42,
        },
    ),
    Kind(
        "TRL",
        frozenset({
            "use_peft", "dataset_name", "dataset_text_field", "completion_only_loss", "assistant_only_loss",
            "packing_strategy", "dataset_num_proc",
        }),
        {
            "num_train_epochs": 3, "learning_rate": 2e-5, "lr_scheduler_type": "linear", "warmup_steps": 0,
            "per_device_train_batch_size": 8, "max_length": 1024, "bf16": True, "gradient_checkpointing": True,
            "seed": 42,
        },
        {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05},
        "lora_target_modules",
        {"assistant_only_loss": "TRL learns whole conversations without it, and this program learns answers alone"},
    ),
    Kind(
        "transformers",
        frozenset({"per_device_train_batch_size", "num_train_epochs", "lr_scheduler_type", "model_name_or_path"}),
        {
            "num_train_epochs": 3, "learning_rate": 5e-5, "lr_scheduler_type": "linear", "warmup_steps": 0,
            "per_device_train_batch_size": 8, "seed": 42,
        },
    ),
)  # fmt: skip
"""The kinds in the order in which they are looked for; defaults as in axolotl 0.19, LLaMA-Factory 0.9, TRL 1.16,
transformers 5.23 and PEFT's LoraConfig. None of them holds out rows of the training data unless it is told to."""


def read_foreign(file: Path) -> tuple[Kind, dict[str, Any]]:
    """The kind of a file, and its keys in lower case with underscores -> their values.

    Raises:
        ValueError: the file cannot be read, is neither YAML nor JSON, or of no kind that is known. JSON is YAML too.
    """
    try:
        if file.stat().st_size > MOST_BYTES:
            raise ValueError(f"{file}: is larger than the {MOST_BYTES:,} bytes that settings may have")
        found = parse_yaml(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        line = f":{line_of(error)}" if line_of(error) else ""
        raise ValueError(f"{file}{line}: neither YAML nor JSON ({fault_of(error)})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file}: a mapping of settings to values is expected")
    keys: dict[str, Any] = {}
    for key, value in found.items():
        name = str(key).lower().replace("-", "_")
        if name in keys:
            raise ValueError(f"{file}: {name} stands there twice, in two spellings")
        keys[name] = value
    for kind in KINDS:
        if kind.marks & keys.keys():
            return kind, keys
    expected = "; ".join(f"{kind.title}: {' or '.join(sorted(kind.marks))}" for kind in KINDS)
    raise ValueError(f"{file}: not a file of a kind that is known, which has one of these keys ({expected})")
