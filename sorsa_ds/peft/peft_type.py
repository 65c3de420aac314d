"""SORSA's name among PEFT's methods: a member of its enum `PeftType`, and the entries of its tables.

PEFT has no way to register a method that is not in this enum, and an enum has no way to get a member: Python makes them
all when the class is made. So the member is made here as Python makes it, and put where an enum keeps its members.
`PeftType("SORSA")`, `peft.PeftType.SORSA`, copies and pickles of it are then one and the same object, and a
configuration that says `"peft_type": "SORSA"` can be read in any process that has imported `sorsa_ds.peft`.
"""

from typing import Any

from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method

NAME = "SORSA"
OWN = __package__


def register_sorsa(config: type[PeftConfig], model: type[BaseTuner]) -> None:
    """Make PEFT know the method. Calling it again changes nothing.

    Raises:
        ImportError: this version of PEFT has a method of that name itself.
    """
    if NAME in PeftType.__members__:
        own = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType[NAME])
        if own is None or not own.__module__.startswith(f"{OWN}."):
            raise ImportError(
                "this version of PEFT has a method SORSA of its own, which sorsa_ds.peft would replace: install "
                "peft>=0.21.2,<0.22, or leave out `import sorsa_ds.peft` and use PEFT's method"
            )
        return
    _add_member(NAME)
    register_peft_method(name=NAME.lower(), config_cls=config, model_cls=model)


def _add_member(name: str) -> None:
    """Add a member whose value is its name to `PeftType`, an enum of strings."""
    member: Any = str.__new__(PeftType, name)
    member._name_, member._value_ = name, name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    setattr(PeftType, name, member)  # before it is in the map: an enum forbids to assign to its members
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
