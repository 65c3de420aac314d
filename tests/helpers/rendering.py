"""Rows rendered in a format that is called by its name."""

from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from sorsa_ds.data import formats
from sorsa_ds.data.layout import Layout, resolve_format


def layout(name: str, rows: Dataset) -> Layout:
    """The layout of all rows of a data set."""
    return resolve_format(name, rows.column_names)


def render(row: Mapping[str, Any], name: str, tokenizer: PreTrainedTokenizerBase | None) -> formats.Rendered:
    """One row, whose columns are all there are; a plain format needs no tokenizer."""
    return formats.render(row, resolve_format(name, list(row)), tokenizer)  # type: ignore[arg-type]
