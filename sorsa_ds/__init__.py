"""SORSA fine-tuning on DeepSpeed, from two CPU processes to many nodes."""

__version__ = "0.1.0"
