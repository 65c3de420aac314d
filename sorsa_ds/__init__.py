"""SORSA fine-tuning on DeepSpeed, from two CPU processes to many nodes."""

import logging

# transformers imports bitsandbytes, which warns of an optional inference kernel that nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in record.msg)

__version__ = "0.1.0"
__all__ = ["load_adapter"]


def __getattr__(name: str):
    """`sorsa_ds.load_adapter`, imported when it is asked for: torch takes seconds."""
    if name == "load_adapter":
        from sorsa_ds.run.reload import load_adapter

        return load_adapter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
