"""The plan against what really happens: live tensors of real engines, counted flops and bytes, published counts."""

import json
import subprocess
import sys
import weakref
from collections import Counter
from dataclasses import replace

import pytest
import torch
from architectures import save
from projects import ROOT, launch
from test_engine import CASES, MICRO, build, ds_config, micro_losses, sequences
from torch.utils.flop_counter import FlopCounterMode
from worlds import run_ranks

from sorsa_ds import cli
from sorsa_ds import ds_config as settings
from sorsa_ds.config import DataConfig, ResidualConfig, RunConfig, SorsaConfig, TrainConfig
from sorsa_ds.plan.command import configuration_of, size
from sorsa_ds.plan.facts import facts
from sorsa_ds.plan.job import GIB, Hardware, Job
from sorsa_ds.plan.memory import memory
from sorsa_ds.plan.report import as_text, plan
from sorsa_ds.plan.speed import flops
from sorsa_ds.plan.traffic import traffic
from sorsa_ds.residual import storage_of
from sorsa_ds.shapes import shipped

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


def job_of(stage, precision="fp32", storage="auto", gpus=1, nodes=1, length=12, zero=None, **train) -> Job:
    """A job for the tiny model as tests/test_engine.py builds it."""
    config = RunConfig(
        sorsa=SorsaConfig(rank=5), residual=ResidualConfig(storage=storage), data=DataConfig(max_length=length),
        train=TrainConfig(precision=precision, micro_batch_size=MICRO, **train),
    )  # fmt: skip
    given = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **(zero or {})}}
    return Job.of(config, given, Hardware(gpus=gpus, nodes=nodes))


