"""The plan against what really happens: live tensors of real engines, counted flops and bytes, published counts."""

from dataclasses import replace

import pytest

from sorsa_ds.config import deepspeed_sections
from sorsa_ds.config.schema import AdapterConfig, ResidualConfig, RunConfig, TrainConfig
from sorsa_ds.plan.configuration import configuration_of
from sorsa_ds.plan.hardware import Hardware
from sorsa_ds.plan.job import Job
from sorsa_ds.plan.memory import largest_bucket, memory
from sorsa_ds.plan.model_facts import facts
from sorsa_ds.plan.shapes import shipped
from sorsa_ds.plan.speed import flops, speed
from sorsa_ds.plan.traffic import traffic
from tests.helpers.architectures import save
from tests.helpers.plans import job_of, live_bytes, live_flops, live_moved, live_saved
from tests.helpers.worlds import run_ranks

LIVE = [
    (stage, precision, storage)
    for stage in range(4)
    for precision, storage in (
        ("fp32", "auto"), ("mixed", "auto"), ("bf16", "auto"), ("mixed", "fp32"),
        ("fp32", "nf4"), ("mixed", "nf4_double"), ("bf16", "int8"),
    )
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save("llama", tmp_path_factory.mktemp("plan"))


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_parameters_residual_and_optimizer_are_the_live_tensors_bytes(folder, world):
    found = run_ranks(world, live_bytes, folder, LIVE)
    for i, (stage, precision, storage) in enumerate(LIVE):
        job = job_of(stage, precision, storage, gpus=world)
        model = facts(folder, job)
        planned = memory(job, model).gpu
        if stage == 0:
            assert largest_bucket(model) * job.precision.factor_dtype.itemsize == found[0][i]["bucket"]
        for name in ("residual", "frozen", "trained", "masters", "moments"):
            largest = max(rank[i].get(name, 0) for rank in found)
            assert planned[name] == largest, (stage, precision, storage, name)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "packed"), [("fp32", False), ("mixed", False), ("mixed", True)])
def test_what_is_kept_for_backward_is_what_autograd_saves(folder, precision, packed):
    job = job_of(0, precision, length=200, packing=packed)
    kept = facts(folder, job).kept
    assert kept.counted and len(kept.blocks) == 2 and len(set(kept.blocks)) <= 2
    [saved] = run_ranks(1, live_saved, folder, 200, precision, packed)
    assert kept.rest + sum(kept.blocks) == pytest.approx(saved, rel=0.1)


def test_gradients_are_averaged_in_the_room_of_the_activations(folder):
    for rank, length, more in ((5, 200, False), (20, 8, True)):
        job = job_of(0, length=length, gradient_checkpointing=True)
        job = replace(job, config=replace(job.config, adapter=AdapterConfig(rank=rank)))
        needed, averaged = memory(job, facts(folder, job)).gpu, 4 * facts(folder, job).trainable
        beside = needed["activations"] + needed["logits"]
        assert (averaged > beside) is more
        assert needed["buffers"] == max(0, averaged - beside)


def test_checkpointing_keeps_inputs_and_one_block(folder):
    plain, again = (job_of(0, length=200, gradient_checkpointing=on) for on in (False, True))
    kept = facts(folder, plain).kept
    few, many = memory(again, facts(folder, again)).gpu, memory(plain, facts(folder, plain)).gpu
    backward = many["activations"] - kept.rest - sum(kept.blocks)
    assert backward > 0 and many["logits"] == plain.tokens * 64 * 12
    assert few["logits"] == 0  # gone when a block is made whole again, which here needs more
    assert few["activations"] == kept.rest + 2 * kept.inputs + max(kept.blocks) + backward


