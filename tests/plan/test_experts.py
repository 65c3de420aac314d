"""The plan of mixtures of experts against live tensors, counted flops and bytes of real engines."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from benchmarks.helpers.live_bytes import LiveBytes
from sorsa_ds.config.schema import AdapterConfig, ResidualConfig, RunConfig, SorsaConfig, TrainConfig
from sorsa_ds.methods.registry import method_of
from sorsa_ds.model.fill import TRIM_BYTES
from sorsa_ds.model.load import load_adapted_model
from sorsa_ds.model.pretrained import REOPEN_BYTES
from sorsa_ds.model.sharding import Zero3
from sorsa_ds.model.sorsa_recipe import working_set
from sorsa_ds.plan.hardware import Hardware
from sorsa_ds.plan.job import Job
from sorsa_ds.plan.memory import memory
from sorsa_ds.plan.model_facts import bare_model, facts
from sorsa_ds.plan.report import as_text, plan
from sorsa_ds.plan.shapes import shipped
from sorsa_ds.plan.speed import densified, flops
from sorsa_ds.plan.traffic import traffic
from sorsa_ds.runtime.memory import GIB
from sorsa_ds.sorsa import expert_layer
from sorsa_ds.sorsa.expert_layer import SorsaExperts
from sorsa_ds.sorsa.routes import Routes
from tests.helpers.engines import ds_config
from tests.helpers.expert_models import EXPERT_CONFIGS, MIXTURES, save_experts
from tests.helpers.plans import bytes_saved, job_of, live_bytes, live_flops, live_gathered, live_moved, live_saved
from tests.helpers.worlds import run_ranks

LIVE = {
    "mixtral": [(3, "mixed", "nf4")],
    "qwen3_moe": [(1, "mixed", "nf4_double")],
    "gpt_oss": [(3, "bf16", "int8")],
}
MIXTRAL = "mistralai/Mixtral-8x7B-v0.1"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: save_experts(name, tmp_path_factory.mktemp("experts") / name) for name in LIVE}


@pytest.fixture(scope="module")
def mixtral():
    """Mixtral 8x7B without memory, over nf4 on one GPU; and what a plan needs of it."""
    config = RunConfig(
        model=MIXTRAL, residual=ResidualConfig(storage="nf4"),
        train=TrainConfig(micro_batch_size=1, gradient_checkpointing=True),
    )  # fmt: skip
    job = Job.of(config, {"zero_optimization": {"stage": 0}}, Hardware(memory_bandwidth=3000.0))
    return job, facts(shipped(MIXTRAL), job)


@pytest.mark.slow
@pytest.mark.parametrize("name", LIVE)
def test_parameters_residual_and_optimizer_are_the_live_tensors_bytes(folders, name):
    found = run_ranks(2, live_bytes, folders[name], LIVE[name])
    for i, (stage, precision, storage) in enumerate(LIVE[name]):
        job = job_of(stage, precision, storage, gpus=2)
        planned = memory(job, facts(folders[name], job)).gpu
        for kind in ("residual", "frozen", "trained", "masters", "moments"):
            largest = max(rank[i].get(kind, 0) for rank in found)
            assert planned[kind] == largest, (stage, precision, storage, kind)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "precision"), [("mixtral", "mixed"), ("qwen3_moe", "fp32"), ("gpt_oss", "fp32"), ("gpt_oss", "mixed")]
)
def test_what_is_kept_for_backward_is_what_autograd_saves(folders, name, precision):
    job = job_of(0, precision, length=60)
    kept = facts(folders[name], job).kept
    assert kept.counted and kept.routed == 2
    [saved] = run_ranks(1, live_saved, folders[name], 60, precision)
    assert kept.rest + sum(kept.blocks) == pytest.approx(saved, rel=0.1)


@pytest.mark.parametrize("method", ["full", "partial"])
def test_what_the_models_own_experts_keep_is_what_autograd_saves(folders, method):
    """Of trained experts their rows, of frozen ones nothing but what their activation needs."""
    job = job_of(0, length=60)
    config = replace(job.config, method=method, adapter=AdapterConfig(targets=["q_proj"]))
    kept = facts(folders["mixtral"], replace(job, config=config)).kept
    model = AutoModelForCausalLM.from_pretrained(folders["mixtral"]).train()
    model.requires_grad_(method == "full")
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.requires_grad_(True)
    assert kept.counted
    assert kept.rest + sum(kept.blocks) == pytest.approx(bytes_saved(model, 60), rel=0.1)


@pytest.mark.parametrize("name", MIXTURES)
def test_every_family_is_counted_and_none_is_guessed(tmp_path, name):
    """Whatever the experts' residual, and whether they are adapted; of DBRX, frozen ones look at the tokens."""
    EXPERT_CONFIGS[name].save_pretrained(tmp_path)
    frozen = AdapterConfig(rank=5, experts="frozen")
    for precision, storage in (("fp32", "auto"), ("mixed", "nf4_double")):
        job = job_of(0, precision, storage)
        adapted = facts(tmp_path, job)
        assert adapted.kept.counted
        assert adapted.kept.routed == {"llama4": 4}.get(name, 2)
        left = facts(tmp_path, replace(job, config=replace(job.config, adapter=frozen)))
        assert left.kept.counted is (name != "dbrx") and left.kept.routed == adapted.kept.routed
        assert left.frozen == adapted.frozen == sum(p.numel() for p in bare(tmp_path))


