"""The runs of a comparison: each is a method, a learning rate and a seed; everything else is the same for all."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from sorsa_ds.config.declare import MOST, MOST_SEED, check_count
from sorsa_ds.config.schema import MethodName, RunConfig
from sorsa_ds.methods.registry import METHODS as ALL_METHODS
from sorsa_ds.methods.registry import VARIANTS
from sorsa_ds.methods.settings import ignored, with_values, without_ignored

METHODS = (*ALL_METHODS, *VARIANTS)
"""Every method, and those that run with settings changed, under names of their own."""
RUNS = "runs"


@dataclass(frozen=True, slots=True)
class Trial:
    """One run of a comparison."""

    method: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """The name of its run folder."""
        return f"{self.method}-lr{self.learning_rate}-seed{self.seed}"

    def config(self, base: RunConfig, output: Path) -> RunConfig:
        """The settings of this run, without those of the base that its method has no use for."""
        return without_ignored(self._full(base, output))

    def left_out(self, base: RunConfig) -> dict[str, object]:
        """The base's settings that its method has no use for, path -> value."""
        return ignored(self._full(base, Path()))

    def _full(self, base: RunConfig, output: Path) -> RunConfig:
        method, changed = VARIANTS.get(self.method, (self.method, {}))
        return replace(
            with_values(base, changed),
            method=cast(MethodName, method),
            train=replace(base.train, learning_rate=self.learning_rate, seed=self.seed),
            output=replace(base.output, folder=str(output / RUNS), name=self.name, keep_checkpoints=1),
        )


def read_methods(text: str) -> list[str]:
    """The methods of `sorsa,lora`, in that order.

    Raises:
        ValueError: a method is unknown or named twice, or none is named.
    """
    methods = _words(text)
    for method in methods:
        if method not in METHODS:
            raise ValueError(f"--methods: there is no {method!r}; there are {', '.join(METHODS)}")
    return _each_once(methods, "--methods")


def read_seeds(text: str) -> list[int]:
    """The seeds of `1,2,3`.

    Raises:
        ValueError: a seed is none that `train.seed` may have or named twice, or none is named.
    """
    words = _words(text)
    if not words or not all(re.fullmatch("[0-9]{1,10}", word) for word in words):
        raise ValueError(f"--seeds: {text!r} is no list of integers from 0 to {MOST_SEED:,}, as in 1,2,3")
    for word in words:
        check_count("--seeds", int(word), least=0, most=MOST_SEED)
    return _each_once([int(word) for word in words], "--seeds")


def read_learning_rates(text: str, methods: Sequence[str], default: float) -> dict[str, list[float]]:
    """The learning rates to try for each method.

    Args:
        text: a plain number is for every method that has no rate of its own; `lora=1e-3` is a rate of LoRA's own, and
            may be repeated: `1e-4,3e-4,lora=1e-3,lora=3e-3`.
        default: the rate of methods for which `text` has none.

    Raises:
        ValueError: the text cannot be read, or names a method that is not compared.
    """
    shared: list[float] = []
    own: dict[str, list[float]] = {}
    for word in _words(text):
        method, equals, number = word.rpartition("=")
        if equals and method not in methods:
            raise ValueError(f"--learning_rates: {word}: {method!r} is none of --methods {','.join(methods)}")
        try:
            rate = float(number)
        except ValueError:
            rate = 0.0
        if not 0 < rate <= MOST:
            raise ValueError(f"--learning_rates: {word}: {number!r} is no number > 0 and <= {MOST:,}")
        (own.setdefault(method, []) if equals else shared).append(rate)
    found = {method: own.get(method) or shared or [default] for method in methods}
    return {method: _each_once(rates, "--learning_rates") for method, rates in found.items()}


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _each_once(items: list, option: str) -> list:
    if not items:
        raise ValueError(f"{option}: nothing is named")
    for item in items:
        if items.count(item) > 1:
            raise ValueError(f"{option}: {item} is named twice")
    return items
