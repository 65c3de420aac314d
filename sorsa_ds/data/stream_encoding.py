"""From blocks of streamed rows to examples."""

from transformers import PreTrainedTokenizerBase

from sorsa_ds.config.schema import DataConfig
from sorsa_ds.data.counts import Counts
from sorsa_ds.data.examples import counts_of
from sorsa_ds.data.layout import Layout, layout_of, listed
from sorsa_ds.data.streams import Block
from sorsa_ds.data.tokenize import encode_rows
from sorsa_ds.runtime.console import say


class BlockEncoder:
    """Makes examples of the rows of one source, block by block.

    The columns are those of all rows seen so far: a row that lacks one has nothing in it.

    Args:
        what: a name for the rows and the place they come from, for messages.
    """

    def __init__(self, data: DataConfig, tokenizer: PreTrainedTokenizerBase, what: str) -> None:
        self._data, self._tokenizer, self._what = data, tokenizer, what
        self._columns: dict[str, None] = {}
        self._layout: Layout | None = None

    def __call__(self, rows: list[dict], first: int) -> Block:
        """The examples of a block.

        Args:
            first: number of the first row, from 1.

        Raises:
            ValueError: a row cannot be rendered, or its columns are not those of the format.
        """
        if not rows:
            return Block([], Counts())
        layout = self._layout_of(rows, first)
        whole = [{column: row.get(column) for column in self._columns} for row in rows]
        encoded = encode_rows(whole, first - 1, layout, self._tokenizer, self._data.max_length, self._what)
        return Block(encoded.examples, counts_of(len(rows), encoded))

    def _layout_of(self, rows: list[dict], first: int) -> Layout:
        """The layout of all columns seen so far, with those of some rows."""
        before = len(self._columns)
        self._columns |= dict.fromkeys(column for row in rows for column in row)
        if self._layout is not None and len(self._columns) == before:
            return self._layout
        try:
            layout = layout_of(self._data, list(self._columns))
        except ValueError as error:
            raise ValueError(f"{self._what}: {error}") from error
        if self._layout is not None and layout.format != self._layout.format:
            raise ValueError(
                f"{self._what}: in the rows from row {first} on there are other columns "
                f"({listed(list(self._columns)[before:])}), by which data.format would be {layout.format}, no longer "
                f"{self._layout.format}; set it"
            )
        if new := [column for column in layout.ignored if self._layout is None or column not in self._layout.ignored]:
            say(f"{self._what}: columns that are not used: {listed(new)}.")
        self._layout = layout
        return layout
