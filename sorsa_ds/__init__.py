"""SORSA fine-tuning on DeepSpeed, from two CPU processes to many nodes.

The rooms, in the order in which a run meets them (docs/architecture.md says which may import which):

    cli        the commands: train, plan, preview, evaluate, chat, export, runs, analyze, compare, convert, ...
    config     what a run can be told: settings, YAML, command line, the DeepSpeed JSON
    runtime    the ground that all rooms stand on: processes, collectives, precision, console, files
    train      one run, from its settings to its report
    plan       memory, traffic and time of a run, before it starts
    preview    what a run would learn of its data, shown before it starts
    data       rows to padded micro-batches
    model      pre-trained weights to an adapted, sharded model
    sorsa      the mathematics of the method: layer, decomposition, residual, regulariser
    peft       SORSA as a method of the library PEFT, and the callback of Hugging Face's Trainer
    methods    SORSA and its baselines, one family per file
    engine     one optimizer step on DeepSpeed, with the regulariser on shards
    run        what a run leaves in its folder, and how that is read back
    evaluate   answers of a trained model, and their grading
    export     merged model, LoRA or adapter
    study      several runs side by side: analysis and comparison

For use from Python the package offers the names in `__all__`. They are imported when they are asked for, because torch
takes seconds to import.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

from sorsa_ds.runtime.versions import VERSION as __version__  # noqa: F401

if TYPE_CHECKING:
    from sorsa_ds.config.schema import AdapterConfig, ResidualConfig, SorsaConfig
    from sorsa_ds.model.adapt_partitioned import adapt_partitioned_model
    from sorsa_ds.run.reload import load_adapter

# transformers imports bitsandbytes, which warns of an optional inference kernel that nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in record.msg)
# DeepSpeed warns where it finds no GPU; every command says by itself on what it computes.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in str(record.msg))

__all__ = ["AdapterConfig", "ResidualConfig", "SorsaConfig", "adapt_partitioned_model", "load_adapter"]

_MODULES = {
    "AdapterConfig": "sorsa_ds.config.schema",
    "ResidualConfig": "sorsa_ds.config.schema",
    "SorsaConfig": "sorsa_ds.config.schema",
    "adapt_partitioned_model": "sorsa_ds.model.adapt_partitioned",
    "load_adapter": "sorsa_ds.run.reload",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module at its first use."""
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