def live(folder, cases):
    """Bytes of this rank's tensors by what they are, for each case, after two steps."""
    from sorsa_ds import comm

    results = []
    for stage, precision, storage in cases:
        job = job_of(stage, precision, storage)
        ds = ds_config(stage, "", 0.05, 1, precision == "bf16")
        if precision == "mixed":
            ds["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
        engine = build(folder, ds, CASES[0], precision, storage_of(job.config.residual, job.precision))
        for t in range(2):
            engine.train_step(micro_losses(engine, sequences(MICRO * comm.world_size(), seed=t), 1))
        results.append(bytes_by_kind(engine))
        engine.destroy()
    return results


def bytes_by_kind(engine) -> dict[str, int]:
    """Bytes of this rank's tensors after a step."""
    from sorsa_ds.masters import inner_optimizer

    found: Counter = Counter()
    places = {"residual": set(), "frozen": set(), "trained": set()}
    for name, p in engine.module.named_parameters():
        kind = "trained" if p.requires_grad else "residual" if ".residual" in name else "frozen"
        tensor = getattr(p, "ds_tensor", p.data)
        storage = tensor.untyped_storage()
        if kind != "trained" or hasattr(p, "ds_tensor"):
            found[kind] += tensor.nbytes
        elif storage.data_ptr() not in places[kind]:  # stages 1 and 2: views of one flat tensor
            places[kind].add(storage.data_ptr())
            found[kind] += storage.nbytes()
    state = inner_optimizer(engine).state
    for master in {id(f.master): f.master for f in engine.masters.fragments}.values():
        if master.untyped_storage().data_ptr() not in places["trained"]:
            found["masters"] += master.nbytes
        found["moments"] += sum(state[master][name].nbytes for name in ("exp_avg", "exp_avg_sq"))
    return dict(found)


@pytest.mark.parametrize("world", [1, 2])
def test_parameters_residual_and_optimizer_are_the_live_tensors_bytes(folder, world):
    found = run_ranks(world, live, folder, LIVE)
    for i, (stage, precision, storage) in enumerate(LIVE):
        job = job_of(stage, precision, storage, gpus=world)
        planned = memory(job, facts(folder, job)).gpu
        for name in ("residual", "frozen", "trained", "masters", "moments"):
            largest = max(rank[i].get(name, 0) for rank in found)
            assert planned[name] == largest, (stage, precision, storage, name)


def _saved(folder, length, precision):
    ds = ds_config(0, "", 0.0, 1)
    if precision == "mixed":
        ds["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return bytes_saved(build(folder, ds, CASES[0], precision), length)


def bytes_saved(engine, length: int) -> int:
    """Bytes that autograd holds at the end of a forward pass without the loss, each tensor once."""
    held = weakref.WeakSet()

    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor
            held.add(self)

    ids = torch.zeros(MICRO, length, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        # With padding, as the batches of a run: without any, k and v would not be repeated for every head.
        output = engine(input_ids=ids, attention_mask=(ids + torch.arange(length) < length - 3).long(), use_cache=False)
    storages = {(s := kept.tensor.untyped_storage()).data_ptr(): s.nbytes() for kept in held}
    del output
    return sum(size for place, size in storages.items() if place not in {p.data_ptr() for p in engine.parameters()})


@pytest.mark.parametrize("precision", ["fp32", "mixed"])
def test_what_is_kept_for_backward_is_what_autograd_saves(folder, precision):
    job = job_of(0, precision, length=200)
    kept = facts(folder, job).kept
    assert kept.counted and len(kept.blocks) == 2 and len(set(kept.blocks)) <= 2
    [saved] = run_ranks(1, _saved, folder, 200, precision)
    assert kept.rest + sum(kept.blocks) == pytest.approx(saved, rel=0.1)


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
    assert not guessed.counted
    assert 0.3 < sum(guessed.blocks) / sum(counted.blocks) < 3


def _flops(folder, length):
    """Of a step's matrix products, without attention's."""
    engine = build(folder, ds_config(0, "", 0.0, 1), CASES[0])
    ids = torch.zeros(MICRO, length, dtype=torch.int64)
    from sorsa_ds.objective import summed_loss

    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    # torch counts only the form of addmm that makes a new tensor
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, *__, **___: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        engine.backward(summed_loss(engine, batch))
    return sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))


def test_flops_are_those_of_the_products(folder):
    job = job_of(0, length=20)
    found = facts(folder, job)
    [counted] = run_ranks(1, _flops, folder, 20)
    attention = 3 * job.tokens * 2 * 20 * found.hidden * len(found.kept.blocks)
    # The first block's input needs no gradient: one input gradient of q, k and v less; the last position has no label.
    first = [t for t in found.targets if t.name.startswith("model.layers.0.self_attn") and "o_proj" not in t.name]
    spared = job.tokens * sum(2 * t.out_features * t.in_features + 2 * t.rank * t.in_features for t in first)
    assert flops(job, found) - attention - spared == pytest.approx(counted, rel=1e-6)


def _moved(folder, checkpointing):
    """Bytes that this rank receives in a step under ZeRO-3, from all-gathers and for the Gram matrices."""
    from deepspeed import comm as ds_comm

    from sorsa_ds import comm
    from sorsa_ds.assemble import checkpoint_activations

    counted: Counter = Counter()
    backend = ds_comm.comm.cdb
    ds = ds_config(3, "", 0.0, 2)
    ds["zero_optimization"] |= {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0,
                                "stage3_prefetch_bucket_size": 0, "stage3_param_persistence_threshold": 0}  # fmt: skip
    engine = build(folder, ds, CASES[0])
    if checkpointing:
        checkpoint_activations(engine.module)
    gather, reduce = backend.all_gather_function, torch.distributed.all_reduce

    def gathered(output_tensor, input_tensor, **options):
        counted["gather"] += output_tensor.nbytes - input_tensor.nbytes
        return gather(output_tensor, input_tensor, **options)

    def reduced(tensor, *arguments, **options):
        if tensor.dtype == torch.float64 and tensor.numel() > 100:
            counted["gram"] += tensor.nbytes
        return reduce(tensor, *arguments, **options)

    backend.all_gather_function = gathered
    torch.distributed.all_reduce = reduced
    try:
        engine.train_step(micro_losses(engine, sequences(2 * MICRO * comm.world_size()), 2))
    finally:
        backend.all_gather_function, torch.distributed.all_reduce = gather, reduce
    return dict(counted)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_bytes_over_the_wire_are_those_of_the_collectives(folder, checkpointing):
    counted = run_ranks(2, _moved, folder, checkpointing)[0]
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
    config = RunConfig(model=model, sorsa=SorsaConfig(rank=rank), train=TrainConfig(micro_batch_size=1))
    job = Job.of(config, {"zero_optimization": {"stage": 0}}, Hardware())
    found = facts(configuration_of(model, config.loading), job)
    assert found.frozen == pytest.approx(frozen, rel=1e-3)
    assert found.trainable == pytest.approx(trainable, rel=2e-3)
    assert found.kept.counted


def recipe_lines():
    """Every recipe's own plan command."""
    for path in sorted((ROOT / "launch" / "recipes").glob("*.yaml")):
        for line in path.read_text().splitlines():
            if line.startswith("#") and "launch/plan.py" in line:
                yield pytest.param(line.lstrip("# ").split(), id=path.stem)


@pytest.mark.parametrize("words", recipe_lines())
def test_every_recipe_fits_the_hardware_that_it_names(words):
    options = {word[2:]: words[i + 1] for i, word in enumerate(words) if word.startswith("--")}
    config = cli.load(RunConfig, ROOT / options["config"])
    if "rwkv" in options["config"]:
        pytest.importorskip("fla", reason="needs flash-linear-attention: pip install -e '.[rwkv]'")
    hardware = Hardware(gpus=int(options["gpus"]), nodes=int(options["nodes"]), gpu_memory=size(options["gpu_memory"]))
    planned = plan(shipped(config.model), Job.of(config, settings.load(ROOT / options["ds_config"]), hardware))
    assert planned.fits, as_text(planned)
    assert not planned.advice


def test_advice_fits_and_is_found_by_planning():
    config = RunConfig(model="meta-llama/Llama-2-7b-hf", train=TrainConfig(micro_batch_size=16))
    hardware = Hardware(gpu_memory=24 * GIB)
    planned = plan(shipped(config.model), Job.of(config, {"zero_optimization": {"stage": 0}}, hardware))
    assert not planned.fits and "It would with:" in as_text(planned)
    for changes, told in planned.advice:
        overrides = [tuple(word.split("=")) for word in changes.split() if "=" in word]
        values = cli.load(RunConfig, None, [*overrides, ("model", config.model)])
        train = values.train if "micro" in changes else replace(values.train, micro_batch_size=16)
        given = {"zero_optimization": {"stage": 0}}
        if "offload" in changes:
            given = settings.load(ROOT / "ds_configs/zero3_offload.json")
        job = Job.of(replace(values, train=train), given, hardware)
        needed = memory(job, facts(shipped(config.model), job)).total
        assert needed <= 0.95 * hardware.gpu_memory
        if "offload" not in changes:
            assert needed == told


def test_too_much_for_one_gpu_is_advised_more_of_them():
    config = RunConfig(
        model="meta-llama/Llama-3.1-405B", sorsa=SorsaConfig(rank=512), data=DataConfig(max_length=8192),
        train=TrainConfig(micro_batch_size=1),
    )  # fmt: skip
    planned = plan(shipped(config.model), Job.of(config, {"zero_optimization": {"stage": 0}}, Hardware()))
    assert not planned.fits
    assert not planned.advice or all(told <= 0.95 * 80 * GIB for _, told in planned.advice)


def run_plan(*arguments):
    return subprocess.run(
        [sys.executable, "launch/plan.py", *arguments], cwd=ROOT, text=True, capture_output=True, check=False
    )


def test_the_command_prints_one_json_object():
    done = run_plan("--config", "launch/recipes/llama3_70b_2nodes.yaml", "--ds_config",
                    "ds_configs/zero3_multinode.json", "--gpus", "8", "--nodes", "2", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["fits"] is True and told["trainable"] == 1_656_821_760
    assert told["gib_per_rank"] == pytest.approx(sum(told["gib"].values()))
    assert {"bytes_per_step", "seconds_per_step", "initialisation", "advice"} <= set(told)


def test_the_command_says_what_would_fit_and_leaves_with_3():
    done = run_plan("--ds_config", "ds_configs/stage0.json", "--gpu_memory", "8GiB", "model=meta-llama/Llama-2-7b-hf")
    assert done.returncode == 3
    assert "It does not fit" in done.stdout and "It would with:" in done.stdout


def test_everything_wrong_with_a_command_is_told_at_once():
    done = run_plan("--gpus", "none", "--ds_config", "nowhere.json", "sorsa.rnk=3")
    assert done.returncode == 2
    for told in ("--gpus none", "nowhere.json", "did you mean sorsa.rank"):
        assert told in done.stderr
    assert "--gpu_memory 80: write" in run_plan("--gpu_memory", "80").stderr
    assert "no shape of it ships" in run_plan("model=nobody/nothing").stderr


def test_a_run_says_its_plan_and_refuses_what_cannot_fit(project):
    printed, _, _ = launch(project, "plan-ok", "train.steps=1")
    assert "Planned memory: " in printed
    printed, folder, _ = launch(project, "plan-no", "train.steps=1", "train.micro_batch_size=400000",
                                "train.global_batch_size=null", "data.max_length=256", code=2)  # fmt: skip
    assert printed.count("\nerror: ") == 1 and "the run needs about" in printed
    assert not (folder / "report.json").exists()