def test_a_model_whose_kernels_need_a_gpu_is_guessed_from_its_linears(folder, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no such kernel")

    job = job_of(0)
    counted = facts(folder, job).kept
    monkeypatch.setattr("transformers.LlamaForCausalLM.forward", broken)
    guessed = facts(folder, job).kept
    assert guessed.guessed == "no such kernel"
    assert 0.3 < sum(guessed.blocks) / sum(counted.blocks) < 3


def test_a_mistake_is_not_taken_for_a_kernel(folder, monkeypatch):
    monkeypatch.setattr("transformers.LlamaForCausalLM.forward", lambda *_: None)
    with pytest.raises(TypeError):
        facts(folder, job_of(0))


@pytest.mark.slow
def test_flops_are_those_of_the_products(folder):
    job = job_of(0, length=20)
    found = facts(folder, job)
    [counted] = run_ranks(1, live_flops, folder, 20)
    attention = 3 * job.tokens * 2 * 20 * 40 * 2  # queries of 4 heads x 10, in 2 blocks
    # The first block's input needs no gradient: one input gradient of q, k and v less.
    first = [t for t in found.targets if t.name.startswith("model.layers.0.self_attn") and "o_proj" not in t.name]
    spared = job.tokens * sum(2 * t.out_features * t.in_features + 2 * t.rank * t.in_features for t in first)
    head = job.tokens // 20 * 4 * 40 * 64  # the last position has no label, so its logits are not made
    assert flops(job, found) - attention - spared - head == pytest.approx(counted, rel=1e-6)


def test_attention_has_the_width_of_its_heads():
    config = RunConfig(model="google/gemma-7b", train=TrainConfig(micro_batch_size=1))
    job = Job.of(config, {}, Hardware())
    model, longer = facts(shipped(config.model), job), replace(config, data=replace(config.data, max_length=1024))
    assert model.attention == 16 * 256  # not the 3,072 of the hidden states
    half, whole = (flops(j, model) / j.tokens for j in (job, Job.of(longer, {}, Hardware())))
    assert whole - half == 3 * 2 * (1024 - 512) * 16 * 256 * 28


def test_packed_weights_are_made_dense_at_every_use():
    config = RunConfig(
        model="meta-llama/Meta-Llama-3-70B", adapter=AdapterConfig(rank=16), residual=ResidualConfig(storage="nf4"),
        train=TrainConfig(micro_batch_size=1, gradient_checkpointing=True),
    )  # fmt: skip
    job = Job.of(config, {}, Hardware(memory_bandwidth=3000.0))
    model = facts(shipped(config.model), job)
    # q and o, k and v, gate, up and down; 4 bits, an fp32 scale for 64 numbers, and 2 bytes that are written.
    weights = 80 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    expected = speed(job, model, traffic(job, model))
    assert expected.dense == pytest.approx(3 * weights * (1 / 2 + 4 / 64 + 2) / 3e12)
    assert expected.seconds == expected.compute + expected.dense
    dense = Job.of(replace(config, residual=ResidualConfig(storage="bf16")), {}, Hardware())
    assert speed(dense, model, traffic(dense, model)).dense == 0


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_bytes_over_the_wire_are_those_of_the_collectives(folder, checkpointing):
    counted = run_ranks(2, live_moved, folder, checkpointing)[0]
    job = job_of(3, gpus=2, gradient_accumulation_steps=2, gradient_checkpointing=checkpointing)
    moved = traffic(job, facts(folder, job)).inside
    gathers = moved["frozen parameters"] + moved["trained parameters"]
    # What was gathered last is still there for its backward: the head, and each recomputed block's last linear.
    assert (0.8 if checkpointing else 0.95) * gathers < counted["gather"] <= gathers
    assert moved["Gram matrices"] == pytest.approx(counted["gram"], rel=0.3)  # and the rows that ranks share


def test_what_crosses_nodes_comes_from_outside(folder):
    one, two = (job_of(3, gpus=4 // nodes, nodes=nodes) for nodes in (1, 2))
    alone, apart = (traffic(job, facts(folder, job)) for job in (one, two))
    assert not alone.between
    for name, size_inside in alone.inside.items():
        assert apart.inside[name] + apart.between[name] / 2 == pytest.approx(size_inside)
        assert apart.between[name] == pytest.approx(size_inside / (3 / 4) / 2)


@pytest.mark.parametrize(
    ("model", "rank", "trainable", "frozen"),
    [
        ("meta-llama/Llama-2-7b-hf", 128, 319_815_680, 6_738e6),
        ("mistralai/Mistral-7B-v0.1", 64, 167_786_496, 7_242e6),
        ("google/gemma-7b", 64, 200e6, 8_538e6),
        ("meta-llama/Meta-Llama-3-70B", 128, 1_656_821_760, 70_554e6),
        ("meta-llama/Llama-3.1-405B", 16, 623_458_080, 405_854e6),
    ],
)
def test_counts_are_the_published_ones_without_weights(model, rank, trainable, frozen):
    config = RunConfig(model=model, adapter=AdapterConfig(rank=rank), train=TrainConfig(micro_batch_size=1))
    job = Job.of(config, {"zero_optimization": {"stage": 0}}, Hardware())
    found = facts(configuration_of(model, config.loading), job)
    assert found.frozen == pytest.approx(frozen, rel=1e-3)
    assert found.trainable == pytest.approx(trainable, rel=2e-3)
    assert found.kept.counted


@pytest.mark.parametrize("key", deepspeed_sections.BUFFERS)
def test_auto_is_deepspeeds_default(folder, key):
    for stage in (2, 3):
        auto, absent = (Job.of(RunConfig(), {"zero_optimization": {"stage": stage, **zero}}, Hardware(gpus=2))
                        for zero in ({key: "auto"}, {}))  # fmt: skip
        assert memory(auto, facts(folder, auto)) == memory(absent, facts(folder, absent))


def test_an_encoder_is_no_causal_language_model(tmp_path):
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match='bert sees the tokens that it is to predict, without "is_decoder": true'):
        facts(tmp_path, job_of(0))
    config.write_text('{"model_type": "gpt_neox", "num_hidden_layers": 1}')  # says so too, and is one
    assert facts(tmp_path, job_of(0)).targets
