"""What tests of 4-bit layers need around them."""

from tests.helpers.packed_layers import packed_layers_of_any_size

__all__ = ["packed_layers_of_any_size"]
