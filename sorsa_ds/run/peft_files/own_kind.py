"""The adapter of a method that PEFT has, in PEFT's format and written by PEFT."""

from pathlib import Path

from accelerate import init_empty_weights
from torch import nn

from sorsa_ds.methods.peft_experts import as_parameters
from sorsa_ds.model.peft_names import ONLY_ADAPTER, PREFIX
from sorsa_ds.run.merge import outside_linears
from sorsa_ds.run.peft_files.modules_to_save import modules_to_save
from sorsa_ds.run.peft_files.places import MERGED
from sorsa_ds.run.source import Source

_WHOLE = f".modules_to_save.{ONLY_ADAPTER}."
"""What PEFT puts into the name of a parameter that is trained whole."""


def write_peft_adapter(source: Source, folder: Path) -> None:
    """Fill a folder with an adapter in PEFT's format. The base model is there without memory only.

    Raises:
        ValueError: the trained tensors are not those of these layers, or PEFT would take a linear for something else.
    """
    from peft import get_peft_model  # takes seconds, and most exports need no PEFT

    parameters = as_parameters(source.model, source.targets)
    config = source.method.peft_config(source.described, source.targets, parameters)
    as_linears = [target for target in parameters if target.weight not in (config.target_parameters or ())]
    if as_linears and config.peft_type == "LORA":
        raise ValueError(
            f"PEFT would take {as_linears[0].name} for the linear of an expert, as older versions of transformers had "
            f"them; {MERGED}"
        )
    saved = modules_to_save(source)
    config.modules_to_save = saved.modules or None
    with init_empty_weights():
        wrapped = get_peft_model(source.model, config, ONLY_ADAPTER)
    firsts = {place: target.name for target in source.targets for place in target.shared}
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            own = name.removeprefix(PREFIX)
            if _WHOLE in own:
                values = outside_linears(source, saved.parameters[own.replace(_WHOLE, ".")])
            else:
                layer = next((place for place in firsts if own.startswith(f"{place}.")), "")
                values = source.trained.values(firsts.get(layer, layer) + own.removeprefix(layer), parameter.shape)
            parent, _, leaf = name.rpartition(".")
            setattr(wrapped.get_submodule(parent), leaf, nn.Parameter(values))
    described = wrapped.peft_config[ONLY_ADAPTER]
    described.base_model_name_or_path = source.base_name
    described.revision = source.described.loading.revision
    described.inference_mode = True
    wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink()  # PEFT's card; ours has the run's figures
