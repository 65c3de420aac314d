"""What PEFT calls its files and the parts of its models. Nothing here imports PEFT, which takes seconds."""

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""The description of a saved adapter, and its tensors."""
PREFIX = "base_model.model."
"""What stands before the name of a module of the base model."""
ONLY_ADAPTER = "default"
"""The name of a model's adapter where it has one and was given no name for it."""
