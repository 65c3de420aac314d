"""The tokenizer of a run that has brought new tokens: it goes with whatever is exported."""

import shutil
from functools import partial
from pathlib import Path

from sorsa_ds.export.options import Format
from sorsa_ds.model.new_tokens import table_rows
from sorsa_ds.model.tokenizer import load_tokenizer
from sorsa_ds.run.paths import TOKENIZER
from sorsa_ds.run.source import Source
from sorsa_ds.runtime.files import write_atomic

_STALE = ("added_tokens.json", "special_tokens_map.json")
"""Files of an older tokenizer that would speak against the new one."""


def write_tokenizer(source: Source, form: Format, folder: Path) -> list[str]:
    """Put the run's tokenizer, if it has one of its own, into a folder of an export, in the place of the base model's.

    Beside an adapter that this program alone reads it lies where that looks for it, elsewhere in the folder itself.

    Returns:
        A sentence for whoever uses the export, where there are new tokens.

    Raises:
        ValueError: the run's tokenizer is missing or damaged.
        OSError: the disk refuses.
    """
    tokens = source.described.new_tokens
    if not tokens:
        return []
    kept = source.adapter / TOKENIZER
    place = folder / TOKENIZER if form == "adapter" and source.method.adapter_library == "sorsa_ds" else folder
    for name in _STALE:
        (place / name).unlink(missing_ok=True)
    for path in sorted(kept.glob("*")):
        write_atomic(place / path.name, partial(shutil.copyfile, path))
    tokenizer = load_tokenizer(place, source.described.loading)
    for token, number in tokens.items():
        if tokenizer.convert_tokens_to_ids(token) != number:
            raise ValueError(f"{kept} is damaged: it does not give {token!r} the id {number} that it had in training")
    ids = sorted(tokens.values())
    return [
        f"Training has added {len(ids)} tokens (ids {ids[0]} to {ids[-1]}). The tokenizer here knows them; embeddings "
        f"and head have {table_rows(source.model)} rows."
    ]