def bare(folder):
    """The parameters of a model before anything is replaced."""
    job = job_of(0)
    found: list[torch.nn.Parameter] = []
    bare_model(folder, job, lambda model: found.extend(model.parameters()))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", LIVE)
def test_flops_are_those_of_the_products(folders, name):
    job = job_of(0, length=20)
    found, tokens = facts(folders[name], job), job.tokens
    [counted] = run_ranks(1, live_flops, folders[name], 20)
    attention = 3 * tokens * 2 * 20 * 32 * 2  # queries of 4 heads x 8, in 2 blocks
    if name == "gpt_oss":
        attention = -attention  # its products are counted as such: the whole square, of which the plan has the half
    first = [t for t in found.targets if t.name.startswith("model.layers.0.self_attn") and "o_proj" not in t.name]
    spared = tokens * sum(2 * t.out_features * t.in_features + 2 * t.rank * t.in_features for t in first)
    head = tokens // 20 * 4 * 32 * 64  # the last position has no label, so its logits are not made
    router = 2 * 4 * tokens * 32 * {"gpt_oss": 4}.get(name, 12)  # two blocks, forward and the input's gradient
    assert flops(job, found) - attention - spared - head + router == pytest.approx(counted, rel=1e-6)


@pytest.mark.slow
def test_bytes_over_the_wire_are_those_of_the_collectives(folders):
    counted = run_ranks(2, live_moved, folders["mixtral"], False)[0]
    job = job_of(3, gpus=2, gradient_accumulation_steps=2)
    moved = traffic(job, facts(folders["mixtral"], job)).inside
    gathers = moved["frozen parameters"] + moved["trained parameters"]
    # The first block's norm is gathered for the backward pass too, since the block's input needs a gradient.
    assert 0.95 * gathers < counted["gather"] <= 1.001 * gathers
    assert moved["Gram matrices"] == pytest.approx(counted["gram"], rel=0.3)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "limit", "checkpointing"), [("mixtral", 12_000, False), ("gpt_oss", 0, True)])
def test_what_zero3_holds_whole_is_not_more_than_planned(folders, name, limit, checkpointing):
    zero = {"stage3_max_live_parameters": limit, "stage3_max_reuse_distance": limit,
            "stage3_prefetch_bucket_size": limit // 10}  # fmt: skip
    job = job_of(3, gpus=2, zero=zero, gradient_checkpointing=checkpointing)
    found = facts(folders[name], job)
    planned = memory(job, found).gpu["gathered"] - found.gathers.joined
    (held, whole), *_ = run_ranks(2, live_gathered, folders[name], zero, checkpointing)
    assert held <= planned < 1.6 * held, whole


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """One block with eight experts whose weights outweigh the rest; in fp32, each expert stored by itself."""
    folder = tmp_path_factory.mktemp("larger")
    shape = MixtralConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, num_local_experts=8,
    )  # fmt: skip
    torch.manual_seed(0)
    MixtralForCausalLM(shape).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("storage", "together"), [("nf4", 3), ("int8", 3), ("nf4_double", 4)])
def test_the_matrices_that_are_dense_at_once_are_planned(larger, monkeypatch, storage, together):
    """Against the live bytes of a forward pass of which three experts' matrices fit together."""
    m, n, experts = 512, 128, 8
    monkeypatch.setattr(expert_layer, "DENSE_BYTES", 3 * m * n * 4 + 100)
    job = job_of(0, "fp32", storage)
    planned = memory(job, facts(larger, job)).gpu["dense weight"]
    assert planned == together * m * n * 4
    layer = SorsaExperts(experts, n, m, 4, storage=job.storage)
    with torch.no_grad():
        packed = [job.storage.pack(matrix) for matrix in torch.randn(experts, m, n)]
        for name, tensors in zip(job.storage.names, zip(*packed, strict=True), strict=True):
            getattr(layer, name).copy_(torch.stack(tensors))
        x, routes = torch.randn(2 * experts, n), Routes.even(2 * experts, experts, torch.device("cpu"), "loop")
        layer(x, routes)  # makes the tables of codes
        with LiveBytes() as live:
            layer(x, routes)
    assert planned < live.peak < 1.3 * planned


