"""What only a GPU can show; skipped, with the reason, where there is none."""

import gc
import gzip
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sorsa_ds.config.deepspeed_json import resolve_ds_config
from sorsa_ds.config.schema import AdapterConfig, DataConfig, LoadingConfig, ResidualConfig, RunConfig, TrainConfig
from sorsa_ds.runtime.precision import resolve_precision
from sorsa_ds.sorsa.expert_layer import SorsaExperts
from sorsa_ds.sorsa.packed_storage import Int8, Nf4
from sorsa_ds.sorsa.residual_storage import Dense
from sorsa_ds.sorsa.routes import Routes
from tests.helpers.architectures import exactly, save
from tests.helpers.worlds import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
IDS = torch.arange(1, 25).view(2, 12) % 64


def _train(folder, stage, precision, steps=5):
    """Logits at step 0 and losses of a few steps on one GPU, with TF32 allowed as the trainer does."""
    from sorsa_ds.engine.engine import SorsaEngine
    from sorsa_ds.engine.optimizers import adamw
    from sorsa_ds.engine.schedules import cosine_with_warmup
    from sorsa_ds.model.sharding import Whole, Zero3
    from sorsa_ds.runtime.numerics import set_numerics
    from sorsa_ds.sorsa.regularizer import Regularizer
    from sorsa_ds.train.loss import summed_loss
    from tests.helpers.sorsa_models import load_sorsa_model

    set_numerics("cuda")
    device = torch.device("cuda", 0)
    ds = resolve_ds_config({"zero_optimization": {"stage": stage}}, TrainConfig(), 1, "cuda", precision).ds
    loaded = load_sorsa_model(
        folder, adapter=AdapterConfig(rank=5), precision=resolve_precision(precision, None, "cuda"),
        placement=Zero3(ds, device) if stage == 3 else Whole(device), device=device, factor_source=exactly,
    )  # fmt: skip
    engine = SorsaEngine(
        loaded.model, ds, adamw(3e-3, (0.9, 0.999), 1e-8, 0.0), cosine_with_warmup(steps, 0),
        Regularizer("norm", "mean", 0.2), loaded.exact_factors,
    )  # fmt: skip
    batch = {"input_ids": IDS.to(device), "attention_mask": torch.ones_like(IDS).to(device), "labels": IDS.to(device)}
    engine.eval()
    with torch.no_grad():
        logits = engine(batch["input_ids"]).logits.float().cpu()
    engine.train()
    losses = []

    def micro_batch():
        loss = summed_loss(engine, batch) / 22
        losses.append(loss.item())
        yield loss

    for _ in range(steps):
        report = engine.train_step(micro_batch())
    engine.destroy()
    return logits, losses, report.reg_loss


def _train_all(folder):
    """(stage, precision) -> the result of `_train`."""
    return {(s, p): _train(folder, s, p) for s in (0, 2, 3) for p in ("fp32", "mixed", "bf16")}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Every stage and precision, in one process that is spawned: pytest's own must not start CUDA."""
    folder = save("llama", tmp_path_factory.mktemp("gpu") / "llama")
    base = AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits.detach()
    return base, run_ranks(1, _train_all, folder, start="spawn")[0]


def test_step_0_equals_the_base_model_although_tf32_is_allowed(results):
    base, runs = results
    for (stage, precision), (logits, _, _) in runs.items():
        # TF32 keeps 10 bits, bf16 7; a residual taken in TF32 would be off by as much as the principal part is large.
        bound = 5e-3 if precision == "fp32" else 5e-2
        assert (logits - base).norm() < bound * base.norm(), f"stage {stage}, {precision}"


def _packed():
    """Relative distance of each storage's matrix on the GPU from the CPU's."""
    from sorsa_ds.sorsa.packed_storage import Int8, Nf4, Nf4Double

    torch.manual_seed(0)
    matrix, far = torch.randn(300, 501), {}
    for storage in (Nf4(64), Nf4Double(64), Int8(64)):
        here, there = (storage.dense(storage.pack(m), (300, 501), torch.float32).cpu() for m in (matrix, matrix.cuda()))
        far[type(storage).__name__] = ((there - here).norm() / here.norm()).item()
    return far


def test_a_packed_matrix_is_the_same_on_a_gpu():
    for name, far in run_ranks(1, _packed, start="spawn")[0].items():
        assert far < 5e-3, name  # a number between two levels may fall to the other side


def _products():
    """Relative distance of 4-bit products from those of the dense matrix, by storage and number of tokens."""
    from sorsa_ds.sorsa.packed_storage import Nf4, Nf4Double

    torch.manual_seed(0)
    matrix, far = torch.randn(384, 512, device="cuda"), {}
    for storage in (Nf4(64), Nf4Double(64)):
        kept = []
        for packed in storage.pack(matrix):
            buffer = torch.zeros(len(packed) + 3, dtype=torch.uint8, device="cuda")
            buffer[3:] = packed
            kept.append(buffer[3:])  # at any position, as ZeRO-3 gathers it
        for tokens in (1, 3, 16, 200, 2000):
            x = torch.randn(tokens, 512, device="cuda").bfloat16()
            expected = x.double() @ storage.dense(kept, (384, 512), torch.bfloat16).double().t()
            y = storage.linear(kept, x, 384, None)
            far[type(storage).__name__, tokens] = ((y.double() - expected).norm() / expected.norm()).item()
    return far


