"""The adapter of a method that PEFT has, in PEFT's own format, written by PEFT."""

import shutil
from collections import Counter
from pathlib import Path
from re import escape

from accelerate import init_empty_weights
from peft import LoraConfig, get_peft_model
from torch import nn

from sorsa_ds.methods.peft_layers import ADAPTER
from sorsa_ds.model.adapter_file import INITIAL, TRAINED, write_description
from sorsa_ds.run.source import Progress, Source
from sorsa_ds.runtime import digest
from sorsa_ds.runtime.files import fsync, write_atomic

_OUTSIDE = "base_model.model."


def write(source: Source, folder: Path) -> None:
    """Fill a folder. The base model is there without memory only.

    Raises:
        ValueError: the trained tensors are not those of these layers.
    """
    with init_empty_weights():
        wrapped = get_peft_model(source.model, peft_config(source), ADAPTER)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            values = source.trained.values(name.removeprefix(_OUTSIDE), parameter.shape)
            parent, _, leaf = name.rpartition(".")
            setattr(wrapped.get_submodule(parent), leaf, nn.Parameter(values))
    described = wrapped.peft_config[ADAPTER]
    described.base_model_name_or_path = source.described.base_model if source.from_hub else str(source.base)
    described.revision = source.described.loading.revision
    described.inference_mode = True
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink()  # ours has the run's figures
    for path in folder.iterdir():
        fsync(path)


def peft_config(source: Source) -> LoraConfig:
    """PEFT's configuration of the whole model: the commonest rank, and by name those that differ."""
    layers, sorsa = source.peft, source.described.sorsa
    ranks = {target.name: layers.rank(target) for target in source.targets}
    [(rank, _)] = Counter(ranks.values()).most_common(1)
    config = layers.config(rank, list(ranks), any(target.transposed for target in source.targets))
    others = {f"^{escape(name)}$": r for name, r in ranks.items() if r != rank}
    if others:  # AdaLoRA has none: it begins with one rank
        config.rank_pattern = others
        config.alpha_pattern = others if sorsa.alpha is None else {}
    config.task_type = "CAUSAL_LM"
    return config


def copy(source: Source, folder: Path, progress: Progress) -> None:
    """Fill a folder with copies that are read back.

    Raises:
        ValueError: the disk refuses, or gives something else back.
    """
    for name in progress([INITIAL, TRAINED]):
        original = source.adapter / name
        write_atomic(folder / name, lambda temporary, original=original: shutil.copyfile(original, temporary))
        if digest.of_file(folder / name) != digest.of_file(original):
            raise ValueError(f"{folder / name} reads back differently from what was written; check the disk")
    write_description(folder, source.described)
