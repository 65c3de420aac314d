"""The switches that change how numbers are rounded: all set in one place, and told."""

import os

import pytest
import torch

from sorsa_ds.runtime.numerics import full_fp32_products, seed_rank, set_numerics
from tests.structure import modules

SWITCHES = ("set_float32_matmul_precision", "allow_tf32", "allow_bf16", "use_deterministic", "cudnn.")


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """The switches as they were, afterwards."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    products = torch.backends.cuda.matmul
    before = torch.get_float32_matmul_precision(), products.allow_bf16_reduced_precision_reduction
    cudnn = torch.backends.cudnn.deterministic
    yield
    torch.set_float32_matmul_precision(before[0])
    products.allow_bf16_reduced_precision_reduction = before[1]
    torch.backends.cudnn.deterministic = cudnn
    torch.use_deterministic_algorithms(False)


def test_a_gpu_gets_tf32_but_where_it_hurts_and_sums_bf16_in_fp32():
    told = set_numerics("cuda")
    assert torch.get_float32_matmul_precision() == "high"
    assert torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction is False
    assert not torch.are_deterministic_algorithms_enabled() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    assert "TF32" in told and "deterministic or not" in told
    with full_fp32_products():
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == "high"


def test_deterministic_asks_torch_cublas_and_cudnn():
    told = set_numerics("cuda", deterministic=True)
    assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert "deterministic kernels only" in told


def test_a_cpu_computes_in_full_fp32():
    assert set_numerics("cpu") == "Numerics: full fp32 products, the fastest kernels, deterministic or not."
    assert torch.get_float32_matmul_precision() == "highest"


def test_ranks_draw_differently_and_each_the_same_again():
    drawn = []
    for rank in (0, 1, 0):
        seed_rank(7, rank)
        drawn.append(torch.rand(3).tolist())
    assert drawn[0] == drawn[2] != drawn[1]


def test_no_other_module_sets_a_switch():
    setting = {
        path.name for path in modules() if any(switch in path.read_text(encoding="utf-8") for switch in SWITCHES)
    }
    assert setting == {"numerics.py"}
