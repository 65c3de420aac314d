"""The truncated SVD against torch.linalg.svd of the matrix in fp64: real-looking and adversarial spectra, both ways."""

import pytest
import torch

from sorsa_ds.sorsa import truncated_svd
from sorsa_ds.sorsa.decompose import decompose, decompose_within, residual

M, N, R = 320, 256, 16

# Spectra (N values, descending) that are hard in one way each.
INDEX = torch.arange(N, dtype=torch.float64)
SPECTRA = {
    "power": (1 + INDEX) ** -0.5,
    "slow": 1 - 0.9 * (INDEX / N) ** 0.3,
    "geometric": 0.93**INDEX,
    "steep": 0.6**INDEX,
    "gap at the cut": torch.where(INDEX < R, 10.0, 1.0) * 0.999**INDEX,
    "step, exactly equal": torch.where(INDEX < R, 4.0, 1.0),
    "cluster across the cut": torch.where((INDEX > R - 8) & (INDEX < R + 8), 0.5 - 1e-4 * INDEX, 0.9**INDEX),
    "flat": torch.ones(N, dtype=torch.float64),
    "huge outlier": torch.where(INDEX < 1, 1e4, (1 + INDEX) ** -0.3),
    "rank deficient": torch.where(INDEX < 20, 1 / (1 + INDEX), 0.0),
    "rank below r": torch.where(INDEX < 5, 1 / (1 + INDEX), 0.0),
    "zero": torch.zeros(N, dtype=torch.float64),
}


