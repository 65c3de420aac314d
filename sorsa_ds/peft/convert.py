"""Adapters of the trainer as SORSA adapters of PEFT, and back: the same numbers under other names.

The trainer's folder has U, s and V after and before training in two files, under the names of its layers. PEFT's has
all of them in one. Both say the same of a base model W_0: W = W_0 + scale * (U diag(s) V^T - U_0 diag(s_0) V_0^T).

What differs is the rounding of what is frozen. The trainer keeps W_r = W_0 - scale * U_0 diag(s_0) V_0^T as its
precision and `residual.storage` say; PEFT keeps W_0 as the model was loaded. So in fp32 both compute the same. An
adapter that the trainer made over a 4-bit residual is here the same change of the pre-trained weights, without the
error of the quantisation that training saw; and one that PEFT trained over a 4-bit base is a change of that base's
dequantised weights, which the trainer adds to the weights as they were before.
"""

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from sorsa_ds.config import adapter_settings, method_settings
from sorsa_ds.config.schema import LoadingConfig
from sorsa_ds.methods.registry import method_of
from sorsa_ds.model.adapter_file import (
    INITIAL,
    TRAINED,
    Description,
    FactorFile,
    open_factors,
    read_description,
    record_digests,
    write_description,
)
from sorsa_ds.model.peft_names import PREFIX
from sorsa_ds.peft.config import SorsaConfig
from sorsa_ds.peft.layer import INITIAL_HOLDER, LEAVES
from sorsa_ds.peft.model import present_name
from sorsa_ds.runtime.files import write_atomic

HOLDERS = {TRAINED: "sorsa_factors", INITIAL: INITIAL_HOLDER}
"""The trainer's files -> where a layer of PEFT's model has their tensors."""


def to_peft(adapter: Path | str, target: Path | str) -> None:
    """Write a trainer's adapter as a SORSA adapter of PEFT, for `peft.PeftModel.from_pretrained`.

    Args:
        adapter: `adapter/` of a run, or an export.
        target: the folder to fill; files of the same names are replaced.

    Raises:
        ValueError: the adapter is missing or damaged, is of another method, or trained something that PEFT's SORSA
            layers cannot hold.
    """
    adapter, target = Path(adapter), Path(target)
    described = read_description(adapter, trust_remote_code=True)  # nothing is loaded
    method = method_of(described)
    if method.adapter_library != "sorsa_ds":
        raise ValueError(
            f"{adapter} is an adapter of the method {method.name}, which PEFT has itself: sorsa export --format adapter"
        )
    _check_holdable(adapter, described)
    tensors: dict[str, Tensor] = {}
    for file, holder in HOLDERS.items():
        opened = open_factors(adapter, file, described)
        known = {f"{layer}.{leaf}" for layer in described.layers for leaf in LEAVES}
        if whole := sorted(set(opened.names) - known):
            raise ValueError(
                f"{adapter / file} also has {whole[0]}, which was trained whole (adapter.train_whole) and has no place "
                f"in a SORSA adapter of PEFT: sorsa export --format lora or merged"
            )
        for layer, sizes in described.layers.items():
            for leaf, shape in zip(LEAVES, _shapes(sizes), strict=True):
                tensors[f"{PREFIX}{layer}.{holder}.{leaf}"] = opened.values(f"{layer}.{leaf}", shape)
    write_atomic(target / SAFETENSORS_WEIGHTS_NAME, partial(save_file, tensors, metadata={"format": "pt"}))
    write_atomic(target / CONFIG_NAME, lambda file: _config_of(described).save_pretrained(str(file.parent)))


def _check_holdable(adapter: Path, described: Description) -> None:
    """Stop where an adapter has what PEFT's SORSA layers cannot hold.

    Raises:
        ValueError: naming it.
    """
    experts = [layer for layer, sizes in described.layers.items() if "experts" in sizes]
    if experts:
        what = f"the weights {experts[0]} of experts, which are one parameter"
    elif described.new_tokens:
        what = "embeddings of new tokens"
    else:
        return
    raise ValueError(f"{adapter} has {what}, and PEFT's SORSA layers have not: sorsa export --format lora or merged")


def _shapes(sizes: dict[str, int]) -> tuple[torch.Size, ...]:
    """The shapes of U, s and V."""
    m, n, r = sizes["out"], sizes["in"], sizes["rank"]
    return torch.Size((m, r)), torch.Size((r,)), torch.Size((n, r))


