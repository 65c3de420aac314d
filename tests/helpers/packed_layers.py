"""A fixture for tests of small models over bitsandbytes' 4-bit layers."""

import pytest


@pytest.fixture(autouse=True)
def packed_layers_of_any_size(monkeypatch):
    """bitsandbytes computes a 4-bit layer on any CPU as on one without bf16 instructions.

    Its kernel for CPUs that have them takes only layers whose outputs are a multiple of 32, and the tests' are smaller.
    """
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