def matrix(spectrum, rows=M, columns=N, dtype=torch.float32, seed=0):
    """A matrix with given singular values between random orthonormal bases."""
    draw = torch.Generator().manual_seed(seed)
    k = len(spectrum)
    U = torch.linalg.qr(torch.randn(rows, k, generator=draw, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(columns, k, generator=draw, dtype=torch.float64))[0]
    return (U * spectrum.sort(descending=True).values @ V.T).to(dtype)


def excess(weight, factors, floor=1e-6):
    """(||W - U s V^T||^2 - optimum) / optimum in fp64; an optimum below `floor` of the energy counts as that."""
    wide, rank = weight.double(), len(factors.s)
    squares = torch.linalg.svdvals(wide).square()
    optimum = squares[rank:].sum()
    left = (wide - (factors.U.double() * factors.s.double()) @ factors.V.double().T).square().sum()
    return ((left - optimum) / max(optimum, floor * squares.sum(), 1e-300)).item()


def check_orthonormal(factors, atol=2e-6):
    """U^T U = I = V^T V to fp32 rounding; contiguous; s descending; largest entry of U's columns positive."""
    for X in (factors.U, factors.V):
        gram = X.double().T @ X.double()
        torch.testing.assert_close(gram, torch.eye(X.shape[1], dtype=torch.float64), rtol=0, atol=atol)
        assert X.is_contiguous()
    assert (factors.s.diff() <= 0).all() and (factors.s >= 0).all()
    assert (factors.U.gather(0, factors.U.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.fixture
def always_krylov(monkeypatch):
    """The iteration also where the exact way is faster, as it is for all of these small matrices."""
    monkeypatch.setattr(truncated_svd, "prefers_exact", lambda *_: False)


@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
@pytest.mark.parametrize("shape", [(M, N), (N, M)], ids=["tall", "wide"])
def test_exact(spectrum, shape):
    weight = matrix(spectrum, *shape)
    factors = decompose(weight, R, method="exact")
    check_orthonormal(factors)
    expected = torch.linalg.svdvals(weight.double())[:R]
    torch.testing.assert_close(factors.s.double(), expected, rtol=1e-6, atol=3e-7 * float(expected[0]))
    assert abs(excess(weight, factors)) < 1e-6
    assert factors.accuracy.way == "exact" and factors.accuracy.excess == 0


@pytest.mark.parametrize("tolerance", [1e-2, 1e-3])
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
@pytest.mark.parametrize("shape", [(M, N), (N, M)], ids=["tall", "wide"])
def test_iteration_keeps_its_tolerance(always_krylov, spectrum, shape, tolerance):
    weight = matrix(spectrum, *shape)
    factors = decompose(weight, R, "layer", "randomized", tolerance)
    check_orthonormal(factors)
    reached, accuracy = excess(weight, factors), factors.accuracy
    assert reached <= tolerance
    if accuracy.way == "krylov":
        assert not accuracy.capped and accuracy.excess <= tolerance
    energy = weight.double().square().sum()
    captured = 1 - (weight.double() - (factors.U * factors.s @ factors.V.T).double()).square().sum() / max(
        energy, 1e-300
    )
    assert abs(accuracy.captured - captured) < 1e-5
    # What is left is orthogonal to the principal part, on the side of the triplets that was computed from the other.
    rest = residual(weight, factors).double()
    inner = rest @ factors.V.double() if shape == (M, N) else rest.T @ factors.U.double()
    assert inner.norm() <= 3e-6 * weight.double().norm()


@pytest.mark.parametrize("ratio", [1.5, 3.0, 100.0])
def test_more_equal_singular_values_than_a_block_has_vectors(always_krylov, ratio):
    """A block of half the rank can see each multiple singular value only half as often as needed."""
    rank = 96
    index = torch.arange(512, dtype=torch.float64)
    tail = torch.linspace(1, 0.2, 512, dtype=torch.float64)
    weight = matrix(torch.where(index < rank, ratio, tail), 512, 512)
    factors = decompose(weight, rank, "layer", "randomized", 1e-2)
    assert excess(weight, factors) <= 1e-2
    check_orthonormal(factors, 4e-6)


def test_estimate_against_truth(always_krylov):
    """The estimate errs towards too large, and by less than an order of magnitude or so: neither blind nor useless."""
    ratios = []
    for seed, spectrum in enumerate([SPECTRA["power"], SPECTRA["slow"], SPECTRA["geometric"]] * 3):
        weight = matrix(spectrum, 400, 256, seed=seed)
        for iterations in (2, 3, 4, 5):
            found = decompose(weight, 12, f"layer {seed}", "randomized", 1e-9, iterations)
            truth = excess(weight, found)
            if 1e-5 < truth < 3e-2:
                ratios.append(found.accuracy.excess / truth)
    assert len(ratios) > 12
    assert min(ratios) > 0.5 and max(ratios) < 20


def test_the_cap_is_reported_and_iterating_helps(always_krylov):
    weight = matrix(SPECTRA["slow"])
    found = [decompose(weight, R, "layer", "randomized", 1e-6, cap) for cap in (1, 2, 4, 8)]
    reached = [excess(weight, f) for f in found[1:]]
    assert reached[0] > 3 * reached[1] > 9 * reached[2] > 0
    assert all(f.accuracy.capped for f in found[1:3])


def test_random_numbers_depend_on_the_name_alone(always_krylov):
    weight = matrix(SPECTRA["power"])
    first = decompose(weight, R, "layers.3.q_proj", "randomized")
    torch.manual_seed(123)
    decompose(weight, R, "another", "randomized")
    again = decompose(weight.clone(), R, "layers.3.q_proj", "randomized")
    other = decompose(weight, R, "layers.4.q_proj", "randomized")
    for a, b in zip((first.U, first.s, first.V), (again.U, again.s, again.V), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.U, other.U)
    state = torch.get_rng_state()
    decompose(weight, R, "layers.3.q_proj", "randomized")
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["exact", "randomized"])
def test_source_dtypes(always_krylov, dtype, method):
    weight = matrix(SPECTRA["power"], dtype=dtype)
    factors = decompose(weight, R, "layer", method, 1e-3)
    assert factors.U.dtype == factors.s.dtype == factors.V.dtype == torch.promote_types(dtype, torch.float32)
    assert excess(weight, factors) <= 1e-3
    check_orthonormal(factors, 2e-6 if dtype != torch.float64 else 1e-12)


@pytest.mark.parametrize("shape", [(1, 300), (300, 1), (1, 1), (2, 300), (300, 3)])
@pytest.mark.parametrize("method", ["exact", "randomized"])
def test_thin_matrices_at_full_rank(always_krylov, shape, method):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    factors = decompose(weight, min(shape), "layer", method)
    check_orthonormal(factors)
    torch.testing.assert_close((factors.U * factors.s) @ factors.V.T, weight, rtol=0, atol=3e-6)


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12, 1e25])
@pytest.mark.parametrize("method", ["exact", "randomized"])
def test_scales_whose_squares_fp32_cannot_hold(always_krylov, scale, method):
    plain = decompose(matrix(SPECTRA["power"]), R, "layer", method)
    scaled = decompose(matrix(SPECTRA["power"] * scale), R, "layer", method)
    torch.testing.assert_close(scaled.s / scale, plain.s, rtol=1e-5, atol=0)
    check_orthonormal(scaled)


