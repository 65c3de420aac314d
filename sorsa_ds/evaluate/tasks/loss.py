"""The loss of a text under a model: nats per token and perplexity; or a run's held-out loss.

A document longer than the window is measured in windows that slide by the stride: each token is scored once, in the
first window that reaches it, after at least `window - stride` tokens of what came before. A stride of `window - 1` is
the other extreme, chunks: each begins anew, and the last token of one is all that the next sees of it.
"""

import math
from collections.abc import Collection
from pathlib import Path

from datasets import Dataset

from sorsa_ds.data.formats import Rendered
from sorsa_ds.data.source import open_splits
from sorsa_ds.data.tokenize import IGNORED, Example, encode, encode_all
from sorsa_ds.evaluate.backends.likelihood import Likelihood, by_length
from sorsa_ds.evaluate.datasets import SETTING, first, rows_of
from sorsa_ds.evaluate.options import Options
from sorsa_ds.evaluate.tasks.task import Emit, Engine, Setting
from sorsa_ds.runtime import digest

WINDOW = 1024
"""Tokens of a window by default, where the model takes as many."""

_UNLIMITED = 2**31


class Loss:
    """Windows of documents, scored.

    Args:
        windows: id -> tokens and labels; what another window scores is IGNORED.
        how: in a sentence, how documents were cut.
        reported: the same figure as the run itself has measured it, where there is one.
    """

    def __init__(self, windows: dict[str, Example], how: str, reported: float | None = None):
        self.ids = list(windows)
        self._windows, self._how, self._reported = windows, how, reported
        self._likelihood: Likelihood

    def digest(self) -> str:
        return digest.of_bytes(
            b"".join(window[key].tobytes() for window in self._windows.values() for key in ("input_ids", "labels"))
        )

    def notes(self) -> list[str]:
        return [self._how]

    def start(self, engine: Engine) -> None:
        self._likelihood = engine.likelihood()

    def batches(self, done: Collection[str], size: int) -> list[list[str]]:
        return by_length([(i, len(w["input_ids"])) for i, w in self._windows.items() if i not in done], size)

    def work(self, batch: list[str], emit: Emit) -> None:
        measured = self._likelihood.losses([self._windows[id_] for id_ in batch])
        for id_, (nats, scored) in zip(batch, measured, strict=True):
            if not math.isfinite(nats):
                raise ValueError(f"--task loss: the loss of {id_} is {nats}: the model is broken")
            emit({
                "id": id_, "correct": None, "nats": nats, "scored": scored,
                "tokens": len(self._windows[id_]["input_ids"]),
            })  # fmt: skip

    def results(self, records: list[dict]) -> dict:
        scored = sum(record["scored"] for record in records)
        loss = math.fsum(record["nats"] for record in records) / scored
        return {
            "nats_per_token": loss,
            "perplexity": math.exp(loss),
            "scored_tokens": scored,
            "windows": len(records),
            "how": self._how,
            **({} if self._reported is None else {"reported": self._reported}),
        }

    def rows(self, results: dict) -> list[tuple[str, str]]:
        reported = [] if self._reported is None else [("the run reported", f"{self._reported:.6f} nats per token")]
        return [
            ("held-out loss" if reported else "loss", f"{results['nats_per_token']:.6f} nats per token"),
            *reported,
            ("perplexity", f"{results['perplexity']:.4f}"),
            ("scored", f"{results['scored_tokens']} tokens in {results['windows']} windows"),
        ]

    def close(self) -> None:
        """Nothing to do."""


def held_out(examples: list[Example], reported: float) -> Loss:
    """A run's own held-out examples, whole, as training measures them."""
    windows = {f"held-out/{number}": example for number, example in enumerate(examples)}
    return Loss(windows, "The run's own held-out examples, each whole.", reported)


def build(options: Options, setting: Setting) -> Loss:
    """Any text: a .txt file is one document; of rows in any format that training reads, what it learns is scored.

    Raises:
        ValueError: data that cannot be read, nothing to score, or a window that the model does not take.
    """
    positions = setting.positions
    window = options.window or (WINDOW if positions is None else min(WINDOW, positions))
    if window < 2 or (positions is not None and window > positions):
        raise ValueError(f"--window: {window} tokens; it must be 2 or more, and the model takes {positions or 'any'}")
    stride = options.stride or max(1, window // 2)
    if stride >= window:
        raise ValueError(f"--stride: {stride} is not below --window ({window}), so tokens would be left out")
    documents = _documents(options, setting)
    windows = {}
    for number, document in enumerate(documents):
        for place, part in enumerate(cut(document, window, stride)):
            windows[f"{number}/{place}"] = part
    if not windows:
        raise ValueError(f"{SETTING}: no token to score in {options.data}")
    way = "in chunks" if stride == window - 1 else f"sliding by {stride}, so after {window - stride} tokens or more"
    return Loss(windows, f"Documents: {len(documents)}, in windows of {window} tokens, {way}.")


def cut(document: Example, window: int, stride: int) -> list[Example]:
    """Windows of a document in which each labelled token, but the document's first, is scored exactly once."""
    ids, labels = document["input_ids"], document["labels"]
    windows, scored = [], 1  # the first token has nothing to predict it from
    for start in range(0, len(ids), stride):
        end = min(start + window, len(ids))
        own = labels[start:end].copy()
        own[: max(0, scored - start)] = IGNORED
        if (own != IGNORED).any():
            windows.append(Example(input_ids=ids[start:end], labels=own))
        scored = max(scored, end)
        if end == len(ids):
            break
    return windows


def _documents(options: Options, setting: Setting) -> list[Example]:
    file = Path(options.data).expanduser()
    if file.is_file() and file.suffix == ".txt":
        if options.limit is not None:
            raise ValueError(f"--limit counts rows; {file} is one document")
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ValueError(f"{SETTING}: {file}: {error}") from error
        return [encode(Rendered(text, ((0, len(text)),), closed=False), setting.tokenizer, _UNLIMITED)]
    rows = rows_of(open_splits(options.data, None, 0, SETTING), ("test", "validation", "train"), ())
    rows = Dataset.from_list(first(rows, options.limit))
    return encode_all(rows, "auto", setting.tokenizer, _UNLIMITED, SETTING)[0]
