"""What can be checked of a training command before its ranks are started, on any machine."""

from dataclasses import replace

from sorsa_ds.config import deepspeed_json
from sorsa_ds.run.checkpoint.named import named_folder
from sorsa_ds.runtime.precision import resolve_precision
from sorsa_ds.train.options import Invocation


def check_invocation(invocation: Invocation, world_size: int, node_ranks: int) -> None:
    """Stop at everything that training refuses before it looks at the machine.

    Args:
        world_size: the number of ranks that will be started.
        node_ranks: the number of ranks on each node; 0 where nodes differ.

    Raises:
        ValueError: a setting, file or folder, or the number of ranks, is wrong.
    """
    settings = invocation.config.train
    if invocation.resume:
        if invocation.named_run is not None:
            named_folder(invocation.resume)
        # The saved batch is regrouped for the ranks that there are.
        settings = replace(settings, micro_batch_size=None, gradient_accumulation_steps=None)
    raw = deepspeed_json.read_ds_config(invocation.ds_config)
    # The GPUs are not known here: fp32, which every device has, stands for a precision that is left open.
    json_says = deepspeed_json.precision_from_json(raw)
    precision = resolve_precision(settings.precision, json_says, "cpu", fast=False).name
    deepspeed_json.resolve_ds_config(
        raw, settings, world_size, "cuda", precision, node_ranks, invocation.config.data.max_length
    )