def test_a_fused_4_bit_product_is_that_of_the_dense_matrix():
    for case, far in run_ranks(1, _products, start="spawn")[0].items():
        assert far < 1e-2, case


def test_all_stages_train_alike_and_stay_orthonormal(results):
    _, runs = results
    for precision in ("fp32", "mixed", "bf16"):
        reference = runs[0, precision][1]
        for stage in (0, 2, 3):
            _, losses, reg_loss = runs[stage, precision]
            assert losses == pytest.approx(reference, rel=2e-2), f"stage {stage}, {precision}"
            assert losses[-1] < losses[0]
            assert 0 < reg_loss < 1


PLANNED = [
    (stage, precision, storage, checkpointing)
    for stage in (0, 2, 3)
    for precision, storage in (("mixed", "auto"), ("bf16", "auto"), ("mixed", "nf4"))
    for checkpointing in (False, True)
]


def _peaks(folder, cases):
    """Case -> (planned, allocated) bytes at the peak, each case beginning on an empty device."""
    found = {}
    for case in cases:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()  # the libraries' workspaces of the cases before
        planned, allocated = _peak(folder, *case)
        found[case] = planned, allocated - held
        print(f"{case}: planned {planned / 2**20:.0f} MiB, allocated {(allocated - held) / 2**20:.0f} MiB", flush=True)
    return found


def test_a_checkpoints_copies_are_of_the_step_at_which_they_were_taken():
    """The next optimizer step waits for them on the GPU; their page-locked memory is used again."""
    from sorsa_ds.run.checkpoint.host_copies import HostCopies

    held = torch.nn.Parameter(torch.zeros(2**26, device="cuda"))  # 256 MiB, some ten milliseconds on the bus
    held.grad = -torch.ones_like(held)
    optimizer = torch.optim.SGD([held], lr=1.0)
    host, places = HostCopies(optimizer), set()
    for step in range(4):
        copies, wait = host.take({"held": held.data, "on the host": torch.full((3,), float(step))})
        assert copies["held"].is_pinned()
        places.add(copies["held"].data_ptr())
        optimizer.step()
        wait()
        for copy in copies.values():
            assert copy.unique().tolist() == [step]
    assert len(places) == 1


