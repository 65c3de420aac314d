"""The methods that there are, by name: the one place to which a new baseline is added."""

from collections.abc import Mapping

from sorsa_ds.methods.adalora import AdaLora
from sorsa_ds.methods.method import Method, Settings
from sorsa_ds.methods.peft_adapters import Dora, Lora, Olora, Pissa
from sorsa_ds.methods.sorsa import Sorsa
from sorsa_ds.methods.whole_weights import Full, Partial

METHODS: dict[str, Method] = {
    method.name: method
    for method in (Sorsa(), Lora(), Pissa(), AdaLora(), Dora(), Olora(), Full(), Partial())
}  # fmt: skip
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
