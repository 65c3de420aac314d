"""The packed residual: its numbers by hand, the layer over it, ZeRO-3's shards of it, and training on every stage."""

import weakref

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import sorsa_ds.sorsa.residual_storage
from sorsa_ds.config.schema import AdapterConfig, ResidualConfig
from sorsa_ds.model.sharding import Whole
from sorsa_ds.runtime.precision import resolve_precision
from sorsa_ds.sorsa.decompose import residual as rest_of
from sorsa_ds.sorsa.layer import SorsaLinear
from sorsa_ds.sorsa.packed_storage import Int8, Nf4, Nf4Double
from sorsa_ds.sorsa.residual_storage import Dense, resolve_residual, resolve_storage
from tests.helpers.architectures import exactly, save
from tests.helpers.engines import (
    CASES,
    INPUT,
    build,
    compare,
    ds_config,
    logits_and_gradients,
    micro_losses,
    sequences,
    whole_factors,
)
from tests.helpers.residuals import LEVELS, PACKED, nf4_by_hand, packed_of, residuals_by_hand
from tests.helpers.sorsa_models import load_sorsa_model, sorsa_layers
from tests.helpers.worlds import run_ranks

CPU = torch.device("cpu")
SHAPES = [(64, 64), (20, 40), (9, 7), (1, 1), (33, 65), (3, 5000)]