def _peak(folder, stage, precision, storage, checkpointing):
    """(planned, allocated) bytes at the peak of a load and two steps on one device."""
    from sorsa_ds.engine.optimizers import adamw
    from sorsa_ds.engine.schedules import cosine_with_warmup
    from sorsa_ds.methods.registry import method_of
    from sorsa_ds.model.load import load_adapted_model
    from sorsa_ds.model.sharding import Whole, Zero3
    from sorsa_ds.plan.hardware import Hardware
    from sorsa_ds.plan.job import Job
    from sorsa_ds.plan.memory import memory
    from sorsa_ds.plan.model_facts import facts
    from sorsa_ds.runtime.device import this_device
    from sorsa_ds.sorsa.regularizer import Regularizer
    from sorsa_ds.train.loss import summed_loss
    from sorsa_ds.train.setup import checkpoint_activations

    config = RunConfig(
        adapter=AdapterConfig(rank=64), residual=ResidualConfig(storage=storage), data=DataConfig(max_length=512),
        train=TrainConfig(precision=precision, micro_batch_size=4, gradient_checkpointing=checkpointing),
    )  # fmt: skip
    zero = {"stage": stage, "reduce_bucket_size": 10**7}
    job, device = Job.of(config, {"zero_optimization": zero}, Hardware()), this_device()
    needed = memory(job, facts(folder, job))
    loaded = load_adapted_model(
        folder, method_of(config).operation(config, job.precision, job.storage, device),
        loading=LoadingConfig(), device=device,
        placement=Zero3(job.resolved.ds, device) if stage == 3 else Whole(device),
    )  # fmt: skip
    if checkpointing:
        checkpoint_activations(loaded.model)
    engine = method_of(config).engine(config, 2)(
        loaded.model, job.resolved.ds, adamw(1e-4, (0.9, 0.999), 1e-8, 0.0), cosine_with_warmup(2, 0),
        Regularizer("norm", "mean", 0.2), loaded.exact_factors,
    )  # fmt: skip
    loaded.exact_factors.clear()
    ids = torch.randint(0, 8192, (4, 512), device=device)
    mask = torch.ones_like(ids)
    mask[0, 500:] = 0  # padding, as in the batches of a run
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    for _ in range(2):
        engine.train_step(summed_loss(engine, batch) / ids.numel() for _ in range(1))
    allocated = torch.cuda.max_memory_allocated()
    engine.destroy()
    return needed.total - needed.gpu["context"], allocated


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """A Llama of 100 million parameters: buffers and activations weigh more than what an allocator rounds up."""
    folder = tmp_path_factory.mktemp("gpu") / "larger"
    shape = LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=6, num_attention_heads=16, num_key_value_heads=8,
        vocab_size=8192, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def peaks(larger, tmp_path_factory):
    """Case -> (planned, allocated) bytes, all cases in one spawned process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SORSA_CACHE", str(tmp_path_factory.mktemp("cache")))
        return run_ranks(1, _peaks, larger, PLANNED, start="spawn")[0]


@pytest.mark.parametrize("case", PLANNED, ids=str)
def test_the_peak_is_the_planned_one(peaks, case):
    planned, allocated = peaks[case]
    assert planned == pytest.approx(allocated, rel=0.1)


@pytest.mark.parametrize("form", ["loop", "grouped", "batched"])
@pytest.mark.parametrize("storage", [Dense(torch.bfloat16), Nf4(64), Int8(64)], ids=["bf16", "nf4", "int8"])
def test_experts_compute_on_the_gpu_what_they_compute_in_fp64(form, storage):
    """Expert 3 gets no row. In bf16 at rank 8, `grouped` goes through PyTorch's kernel."""
    torch.manual_seed(0)
    experts, m, n, r = 5, 64, 128, 8
    chosen = torch.tensor([0, 4, 1, 2]).repeat(30).view(-1, 2)
    layer = SorsaExperts(experts, n, m, r, storage=storage, factor_dtype=torch.float32)
    packed = [storage.pack(matrix) for matrix in torch.randn(experts, m, n)]
    with torch.no_grad():
        for factor in (layer.U, layer.s, layer.V):
            factor.copy_(torch.randn_like(factor))
        for name, tensors in zip(storage.names, zip(*packed, strict=True), strict=True):
            setattr(layer, name, torch.nn.Parameter(torch.stack(tensors), requires_grad=False))
    rests = [storage.dense(tensors, (m, n), torch.float64) for tensors in packed]
    x = torch.randn(chosen.numel(), n, dtype=torch.bfloat16)
    routes, order = Routes.of(chosen, experts, form)
    U, s, V = (factor.detach().double().requires_grad_() for factor in (layer.U, layer.s, layer.V))
    x64 = x[order].double().requires_grad_()
    wanted = torch.stack([
        (rests[e] + U[e] @ s[e].diag() @ V[e].T) @ row for e, row in zip(routes.expert.tolist(), x64, strict=True)
    ])  # fmt: skip
    inputs = torch.autograd.grad(wanted.square().sum(), (x64, U, s, V))

    layer.cuda()
    own = x[order].cuda().requires_grad_()
    there, _ = Routes.of(chosen.cuda(), experts, form)
    torch.use_deterministic_algorithms(True)
    try:
        found = layer(own, there)
        found.float().square().sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert (found.double().cpu() - wanted).norm() < 0.02 * wanted.norm()
    for ours, theirs in zip((own, layer.U, layer.s, layer.V), inputs, strict=True):
        assert (ours.grad.double().cpu() - theirs).norm() < 0.03 * theirs.norm()
    assert not layer.U.grad[3].any() and not layer.s.grad[3].any() and not layer.V.grad[3].any()


def _metered(folder):
    """What the meter says of a step of products on the GPU, of which it is told as of a trainer's, and its trace."""
    from sorsa_ds.plan.utilisation import peak_of
    from sorsa_ds.runtime.step_clock import StepClock
    from sorsa_ds.train.ready_step import ReadyStep
    from sorsa_ds.train.step_meter import StepMeter

    clock = StepClock(torch.device("cuda", 0))
    a = torch.randn(4096, 4096, device="cuda")
    found = []
    for traced in (False, True):
        train = TrainConfig(profile_steps=1, profile_trace=traced)
        meter = StepMeter(train, peak_of(["a GPU"], tf32=False), clock, folder, 0, 4)
        for number in range(4):
            with meter.step(number):
                for part, products in (("data", 0), ("forward", 10), ("backward", 20), ("step", 0)):
                    clock.enter(part)
                    for _ in range(products):
                        a @ a
                clock.leave()
                a[0, 0].item()
        found.append(meter.figures(ReadyStep([], 1, 1, 1)))
    return found


def test_the_parts_of_a_step_are_the_gpus_time(tmp_path):
    [found] = run_ranks(1, _metered, tmp_path, start="spawn")
    for one in found:
        parts = [one[f"step_seconds/{part}"] for part in ("data", "forward", "backward", "step", "rest")]
        assert sum(parts) == pytest.approx(one["step_seconds"], rel=1e-3)
        assert parts[2] == pytest.approx(2 * parts[1], rel=0.3) and parts[1] > 0.2 * one["step_seconds"]
        assert one["step_seconds/collectives"] == 0
    with gzip.open(tmp_path / "profile" / "step-000004.rank-0.json.gz") as file:
        assert any(event.get("cat") == "kernel" for event in json.load(file)["traceEvents"])
