"""SORSA fine-tuning on DeepSpeed, from two CPU processes to many nodes."""

__version__ = "0.1.0"
__all__ = ["load_adapter"]


def __getattr__(name: str):
    """`sorsa_ds.load_adapter`, imported when it is asked for: torch takes seconds."""
    if name == "load_adapter":
        from sorsa_ds.trained import load_adapter

        return load_adapter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