def relative(a, b) -> float:
    """Relative Frobenius distance."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def blocks_of(matrix, size):
    """The matrix in float64, a row a block, filled with zeros."""
    flat = matrix.double().numpy().ravel()
    return np.pad(flat, (0, -len(flat) % size)).reshape(-1, size)


def dense_of(storage, matrix, dtype=torch.float32):
    """A matrix through pack and back."""
    return storage.dense(storage.pack(matrix), tuple(matrix.shape), dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", PACKED)
def test_packed_tensors_are_as_announced(name, shape):
    torch.manual_seed(0)
    storage, matrix = PACKED[name], torch.randn(shape)
    made, said = storage.pack(matrix), storage.tensors(torch.Size(shape))
    assert tuple(said) == storage.names
    assert [(t.shape, t.dtype) for t in made] == list(said.values())
    assert {t.dtype for t in made} == {torch.uint8}
    blocks = -(-matrix.numel() // 64)
    bits = {"nf4": 64 * 4 + 32, "nf4_double": 64 * 4 + 8, "int8": 64 * 8 + 32}[name]
    scales_of_scales = 4 * (1 + -(-blocks // 256)) if name == "nf4_double" else 0
    assert sum(t.numel() for t in made) == blocks * bits // 8 + scales_of_scales


@pytest.mark.parametrize("size", [64, 256, 1024])
@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_is_the_nearest_level_of_each_block(shape, size):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    blocks = blocks_of(matrix, size)
    absmax = np.abs(blocks).max(1, keepdims=True)
    nearest = LEVELS[np.abs(blocks[..., None] / absmax[..., None] - LEVELS).argmin(-1)] * absmax
    expected = torch.from_numpy(nearest.ravel()[: matrix.numel()].reshape(shape))
    storage = Nf4(size)
    torch.testing.assert_close(dense_of(storage, matrix).double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(nf4_by_hand(storage.pack(matrix), shape, size), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_the_nearest_of_255_even_levels(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    blocks = blocks_of(matrix, 64)
    absmax = np.abs(blocks).max(1, keepdims=True)
    kept = blocks_of(dense_of(Int8(64), matrix), 64)
    step = absmax / 127
    assert (np.abs(kept - blocks) <= 0.505 * step).all()  # bitsandbytes looks levels up in a table of its own
    assert (np.abs(kept / step - (kept / step).round()) < 1e-3).all()


def test_double_quantised_scales_lose_little():
    torch.manual_seed(0)
    matrix = torch.randn(300, 500) * torch.linspace(0.5, 2, 500)
    single, double = dense_of(Nf4(64), matrix), dense_of(Nf4Double(64), matrix)
    assert not torch.equal(single, double)
    assert relative(double, single) < 0.01
    assert relative(double, matrix) < 1.02 * relative(single, matrix)


@pytest.mark.parametrize("name", PACKED)
def test_any_dtype_is_the_rounded_matrix_and_zeros_stay(name):
    torch.manual_seed(0)
    storage, matrix = PACKED[name], torch.randn(20, 41)
    wide = dense_of(storage, matrix)
    assert torch.equal(dense_of(storage, matrix, torch.float64), wide.double())
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(dense_of(storage, matrix, dtype), wide.to(dtype))
    assert torch.equal(dense_of(storage, torch.zeros(9, 9)), torch.zeros(9, 9))
    assert torch.equal(dense_of(storage, matrix.t().contiguous().t()), wide), "another memory layout, the same matrix"


@pytest.mark.parametrize("name", PACKED)
def test_large_matrices_are_packed_piece_by_piece(name, monkeypatch):
    torch.manual_seed(0)
    matrix = torch.randn(40, 77)
    whole = PACKED[name].pack(matrix)
    monkeypatch.setattr("sorsa_ds.sorsa.packed_storage._CHUNK", 1024)
    assert all(torch.equal(a, b) for a, b in zip(PACKED[name].pack(matrix), whole, strict=True))


@pytest.mark.parametrize("name", PACKED)
def test_packed_tensors_may_lie_anywhere_in_a_buffer(name):
    torch.manual_seed(0)
    storage, matrix = PACKED[name], torch.randn(20, 40)
    buffers = [torch.cat([torch.zeros(3, dtype=torch.uint8), tensor]) for tensor in storage.pack(matrix)]
    assert torch.equal(storage.dense([b[3:] for b in buffers], (20, 40), torch.float32), dense_of(storage, matrix))


def quantised_layer(storage, m=30, n=70, r=4, dtype=torch.float64, bias=True):
    """A layer with random factors over a packed random residual."""
    torch.manual_seed(0)
    layer = SorsaLinear(n, m, r, bias=bias, scale=0.7, storage=storage, factor_dtype=dtype, bias_dtype=dtype)
    for parameter in (layer.U, layer.s, layer.V, *([layer.bias] if bias else [])):
        torch.nn.init.normal_(parameter)
    for leaf, packed in zip(storage.names, storage.pack(torch.randn(m, n)), strict=True):
        getattr(layer, leaf).data.copy_(packed)
    return layer


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", PACKED)
def test_a_product_is_that_of_the_dense_matrix(name, dtype, bias):
    storage = PACKED[name]
    for m, n in ((30, 128), (3, 192), (30, 70)):  # 70 is no multiple of the block: made dense on every device
        matrix, x = torch.randn(m, n), torch.randn(5, n).to(dtype)
        kept = [_in_a_buffer(t, offset=3) for t in storage.pack(matrix)]
        shift = torch.randn(m).to(dtype) if bias else None
        dense = storage.dense(kept, (m, n), dtype).double()
        expected = x.double() @ dense.t() + (shift.double() if bias else 0)
        assert relative(storage.linear(kept, x, m, shift), expected) < (1e-2 if dtype == torch.bfloat16 else 1e-6)


def test_a_4_bit_product_is_left_to_bitsandbytes(monkeypatch):
    calls, ops = [], sorsa_ds.sorsa.packed_storage._ops()

    class Watched:
        def gemm_4bit(self, *arguments):
            calls.append(arguments)
            return ops.gemm_4bit(*arguments)

    monkeypatch.setattr("sorsa_ds.sorsa.packed_storage._ops", Watched)
    for storage in (PACKED["nf4"], PACKED["nf4_double"]):
        kept = [_in_a_buffer(t, offset=3) for t in storage.pack(torch.randn(30, 128))]
        storage.linear(kept, torch.randn(5, 128), 30, None)
        storage.linear(storage.pack(torch.randn(30, 70)), torch.randn(5, 70), 30, None)
    assert len(calls) == 2
    assert all(call[1].data_ptr() % 16 == 0 for call in calls)


def _in_a_buffer(packed, offset):
    """Copy the bytes to another place of a larger buffer, as ZeRO-3 gathers them."""
    buffer = torch.zeros(len(packed) + offset, dtype=torch.uint8)
    buffer[offset:] = packed
    return buffer[offset:]


@pytest.mark.parametrize("name", PACKED)
def test_the_layer_equals_a_dense_one_over_the_dequantised_matrix(name):
    layer = quantised_layer(PACKED[name])
    kept = [getattr(layer, leaf).data for leaf in layer.storage.names]
    if name == "nf4":
        rest = nf4_by_hand(kept, (30, 70)).float().double()
    else:
        rest = layer.storage.dense(kept, (30, 70), torch.float32).double()
    x = torch.randn(2, 6, 70, dtype=torch.float64, requires_grad=True)
    pull = torch.randn(2, 6, 30, dtype=torch.float64)
    weight = rest + 0.7 * layer.U @ torch.diag(layer.s) @ layer.V.T
    expected = torch.nn.functional.linear(x, weight, layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-5)
    wanted = [x, layer.U, layer.s, layer.V]
    ours = torch.autograd.grad((layer(x) * pull).sum(), wanted)
    theirs = torch.autograd.grad((expected * pull).sum(), wanted)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-5)
    assert all(getattr(layer, leaf).grad is None for leaf in layer.storage.names)


@pytest.mark.parametrize("storage", [Dense(torch.float32), *PACKED.values()])
def test_no_tokens_at_all_go_through_as_through_a_linear(storage):
    layer = quantised_layer(storage, dtype=torch.float32)
    for shape in ((0, 70), (2, 0, 70)):  # an expert that no token was sent to
        x = torch.randn(shape, requires_grad=True)
        layer(x).sum().backward()
        assert layer(x).shape == (*shape[:-1], 30) and x.grad.shape == shape
        assert not any(factor.grad.any() for factor in (layer.U, layer.s, layer.V))


@pytest.mark.parametrize(("features", "in_forward"), [(70, 1), (128, 0)])  # 128: the product is bitsandbytes' own
def test_nothing_dense_is_kept_for_backward(monkeypatch, features, in_forward):
    layer = quantised_layer(PACKED["nf4"], n=features, dtype=torch.float32)
    kept, made, matrix = [], [], sorsa_ds.sorsa.packed_storage._matrix

    def watched(*arguments):
        dense = matrix(*arguments)
        made.append(weakref.ref(dense))
        return dense

    monkeypatch.setattr("sorsa_ds.sorsa.packed_storage._matrix", watched)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(torch.randn(5, features, requires_grad=True))
    assert [ref() for ref in made] == [None] * in_forward
    y.sum().backward()
    assert [ref() for ref in made] == [None] * (in_forward + 1)
    parameters = {p.data_ptr() for p in layer.parameters()}
    assert sorted(t.numel() for t in kept if t.data_ptr() not in parameters) == sorted([5 * features, 5 * 4])
    assert sum(t.numel() for t in kept if t.dtype == torch.uint8) < 0.6 * 30 * features + 200


def loaded_whole(folder, storage, precision="fp32"):
    """The quantised model in one process."""
    return load_sorsa_model(
        folder, adapter=AdapterConfig(rank=5), storage=storage, device=CPU,
        precision=resolve_precision(precision, None, "cpu"), placement=Whole(CPU), factor_source=exactly,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model with biases; no size of its matrices is a multiple of the block."""
    return save("qwen2", tmp_path_factory.mktemp("model") / "qwen2")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny Llama, whose linears have no biases."""
    return save("llama", tmp_path_factory.mktemp("model") / "llama")


@pytest.mark.parametrize("name", PACKED)
def test_a_loaded_model_holds_the_packed_residuals(folder, name):
    model = loaded_whole(folder, PACKED[name]).model
    base = AutoModelForCausalLM.from_pretrained(folder)
    for path, layer in sorsa_layers(model).items():
        weight = base.get_submodule(path).weight.detach()
        with torch.no_grad():
            expected = PACKED[name].pack(rest_of(weight, layer))
        for leaf, tensor in zip(PACKED[name].names, expected, strict=True):
            assert torch.equal(getattr(layer, leaf), tensor), f"{path}.{leaf}"
    with torch.no_grad():
        gap = relative(model.eval()(INPUT).logits, base.eval()(INPUT).logits)
    assert 1e-4 < gap < (0.03 if name == "int8" else 0.3)


ZERO3 = {"train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0.0, "zero_allow_untested_optimizer": True,
         "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100}}  # fmt: skip


def _zero3(folder, names, checkpointing):
    """Per storage: bytes of this rank's blocks, the gathered tensors, logits, gradient norms after one backward."""
    import deepspeed

    from sorsa_ds.model.sharding import Zero3
    from sorsa_ds.train.setup import checkpoint_activations

    results = {}
    for name in names:
        loaded = load_sorsa_model(
            folder, adapter=AdapterConfig(rank=5), storage=PACKED[name], device=CPU,
            precision=resolve_precision("fp32", None, "cpu"), placement=Zero3(ZERO3, CPU), factor_source=exactly,
        )  # fmt: skip
        packed = {n: p for n, p in loaded.model.named_parameters() if p.dtype == torch.uint8}
        blocks = {n: (p.ds_tensor.nbytes, p.numel()) for n, p in packed.items()}
        if checkpointing:
            checkpoint_activations(loaded.model)
        logits, norms = logits_and_gradients(loaded.model, ZERO3)
        with deepspeed.zero.GatheredParameters(list(packed.values())):
            gathered = {n: p.detach().clone() for n, p in packed.items()}
        results[name] = blocks, gathered, logits, norms
    return results


