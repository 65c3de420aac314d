"""How a setting is declared: as a field of a dataclass made with `settings`, with its help text as a docstring."""

from typing import TYPE_CHECKING, Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

if TYPE_CHECKING:  # a type checker understands a dataclass only by the decorator of the standard library
    from dataclasses import dataclass as settings
else:
    settings = dataclass(
        kw_only=True, slots=True, frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True)
    )
    """Decorator of a class of settings: immutable, its types checked, the docstring under a field kept as its help."""

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
