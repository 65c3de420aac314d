"""Drift: how far a tuned model has moved from its base model, on the base model's own samples or on any text.

On the base model's own samples the mean of KL(base || tuned) over their tokens is an estimate of the divergence between
the two models as writers of whole texts, per token. It needs no data, and it is 0 where the two models are the same.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np

from sorsa_ds.data.tokenize import IGNORED, Example
from sorsa_ds.evaluate.backends.divergence import divergences
from sorsa_ds.evaluate.backends.likelihood import Likelihood, batch_by_length
from sorsa_ds.evaluate.base_samples import Sample
from sorsa_ds.evaluate.tasks.loss import digest_of_windows
from sorsa_ds.evaluate.tasks.task import Emit, Engine
from sorsa_ds.runtime import digest


@dataclass(frozen=True, slots=True)
class Base:
    """The base model of a measurement.

    name: the name by which the user knows the model.
    weights: the digest of the model's weights.
    load: brings the model into memory.
    """

    name: str
    weights: str
    load: Callable[[], Likelihood]


class Drift:
    """A task (`task.Task`) that sets a model beside its base model.

    Args:
        windows: id -> tokens and labels. A token with the label IGNORED is read and not measured.
        how: a sentence on what the texts are.
    """

    def __init__(self, windows: dict[str, Example], how: str, base: Base):
        self.ids = list(windows)
        self._windows, self._how, self._base = windows, how, base
        self._likelihoods: tuple[Likelihood, Likelihood]

    def digest(self) -> str:
        return digest.of_bytes(f"{self._base.weights}{digest_of_windows(self._windows)}".encode())

    def notes(self) -> list[str]:
        return [f"Measured against {self._base.name}. {self._how}"]

    def start(self, engine: Engine) -> None:
        """Load the base model beside the tuned one.

        Raises:
            ValueError: the two models have vocabularies of different sizes.
        """
        tuned, base = engine.likelihood(), self._base.load()
        check_sizes(self._base.name, base.vocabulary, tuned.vocabulary)
        self._likelihoods = base, tuned

    def batches(self, done: Collection[str], size: int) -> list[list[str]]:
        return batch_by_length([(i, len(w["input_ids"])) for i, w in self._windows.items() if i not in done], size)

    def work(self, batch: list[str], emit: Emit) -> None:
        measured = divergences(*self._likelihoods, [self._windows[id_] for id_ in batch])
        for id_, one in zip(batch, measured, strict=True):
            if not all(map(math.isfinite, (one.kl, one.base_nats, one.nats))):
                raise ValueError(
                    f"--task drift: of {id_} KL is {one.kl}, the loss of the base model {one.base_nats} and that of "
                    f"the tuned one {one.nats}: one of the models is broken"
                )
            emit({
                "id": id_, "correct": None, "kl": one.kl, "base_nats": one.base_nats, "nats": one.nats,
                "scored": one.scored, "tokens": len(self._windows[id_]["input_ids"]),
            })  # fmt: skip

    def results(self, records: list[dict]) -> dict:
        scored = [record["scored"] for record in records]
        kl, stderr = mean_per_token([record["kl"] for record in records], scored)
        return {
            "kl": kl,
            "kl_stderr": stderr,
            "base_loss": math.fsum(record["base_nats"] for record in records) / sum(scored),
            "loss": math.fsum(record["nats"] for record in records) / sum(scored),
            "tokens": sum(scored),
            "samples": len(records),
            "base": self._base.name,
            "texts": digest_of_windows(self._windows),
            "how": self._how,
        }

    def rows(self, results: dict) -> list[tuple[str, str]]:
        error = results["kl_stderr"]
        spread = "" if error is None else f" ± {error:.6f}"
        return [
            ("KL(base || tuned)", f"{results['kl']:.6f}{spread} nats per token"),
            ("loss of the base model", f"{results['base_loss']:.6f} nats per token"),
            ("loss", f"{results['loss']:.6f} nats per token"),
            ("scored", f"{results['tokens']} tokens in {results['samples']} texts"),
        ]

    def close(self) -> None:
        """Return at once: this task keeps nothing open that would have to be ended."""


def windows_of_samples(samples: list[Sample]) -> dict[str, Example]:
    """The base model's samples as windows of a task: what they were opened with is read and not measured."""
    windows = {}
    for number, sample in enumerate(samples):
        ids = np.array(sample.ids, dtype=np.int32)
        labels = ids.copy()
        labels[: sample.opened] = IGNORED
        windows[f"sample/{number}"] = Example(input_ids=ids, labels=labels)
    return windows


def mean_per_token(sums: list[float], counts: list[int]) -> tuple[float, float | None]:
    """(mean of a quantity over all tokens, its standard error over samples), from sums over the tokens of each sample.

    The error is that of a ratio of two sums, R = Σ x / Σ n: sqrt(N / (N − 1) Σ (x − R n)²) / Σ n, where N is the number
    of samples; with samples of one length it is the deviation of their means over sqrt(N). A single sample has none.
    """
    tokens, number = sum(counts), len(sums)
    mean = math.fsum(sums) / tokens
    if number < 2:
        return mean, None
    squares = math.fsum((x - mean * n) ** 2 for x, n in zip(sums, counts, strict=True))
    return mean, math.sqrt(number / (number - 1) * squares) / tokens


def check_sizes(base: str, of_base: int, of_tuned: int) -> None:
    """Stop where two models tell different numbers of tokens apart, so that their distributions cannot be compared.

    Args:
        base: the base model's name.

    Raises:
        ValueError: the numbers differ.
    """
    if of_base != of_tuned:
        raise ValueError(
            f"--task drift: the model has a vocabulary of {of_tuned} tokens and its base model, {base}, one of "
            f"{of_base}; only models with one vocabulary can be compared. Tokens that training has added "
            f"(data.new_tokens) are unknown to the base model; if this is not the model that was trained from, name "
            f"that one: --base MODEL"
        )


def check_vocabularies(base: str, of_base: dict[str, int], of_tuned: dict[str, int]) -> None:
    """Stop where a token of the base model is another one of the tuned model.

    Args:
        base: the base model's name.
        of_base, of_tuned: token -> id.

    Raises:
        ValueError: naming one such token.
    """
    for token, id_ in of_base.items():
        if (other := of_tuned.get(token)) != id_:
            raise ValueError(
                f"--task drift: the model has another vocabulary than its base model, {base}: the token {token!r} is "
                f"{id_} there and {'unknown' if other is None else other} here; name the model that was trained from: "
                f"--base MODEL"
            )
