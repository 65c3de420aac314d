"""LoRA+: the second factor of a LoRA learns faster than the first (`baseline.loraplus_lr_ratio`)."""

from torch import nn

from sorsa_ds.config.schema import RunConfig


def learning_faster(config: RunConfig, model: nn.Module) -> tuple[list[nn.Parameter], float]:
    """The trained parameters that have a learning rate of their own, and how many times that of the others it is.

    They are those of PEFT's `create_loraplus_optimizer`: every B, and whatever is a vector. That function itself would
    take each parameter for a vector that ZeRO-3 has cut.

    Args:
        model: with PEFT's layers; ZeRO-3 may have cut it.
    """
    ratio = config.baseline.loraplus_lr_ratio
    if ratio is None:
        return [], 1.0
    trained = [(name, one) for name, one in model.named_parameters() if one.requires_grad]
    return [one for name, one in trained if "lora_B" in name or len(getattr(one, "ds_shape", one.shape)) == 1], ratio
