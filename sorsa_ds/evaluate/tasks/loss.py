"""The loss of a text under a model, in nats per token and as perplexity; or the loss of a run on its held-out data.

A document longer than the window is measured in windows that slide by the stride. Each token is scored once, in the
first window that reaches it, and so sees at least the `window - stride` tokens before it. With a stride of `window - 1`
the windows are chunks that share one token: the last of a chunk is the first of the next.
"""

import math
from collections.abc import Collection
from pathlib import Path

from sorsa_ds.data.formats import Rendered
from sorsa_ds.data.layout import resolve_format
from sorsa_ds.data.source import open_splits
from sorsa_ds.data.tokenize import IGNORED, Example, encode, encode_all
from sorsa_ds.evaluate.backends.likelihood import Likelihood, batch_by_length
from sorsa_ds.evaluate.datasets import DATA_OPTION, rows_of
from sorsa_ds.evaluate.options import WINDOW, Options
from sorsa_ds.evaluate.tasks.task import Emit, Engine, Setting
from sorsa_ds.runtime import digest
from sorsa_ds.runtime.console import say

_UNLIMITED = 2**31


class Loss:
    """A task (`task.Task`) that scores windows of documents.

    Args:
        windows: id -> tokens and labels. A token that another window scores has the label IGNORED.
        how: a sentence on how documents were cut.
        reported: the loss that the run itself has measured, where the data is its own.
    """

    def __init__(self, windows: dict[str, Example], how: str, reported: float | None = None):
        self.ids = list(windows)
        self._windows, self._how, self._reported = windows, how, reported
        self._likelihood: Likelihood

    def digest(self) -> str:
        return digest_of_windows(self._windows)

    def notes(self) -> list[str]:
        return [self._how]

    def start(self, engine: Engine) -> None:
        self._likelihood = engine.likelihood()

    def batches(self, done: Collection[str], size: int) -> list[list[str]]:
        return batch_by_length([(i, len(w["input_ids"])) for i, w in self._windows.items() if i not in done], size)

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
        """Return at once: this task keeps nothing open that would have to be ended."""


def held_out(examples: list[Example], reported: float | None, place: str) -> Loss:
    """The task of a run's own held-out examples. Each is a window of its own, as in training.

    Args:
        reported: the loss that the run itself has measured; None where it has not.
        place: where the run's settings say that they are.
    """
    windows = {f"held-out/{number}": example for number, example in enumerate(examples)}
    return Loss(windows, f"The run's own held-out examples, each whole, from {place}.", reported)


def build(options: Options, setting: Setting) -> Loss:
    """The task of any text. A .txt file is one document; of rows in a format of training the learned tokens are scored.

    Raises:
        ValueError: the data cannot be read or has nothing to score, or the model does not take such windows.
    """
    return Loss(*windows_of(options, setting))


def windows_of(options: Options, setting: Setting) -> tuple[dict[str, Example], str]:
    """The text that --data names, in windows (id -> tokens and labels), and a sentence on how it was cut.

    Raises:
        ValueError: the data cannot be read or has nothing to score, or the model does not take such windows.
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
        for place, part in enumerate(cut_into_windows(document, window, stride)):
            windows[f"{number}/{place}"] = part
    if not windows:
        raise ValueError(f"{DATA_OPTION}: no token to score in {options.data}")
    way = "in chunks" if stride == window - 1 else f"sliding by {stride}, so after {window - stride} tokens or more"
    return windows, f"Documents: {len(documents)}, in windows of {window} tokens, {way}."


def cut_into_windows(document: Example, window: int, stride: int) -> list[Example]:
    """Windows of a document. Each labelled token is scored in exactly one, except for the document's first token."""
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
    assert options.data is not None, "without data the loss is that of a run's held-out examples"
    file = Path(options.data).expanduser()
    if file.is_file() and file.suffix == ".txt":
        if options.limit is not None:
            raise ValueError(f"--limit counts rows; {file} is one document")
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ValueError(f"{DATA_OPTION}: {file}: {error}") from error
        return [encode(Rendered(text, ((0, len(text)),), closed=False), setting.tokenizer, _UNLIMITED)]
    rows = rows_of(open_splits(options.data, None, 0, DATA_OPTION), ("test", "validation", "train"), ())
    rows = rows.select(range(len(rows) if options.limit is None else min(options.limit, len(rows))))
    what = f"{DATA_OPTION} {options.data}"
    try:
        layout = resolve_format("auto", rows.column_names, options.columns)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
    encoded = encode_all(rows, layout, setting.tokenizer, _UNLIMITED, what)
    for reason, count in encoded.left_out.items():
        say(f"{count} of {len(rows)} rows are left out: {reason}.")
    for remark, count in encoded.remarks.items():
        say(f"In {count} of {len(rows)} conversations {remark}.")
    return encoded.examples


def digest_of_windows(windows: dict[str, Example]) -> str:
    """The digest of the tokens that are measured, and of which of them are scored."""
    return digest.of_bytes(b"".join(one[key].tobytes() for one in windows.values() for key in ("input_ids", "labels")))