@pytest.mark.slow
@pytest.mark.parametrize(("world", "checkpointing"), [(2, False), (3, True)])
def test_zero3_cuts_the_packed_tensors_and_computes_the_same(folder, world, checkpointing):
    ranks = run_ranks(world, _zero3, folder, list(PACKED), checkpointing)
    for name, storage in PACKED.items():
        model = loaded_whole(folder, storage).model.train()
        expected = packed_of(model)
        model(INPUT).logits.float().logsumexp(-1).mean().backward()
        gradients = [p.grad.norm().item() for p in model.parameters() if p.requires_grad]
        with torch.no_grad():
            alone = model.eval()(INPUT).logits
        for blocks, gathered, logits, norms in (rank[name] for rank in ranks):
            assert gathered.keys() == expected.keys()
            for tensor, values in gathered.items():
                assert torch.equal(values, expected[tensor]), f"{name}: {tensor}"
                assert blocks[tensor] == (-(-values.numel() // world), 0), f"{name}: {tensor} is not cut"
            assert relative(logits, alone) < 1e-5, name
            assert norms == pytest.approx(gradients, rel=1e-4, abs=1e-7), name


RUNS = [(stage, "", case) for stage in (0, 1, 2, 3) for case in CASES]
RUNS += [(2, "optimizer", CASES[0]), (3, "both", CASES[0])]


def _train(folder, precision, runs):
    """Per (stage, offload, case): masters at the start and the end, log, packed tensors at the start and the end."""
    import deepspeed

    from sorsa_ds.runtime import collectives

    results = []
    for stage, offload, case in runs:
        ds = ds_config(stage, offload, case["clip"], case["accumulation"], bf16=precision == "bf16")
        engine = build(folder, ds, case, precision, PACKED["nf4"])
        tensors = [p for p in engine.module.parameters() if p.dtype == torch.uint8]

        def packed(engine=engine, tensors=tensors, stage=stage):
            with deepspeed.zero.GatheredParameters(tensors, enabled=stage == 3):
                return packed_of(engine.module)

        start, before, log = whole_factors(engine), packed(), []
        for t in range(10):
            batch = sequences(2 * collectives.world_size() * case["accumulation"], seed=t)
            log.append(engine.train_step(micro_losses(engine, batch, case["accumulation"])))
        results.append((start, whole_factors(engine), log, before, packed()))
        engine.destroy()
    return results if collectives.rank() == 0 else None


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_ten_steps_equal_plain_torch_over_the_dequantised_residual(llama, world):
    results = run_ranks(world, _train, llama, "fp32", RUNS)[0]
    for (stage, offload, case), (start, end, log, before, after) in zip(RUNS, results, strict=True):
        residuals = residuals_by_hand(before, start)
        try:
            compare(llama, world, case, start, end, log, tolerance=1e-5, residuals=residuals)
        except AssertionError as error:
            raise AssertionError(f"stage {stage}, offload {offload!r}, {case}: {error}") from error
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.slow
def test_a_bf16_engine_leaves_codes_and_scales_alone(llama):
    stages = [(stage, "", CASES[0]) for stage in (0, 1, 2, 3)]
    expected = packed_of(loaded_whole(llama, PACKED["nf4"], "bf16").model)
    for (stage, *_), (_, _, log, before, after) in zip(
        stages, run_ranks(2, _train, llama, "bf16", stages)[0], strict=True
    ):
        assert before.keys() == after.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(before[name], tensor), f"stage {stage}: {name}"
            assert torch.equal(after[name], tensor), f"stage {stage}: {name}"
        assert all(np.isfinite(step.grad_norm) for step in log)


def test_auto_is_what_the_precision_says():
    for precision, name, dtype in (("fp32", "fp32", torch.float32), ("mixed", "bf16", torch.bfloat16)):
        formats = resolve_precision(precision, None, "cpu")
        assert resolve_residual(ResidualConfig(), formats).storage == name
        assert resolve_storage(ResidualConfig(), formats, CPU) == Dense(dtype)
    assert resolve_storage(ResidualConfig(storage="bf16"), resolve_precision("fp32", None, "cpu"), CPU) == Dense(
        torch.bfloat16
    )
    asked = ResidualConfig(storage="nf4_double", block_size=128)
    assert resolve_storage(asked, resolve_precision("mixed", None, "cpu"), CPU) == Nf4Double(128)


def test_what_cannot_be_is_refused_with_the_reason(monkeypatch):
    with pytest.raises(ValueError, match="fp32 does not go with precision bf16"):
        resolve_storage(ResidualConfig(storage="fp32"), resolve_precision("bf16", None, "cpu"), CPU)
    with pytest.raises(ValueError, match="2 rounds need a quantised residual.storage, not auto"):
        ResidualConfig(iterations=2)

    def without_kernel(*_, **__):
        raise NotImplementedError("no kernel for this device")

    monkeypatch.setattr("bitsandbytes.functional.quantize_blockwise", without_kernel)
    with pytest.raises(ValueError, match="residual.storage: int8 does not work on cpu: no kernel for this device"):
        resolve_storage(ResidualConfig(storage="int8"), resolve_precision("fp32", None, "cpu"), CPU)
