"""What launch/preview.py does: find the tokenizer, read the data as training would, show it."""

import io
import os
import sys
from contextlib import redirect_stdout

from sorsa_ds.data.mix import joined
from sorsa_ds.data.run_data import load_data
from sorsa_ds.model.data_fit import check_fits
from sorsa_ds.model.new_tokens import add_tokens, rows_for
from sorsa_ds.model.packed_attention import check_packing
from sorsa_ds.model.pretrained import find_companions
from sorsa_ds.model.skeleton import skeleton
from sorsa_ds.model.tokenizer import load_tokenizer
from sorsa_ds.preview.options import Request
from sorsa_ds.preview.report import as_json, as_text, coloured, draw_lengths, plain
from sorsa_ds.runtime.console import printable
from sorsa_ds.runtime.json_text import finite_json


def show(request: Request) -> None:
    """Read and tokenise the data, and show it; the tokens stay in the cache.

    Raises:
        ValueError: whatever training would refuse before it loads a weight; or the data are to be streamed.
    """
    config = request.config
    if config.data.streaming:
        raise ValueError("data.streaming: a stream is read only while training goes on; preview it without")
    said = _Kept()
    with redirect_stdout(said):
        folder = find_companions(config.model, config.loading)
        tokenizer = load_tokenizer(folder, config.loading)
        rows = rows_for(add_tokens(tokenizer, config.data.new_tokens))
        said.lines.clear()  # what concerns the model is no warning of the data's
        data = load_data(config.data, tokenizer, config.train.seed)
    train, held_out = data.examples, joined(list(data.held_out.values()))
    check_fits(folder, config.loading, [part for part in (train, held_out) if part], rows)
    if config.data.packing:
        check_packing(skeleton(folder, config.loading))
    if request.plot is not None:
        draw_lengths(train, request.plot, config.data.max_length)
    if request.as_json:
        print(finite_json(as_json(train, held_out, tokenizer, request.examples, said.lines)))
        return
    shows = coloured if sys.stdout.isatty() and "NO_COLOR" not in os.environ else plain
    for place in range(min(request.examples, len(train))):
        print(f"=== example {place + 1} of {len(train):,} ===\n{shows(train[place], tokenizer)}\n")
    print(printable(as_text(train, held_out, config.train, request.gpus, config.data.max_length)))


class _Kept(io.TextIOBase):
    """A stdout whose lines go to stderr, and are kept."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def write(self, text: str, /) -> int:
        self.lines += filter(None, text.splitlines())
        return sys.stderr.write(text)
