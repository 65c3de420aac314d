"""What is shown of a run's examples: texts with their learned parts, a table, a picture, and one JSON object."""

from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from sorsa_ds.config.batch_size import DEFAULT_MICRO, most_positions
from sorsa_ds.config.schema import TrainConfig
from sorsa_ds.data.token_store import Examples
from sorsa_ds.data.tokenize import IGNORED, Example, show_example
from sorsa_ds.preview.padding import MOST_STEPS, levelled_positions, padding_share
from sorsa_ds.runtime.console import printable, table
from sorsa_ds.runtime.plotting import COLOURS, picture

_LEARNED, _PLAIN = "\x1b[1;32m", "\x1b[0m"


def coloured(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """An example as text for a terminal; what is learned is bold and green."""
    return "".join(
        f"{_LEARNED}{printable(text)}{_PLAIN}" if learned else printable(text)
        for learned, text in _parts(example, tokenizer)
    )


def plain(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """An example as text, with a heading over each masked and each learned part."""
    return printable(show_example(example, tokenizer))


def as_json(
    train: Examples, held_out: Examples, tokenizer: PreTrainedTokenizerBase, shown: int, warnings: list[str]
) -> dict[str, Any]:
    """Everything that is shown, as one object that JSON can hold.

    Args:
        shown: how many examples are in it.
        warnings: what was said while the data was read.
    """
    counts = train.counts
    return {
        "source": counts.source,
        "rows": counts.rows,
        "learned_rows": counts.learned_rows,
        "left_out": counts.left_out,
        "cut": counts.cut,
        "remarks": counts.remarks,
        "tokens": counts.tokens,
        "learned_tokens": counts.learned_tokens,
        "template": train.template,
        "held_out": held_out.counts.as_dict() if held_out else None,
        "warnings": warnings,
        "examples": [_as_json(train[place], tokenizer) for place in range(min(shown, len(train)))],
    }


def as_text(train: Examples, held_out: Examples, settings: TrainConfig, gpus: int, max_length: int) -> str:
    """The table.

    Args:
        gpus: the number of the run's GPUs.
        max_length: `data.max_length`.
    """
    counts, lengths = train.counts, train.lengths
    median, most = np.percentile(lengths, (50, 95))
    rows = [
        ("data", counts.source),
        ("rows read", f"{counts.rows:,}"),
        ("learned", f"{counts.learned_rows:,}, of which {counts.cut:,} are cut"),
        *(("left out", f"{number:,}: {reason}") for reason, number in counts.left_out.items()),
        ("template", train.template),
        (
            "tokens",
            f"{counts.tokens:,}; of an example: mean {lengths.mean():.0f}, median {median:.0f}, "
            f"95 % {most:.0f}, longest {lengths.max()}",
        ),
        ("learned tokens", f"{counts.learned_tokens:,}, {counts.learned_tokens / counts.tokens:.1%}"),
        ("padding", _padding(lengths, settings, gpus, max_length)),
    ]
    if held_out:
        own = held_out.counts
        rows.append(("held out", f"{own.rows:,} rows, {own.learned_rows:,} measured{own.reasons()}, from {own.source}"))
    return table(rows)


def draw_lengths(examples: Examples, path: Path, most: int) -> None:
    """Write a histogram of the examples' lengths as `path`.png and `path`.svg.

    Args:
        most: `data.max_length`, which is marked where examples reach it.

    Raises:
        ValueError: the files cannot be written.
    """
    path = path.with_suffix("") if path.suffix in (".png", ".svg") else path
    with picture(path, 1, 1, (6.0, 3.2)) as (_, [axes]):
        axes.hist(examples.lengths, bins=min(50, int(np.ptp(examples.lengths)) + 1), color=COLOURS[1])
        if examples.counts.cut:
            axes.axvline(most, color=COLOURS[0], linestyle="--", label="data.max_length")
            axes.legend(frameon=False)
        axes.set(xlabel="tokens of an example", ylabel="examples")


def _padding(lengths_N: np.ndarray, settings: TrainConfig, gpus: int, max_length: int) -> str:
    micro = DEFAULT_MICRO if settings.micro_batch_size in (None, "auto") else int(settings.micro_batch_size or 0)
    accumulated = gpus * micro * (settings.gradient_accumulation_steps or 1)
    if (most := most_positions(settings.micro_batch_tokens, micro, max_length)) is not None:
        whole = settings.global_batch_size or accumulated
        found = levelled_positions(lengths_N, most, whole, gpus)
        return (
            f"{found.padding:.1%} of positions in micro-batches of up to {most:,} inside steps of {whole}, on {gpus} "
            f"ranks; the largest of a pass exceed the mean by {found.imbalance():.1%} (the first {MOST_STEPS} "
            f"steps at most)"
        )
    whole = max(micro, (settings.global_batch_size or accumulated) // micro * micro)
    grouped, random = (padding_share(lengths_N, micro, whole, grouped) for grouped in (True, False))
    return (
        f"{grouped:.1%} of positions in micro-batches of {micro}, grouped by length inside steps of {whole}; "
        f"{random:.1%} without grouping"
    )


def _as_json(example: Example, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {
        "text": tokenizer.decode(example["input_ids"].tolist(), skip_special_tokens=False),
        "learned": [text for learned, text in _parts(example, tokenizer) if learned],
    }


def _parts(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[tuple[bool, str]]:
    """The runs of masked and of learned tokens, in their order: whether one is learned, and its text."""
    tokens = zip(example["input_ids"].tolist(), example["labels"].tolist(), strict=True)
    return [
        (learned, str(tokenizer.decode([token for token, _ in run], skip_special_tokens=False)))
        for learned, run in groupby(tokens, key=lambda token: token[1] != IGNORED)
    ]
