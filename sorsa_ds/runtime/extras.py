"""Packages that only some uses need, and that come with the extras of this package (pyproject.toml)."""

import importlib.util

EXTRAS = {
    "wandb": ("wandb", "wandb"),
    "math_verify": ("math-verify", "evaluation"),
    "reasoning_gym": ("reasoning-gym", "default-job"),
    "gguf": ("gguf", "default-job"),
    "galore_torch": ("galore-torch", "galore"),
}
"""Module -> its package, and the extra that brings it."""


def check_extra(module: str, what: str) -> None:
    """Stop where the package of an extra is not installed. Nothing is imported.

    Args:
        module: the package's module, one of those that extras bring.
        what: what needs the package, as the beginning of a sentence.

    Raises:
        ValueError: the package is not installed; the message has the command that installs it.
    """
    package, extra = EXTRAS[module]
    if importlib.util.find_spec(module) is None:
        raise ValueError(f'{what} needs the package {package}, which is not installed: pip install "sorsa-ds[{extra}]"')