def _config_of(described: Description) -> SorsaConfig:
    """PEFT's configuration of a trainer's adapter."""
    adapter, sorsa = described.adapter, described.sorsa
    ranks = {layer: sizes["rank"] for layer, sizes in described.layers.items()}
    [(rank, _)] = Counter(ranks.values()).most_common(1)
    return SorsaConfig(
        r=rank,
        rank_pattern={layer: own for layer, own in ranks.items() if own != rank},
        target_modules=list(ranks),
        sorsa_alpha=adapter.alpha,
        use_rslora=adapter.rslora,
        sorsa_dropout=adapter.dropout,
        triplets=sorsa.triplets,
        directions=sorsa.directions,
        window_start=sorsa.window_start,
        svd=sorsa.svd,
        svd_tolerance=sorsa.svd_tolerance,
        svd_max_iterations=sorsa.svd_max_iterations,
        task_type="CAUSAL_LM",  # type: ignore[arg-type]  # PEFT reads it from a file as text too
        inference_mode=True,
        base_model_name_or_path=described.base_model,
        revision=described.loading.revision,
    )


def from_peft(
    adapter: Path | str,
    target: Path | str,
    base_model: str | None = None,
    precision: Literal["fp32", "mixed", "bf16"] = "fp32",
) -> None:
    """Write a SORSA adapter of PEFT as a trainer's adapter, for `sorsa evaluate`, `sorsa export` and `load_adapter`.

    The digests by which the trainer recognises a base model are not known here; who reads the adapter says so.

    Args:
        adapter: a folder that `save_pretrained` has filled.
        target: the folder to fill; files of the same names are replaced.
        base_model: folder or hub name of the base model. None: the one that the adapter names.
        precision: the precision in which the merged weights are computed (`train.precision`).

    Raises:
        ValueError: the adapter is missing or damaged, is of another method, names no base model, or holds more than
            SORSA's factors.
    """
    adapter, target = Path(adapter), Path(target)
    config = _read_config(adapter)
    base_model = base_model or config.base_model_name_or_path
    if not base_model:
        raise ValueError(f"{adapter / CONFIG_NAME} names no base model: give its folder or hub name as base_model")
    tensors = _read_factors(adapter)
    layers = {name.removesuffix(".U"): tensor for name, tensor in tensors[TRAINED].items() if name.endswith(".U")}
    ranks = {layer: U.shape[1] for layer, U in layers.items()}
    described = Description(
        base_model,
        LoadingConfig(revision=config.revision),
        precision,
        adapter_settings.AdapterConfig(
            targets=list(layers), rank=config.r, alpha=config.sorsa_alpha, rslora=config.use_rslora,
            dropout=config.sorsa_dropout,
            rank_pattern={layer: rank for layer, rank in ranks.items() if rank != config.r},
        ),
        {layer: {"out": len(U), "in": len(tensors[TRAINED][f"{layer}.V"]), "rank": U.shape[1]} for layer, U in
         layers.items()},
        {},
        config.decomposition(),
        method_settings.ResidualConfig(storage="fp32" if precision == "fp32" else "bf16"),
    )  # fmt: skip
    for file, own in tensors.items():
        write_atomic(target / file, partial(save_file, own, metadata={"format": "pt"}))
    write_description(target, described)
    record_digests(target)


def _read_config(adapter: Path) -> SorsaConfig:
    """The configuration of a SORSA adapter of PEFT that has factors and nothing else.

    Raises:
        ValueError: the configuration is missing or of another method, or the adapter has more than factors.
    """
    try:
        config = PeftConfig.from_pretrained(str(adapter))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{adapter / CONFIG_NAME} is not the configuration of an adapter of PEFT ({error})") from error
    if not isinstance(config, SorsaConfig):
        raise ValueError(f"{adapter} is an adapter of PEFT's method {config.peft_type}, not of SORSA")
    for name, has in (("bias", config.bias != "none"), ("modules_to_save", bool(config.modules_to_save))):
        if has:
            raise ValueError(
                f"{adapter}: trained with {name}={getattr(config, name)!r}, for which a trainer's adapter has no room: "
                f"merge it with merge_and_unload()"
            )
    return config


def _read_factors(adapter: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of the trainer's two files, fp32, by their names there.

    Raises:
        ValueError: the file is missing or damaged, or a layer lacks a tensor.
    """
    path = adapter / SAFETENSORS_WEIGHTS_NAME
    file = FactorFile(path)
    found: dict[str, dict[str, Tensor]] = {name: {} for name in HOLDERS}
    for key in file.names:
        layer, _, rest = present_name(key).removeprefix(PREFIX).rpartition(".")
        layer, _, holder = layer.rpartition(".")
        ours = next((name for name, one in HOLDERS.items() if one == holder and rest in LEAVES), None)
        if ours is None:
            raise ValueError(f"{path}: {key} is none of SORSA's factors")
        found[ours][f"{layer}.{rest}"] = file.tensor(key)
    names = {name.rpartition(".")[0] for own in found.values() for name in own}
    wanted = {f"{layer}.{leaf}" for layer in names for leaf in LEAVES}
    for name, own in found.items():
        if lacking := sorted(wanted - own.keys()):
            raise ValueError(f"{path}: has no {HOLDERS[name]} of {lacking[0]}")
    if not names:
        raise ValueError(f"{path}: has no SORSA factors")
    return found
