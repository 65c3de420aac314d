"""Sizes on a command line."""

import pytest

from sorsa_ds.config.byte_size import read_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GiB", 80 * 2**30), (" 24 gb ", 24 * 10**9), ("1.5TiB", 3 * 2**39), ("30KB", 30_000), ("7B", 7)],
)
def test_a_number_and_a_unit_are_bytes(text, size):
    assert read_bytes(text, "--size", "write 5GB") == size


@pytest.mark.parametrize(
    "text", ["", "80", "5G", "GB", "-5GB", "1kbit", "80GB x", "80GB; 7B", "1e3GB", "5XB", "9" * 400 + "GB"]
)
def test_anything_else_is_refused_with_a_hint(text):
    with pytest.raises(ValueError, match="^--size .*: write 5GB$"):
        read_bytes(text, "--size", "write 5GB")


@pytest.mark.parametrize("text", ["0B", "1023MiB", "1025TiB"])
def test_bounds_are_told_as_they_were_given(text):
    with pytest.raises(ValueError, match=f"^--size {text}: must be from 1GiB to 1024TiB$"):
        read_bytes(text, "--size", "write 5GB", smallest="1GiB")