def test_shape_and_rank_choose_the_way():
    assert truncated_svd.prefers_exact(192, 128, 64, 1e-2)
    assert not truncated_svd.prefers_exact(4096, 4096, 128, 1e-3)
    assert not truncated_svd.prefers_exact(1536, 576, 16, 1e-3)
    small = decompose(matrix(SPECTRA["power"]), 128, "layer", "randomized")
    large = decompose(matrix(SPECTRA["power"], 1024, 1024), 8, "layer", "randomized")
    assert (small.accuracy.way, large.accuracy.way) == ("exact", "krylov")


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="tolerance"):
        decompose(torch.ones(3, 3), 1, tolerance=0)
    with pytest.raises(ValueError, match="max_iterations"):
        decompose(torch.ones(3, 3), 1, max_iterations=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_weights_are_refused_by_name_in_both_ways(always_krylov, bad):
    weight = matrix(SPECTRA["power"])
    weight[7, 5] = bad
    for method in ("exact", "randomized"):
        with pytest.raises(ValueError, match="layers.3: .*NaN or Inf"):
            decompose(weight, R, "layers.3", method)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("method", ["exact", "randomized"])
def test_gpu_gives_the_same_factors(always_krylov, method):
    weight = matrix(SPECTRA["geometric"])
    here, there = decompose(weight, 8, "layer", method), decompose(weight.cuda(), 8, "layer", method)
    torch.testing.assert_close(there.s.cpu(), here.s, rtol=1e-5, atol=0)
    for a, b in ((there.U, here.U), (there.V, here.V)):
        torch.testing.assert_close(a.cpu(), b, rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", [(M, N), (N, M)], ids=["tall", "wide"])
@pytest.mark.parametrize("first", [1, 100, N - R], ids=["second", "middle", "trailing"])
@pytest.mark.parametrize("spectrum", ["power", "slow", "geometric", "huge outlier", "rank deficient"])
def test_other_triplets_than_the_leading_ones(spectrum, first, shape):
    weight = matrix(SPECTRA[spectrum], *shape)
    factors = decompose(weight, R, method="randomized", first=first)
    check_orthonormal(factors)
    U, s, Vt = torch.linalg.svd(weight.double(), full_matrices=False)
    window = slice(first, first + R)
    floor = 1e-8 * float(s[0])  # what the fp64 Gram matrix of an fp32 weight resolves
    torch.testing.assert_close(factors.s.double(), s[window], rtol=1e-5, atol=floor)
    product = (factors.U * factors.s).double() @ factors.V.double().T
    torch.testing.assert_close(
        product, (U[:, window] * s[window]) @ Vt[window], rtol=0, atol=3e-6 * float(s[first]) + floor
    )
    assert factors.accuracy.way == "exact"
    assert factors.accuracy.captured == pytest.approx(
        float(s[window].square().sum() / s.square().sum()), rel=1e-4, abs=1e-12
    )


def test_a_window_beyond_the_last_triplet_is_refused():
    with pytest.raises(ValueError, match=f"q: triplets {N - R + 1} to {N} are not all below {N}"):
        decompose(torch.ones(M, N), R, "q", first=N - R + 1)


@pytest.mark.parametrize("shape", [(M, N), (N, M)], ids=["tall", "wide"])
@pytest.mark.parametrize("spectrum", ["power", "geometric", "huge outlier", "rank deficient"])
def test_triplets_within_directions_are_those_of_the_projected_weight(spectrum, shape):
    weight = matrix(SPECTRA[spectrum], *shape)
    directions = torch.linalg.qr(torch.randn(shape[1], R, generator=torch.Generator().manual_seed(1)))[0].t()
    factors = decompose_within(weight, directions)
    check_orthonormal(factors)
    projected = weight.double() @ directions.double().T @ directions.double()
    s = torch.linalg.svdvals(projected)
    scale = float(s[0])
    torch.testing.assert_close(factors.s.double(), s[:R], rtol=1e-5, atol=1e-6 * scale)
    product = (factors.U * factors.s).double() @ factors.V.double().T
    torch.testing.assert_close(product, projected, rtol=0, atol=3e-6 * scale)
    rest = weight.double() - product
    assert (rest @ directions.double().T).norm() < 1e-5 * projected.norm(), "W_r has none of the weight there"
    assert factors.accuracy.captured == pytest.approx(
        float(s.square().sum() / weight.double().square().sum()), rel=1e-4, abs=1e-12
    )


def test_directions_from_which_nothing_comes_leave_factors_orthonormal():
    weight = torch.zeros(M, N)
    weight[:, :4] = torch.randn(M, 4)
    factors = decompose_within(weight, torch.eye(N)[2 : 2 + R], "q")
    check_orthonormal(factors)
    assert (factors.s > 1e-3).tolist() == [True, True] + [False] * (R - 2)
    weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="q: the pre-trained weight holds NaN or Inf"):
        decompose_within(weight, torch.eye(N)[:R], "q")
