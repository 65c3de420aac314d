"""In what PEFT holds what a method has trained: an adapter of PEFT's own kind, or a LoRA."""

from typing import Literal

from sorsa_ds.methods.method import Method


def peft_format(method: Method) -> Literal["adapter", "lora"]:
    """The format of `launch/export.py` that holds a method's runs in PEFT's format, its own kind before a LoRA.

    Raises:
        ValueError: neither does; with the method's reason.
    """
    refused = method.refused_exports
    if method.adapter_library == "peft" and "adapter" not in refused:
        return "adapter"
    if "lora" in refused:
        raise ValueError(f"{refused['lora']}; launch/export.py --format merged writes the trained model")
    return "lora"
