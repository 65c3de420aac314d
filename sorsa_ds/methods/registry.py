"""The methods that there are, by name, gathered from families/."""

from collections.abc import Iterator, Mapping
from importlib import import_module
from inspect import isabstract
from pkgutil import iter_modules
from typing import get_args

from sorsa_ds.config.schema import MethodName
from sorsa_ds.methods import families
from sorsa_ds.methods.method import Method, Settings


def _methods() -> Iterator[Method]:
    for file in iter_modules(families.__path__, f"{families.__name__}."):
        for member in vars(import_module(file.name)).values():
            own = isinstance(member, type) and member.__module__ == file.name
            if own and issubclass(member, Method) and not isabstract(member):
                yield member()


def _by_name() -> dict[str, Method]:
    methods = list(_methods())
    found = {method.name: method for method in methods}
    assert len(found) == len(methods), f"two methods share a name: {[method.name for method in methods]}"
    assert set(found) == set(get_args(MethodName)), f"families/ has {sorted(found)}, MethodName {get_args(MethodName)}"
    return {name: found[name] for name in get_args(MethodName)}


METHODS = _by_name()
"""Name in the settings -> method, in the order in which tables and pictures show them."""

VARIANTS: dict[str, tuple[str, Mapping[str, object]]] = {
    variant: (method.name, changed) for method in METHODS.values() for variant, changed in method.variants.items()
}
"""Name under which a comparison runs a method with settings changed -> (the method, path of a setting -> value)."""


def method_named(name: str) -> Method:
    """The method of this name, or the one of which it names a variant."""
    return METHODS[VARIANTS[name][0] if name in VARIANTS else name]


def method_of(settings: Settings) -> Method:
    """The method of a run's settings, or of an adapter's description."""
    return METHODS[settings.method]
