"""Values from a JSON file in the types that a class declares, or a message that says which one does not fit."""

import functools
import json
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from sorsa_ds.config.declare import check_text
from sorsa_ds.config.yaml_io import texts_in
from sorsa_ds.runtime.words import cut

T = TypeVar("T")
_adapter = functools.cache(TypeAdapter)


def typed(kind: type[T], value: Any) -> T:
    """An object of a dataclass or of another type, from what a JSON file holds of it.

    Args:
        kind: its fields are checked strictly, so that no text stands for a number.
        value: the parsed JSON, from `sorsa_ds.runtime.json_text.parse_json`.

    Raises:
        ValueError: a field is missing or too many, or has another type or lies outside its range. The message names the
            first one by its dotted path.
    """
    declared: type = kind  # a `type[T]` is not hashable for the type checker
    try:
        for text in texts_in(value):
            check_text(text)
        return _adapter(declared).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        place = cut(".".join(map(str, wrong["loc"])))
        raise ValueError(f"{place}: {wrong['msg']}" if place else wrong["msg"]) from error
