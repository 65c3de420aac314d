"""From blocks of streamed rows to examples."""

from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from sorsa_ds.config.schema import DataConfig
from sorsa_ds.data.layout import listed
from sorsa_ds.data.stream_rows import PLACE
from sorsa_ds.data.token_store import Examples
from sorsa_ds.data.tokenize import Encoder, RowError, encode_rows
from sorsa_ds.runtime.console import say


class BlockEncoder:
    """Makes examples of the rows of one source, block by block.

    The columns are those of all rows seen so far: a row that lacks one has nothing in it.

    Args:
        kind: what the rows are for, `training` or `held-out`, for messages.
        path: where the rows come from.
        split: the split whose rows they are, by which rows that are in no file here are told.
    """

    def __init__(self, data: DataConfig, tokenizer: PreTrainedTokenizerBase, kind: str, path: str, split: str) -> None:
        self._data, self._tokenizer, self._path, self._split = data, tokenizer, path, split
        self._what = f"{kind} data ({path})"
        self._columns: dict[str, None] = {}
        self._encoder: Encoder | None = None

    @property
    def kind(self) -> str:
        """How the rows of the last block became texts, in words."""
        assert self._encoder is not None, "there was a block"
        return self._encoder.layout.kind

    def __call__(self, rows: list[dict], first: int) -> Examples:
        """The examples of a block.

        Args:
            first: number of the first row, from 1.

        Raises:
            ValueError: a row cannot be rendered, or its columns are not those of the format.
        """
        if not rows:
            return Examples.of([])
        encoder = self._encoder_of(rows, first)
        whole = [{column: row.get(column) for column in self._columns} for row in rows]
        try:
            encoded = encode_rows(whole, first - 1, encoder)
        except RowError as error:
            place = rows[error.number - first].get(PLACE)
            raise error.at(place or f"split {self._split}, row {error.number}") from error
        return Examples.of(encoded.examples, replace(encoded.counts, source=self._path))

    def _encoder_of(self, rows: list[dict], first: int) -> Encoder:
        """The encoder of rows with all columns seen so far, those of the given rows included."""
        before = len(self._columns)
        self._columns |= dict.fromkeys(column for row in rows for column in row if column != PLACE)
        known = self._encoder
        if known is not None and len(self._columns) == before:
            return known
        encoder = Encoder.of(self._data, list(self._columns), self._tokenizer, self._what)
        if known is not None and encoder.layout.format != known.layout.format:
            raise ValueError(
                f"{self._what}: in the rows from row {first} on there are other columns "
                f"({listed(list(self._columns)[before:])}), by which data.format would be {encoder.layout.format}, no "
                f"longer {known.layout.format}; set it"
            )
        told = known.layout.ignored if known else ()
        if new := [column for column in encoder.layout.ignored if column not in told]:
            say(f"{self._what}: columns that are not used: {listed(new)}.")
        self._encoder = encoder
        return encoder