def test_a_residual_in_another_dtype_is_cast_whole(larger):
    job = job_of(0, "mixed", "fp32")
    assert memory(job, facts(larger, job)).gpu["dense weight"] == 8 * 512 * 128 * 2
    job = job_of(0, "mixed")
    assert memory(job, facts(larger, job)).gpu["dense weight"] == 0


def _initialised(folder, cases):
    """The most bytes that are alive while the model is made, for each case."""
    found = []
    for job in cases:
        method = method_of(job.config)
        with LiveBytes() as live:
            load_adapted_model(
                folder, method.operation(job.config, job.precision, job.storage, torch.device("cpu")),
                loading=job.config.loading, device=torch.device("cpu"),
                placement=Zero3(ds_config(3, "", 0.0, 1), torch.device("cpu")), dtype=job.precision.residual_dtype,
            )  # fmt: skip
        found.append(live.peak)
    return found


@pytest.mark.slow
def test_what_a_rank_holds_while_experts_are_made_is_planned(larger):
    """The largest stack is made first, when no shard is there yet. Where it is packed, reading takes the most: what is
    planned for that is two copies in fp32, since it does not depend on the dtype of the files."""
    cases = []
    for precision, storage in (("fp32", "auto"), ("mixed", "auto"), ("mixed", "nf4"), ("fp32", "int8")):
        job = job_of(3, precision, storage, gpus=2)
        cases.append(
            replace(job, config=replace(job.config, adapter=AdapterConfig(rank=5), sorsa=SorsaConfig(svd_cache="off")))
        )
    ranks = run_ranks(2, _initialised, larger, cases)
    for case, job in enumerate(cases):
        target = max(facts(larger, job).targets, key=lambda one: one.numel)
        working = working_set(target, job.config.sorsa, job.storage) - TRIM_BYTES - REOPEN_BYTES
        held = max(peaks[case] for peaks in ranks)
        assert 0.7 * working < held < working + 4 * target.numel, job.storage


@pytest.mark.slow
def test_mixtral_takes_what_its_shape_says(mixtral):
    job, found = mixtral
    attention, stacks = 2 * 4096**2 + 2 * 4096 * 1024, 3 * 8 * 4096 * 14336
    assert found.frozen == 32 * (attention + stacks + 8 * 4096 + 2 * 4096) + 4096 + 2 * 32000 * 4096 == 46_702_792_704
    factors = 16 * (2 * (4096 + 4096 + 1) + 2 * (4096 + 1024 + 1)) + 8 * 8 * (28672 + 4096 + 1 + 4096 + 14336 + 1)
    assert found.trainable == 32 * factors
    needed = memory(job, found).gpu
    assert needed["residual"] == 32 * (attention + stacks) * 9 // 16  # 4 bits, and an fp32 scale for 64 numbers
    assert needed["dense weight"] == 4 * 28672 * 4096 * 2  # four of the eight fit into a GiB
    assert needed["regulariser"] == 8 * 3 * 2 * 32 * (4 * 16**2 + 2 * 8 * 8**2)
    assert found.widest == 2 * 28672
    assert densified(job, found) == 3 * 32 * (attention + stacks) * (9 / 16 + 2)


@pytest.mark.slow
def test_only_the_chosen_experts_compute(mixtral):
    job, found = mixtral
    every = replace(found, kept=replace(found.kept, routed=8))
    weights, adapters = 3 * 4096 * 14336, 8 * (28672 + 4096 + 4096 + 14336)
    # Forward, again, and the input's gradient; of an adapter its own gradient too. Six more experts for each token.
    spent = 6 * job.tokens * 32 * 2 * (3 * weights + 4 * adapters)
    assert flops(job, every) - flops(job, found) == spent * job.resolved.gradient_accumulation_steps


@pytest.mark.slow
def test_a_plan_says_what_is_adapted(mixtral):
    job, _ = mixtral
    text = as_text(plan(shipped(MIXTRAL), job))
    assert "\n  adapted     128 linears, the weights of 8 experts x 64; 100.0% of the weights between" in text
    assert memory(*mixtral).total < 60 * GIB
