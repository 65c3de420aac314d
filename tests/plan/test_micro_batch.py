"""`train.micro_batch_size=auto`: the planner's search against planning every size."""

import json
from dataclasses import replace

import pytest

from sorsa_ds.config.schema import RegularizerConfig, RunConfig, TrainConfig
from sorsa_ds.plan.advice import advice
from sorsa_ds.plan.command import print_plan
from sorsa_ds.plan.hardware import Hardware
from sorsa_ds.plan.job import Job
from sorsa_ds.plan.memory import fits, memory
from sorsa_ds.plan.micro_batch import size_micro_batch
from sorsa_ds.plan.model_facts import bare_model, facts
from sorsa_ds.plan.options import parse
from sorsa_ds.runtime.memory import GIB
from sorsa_ds.train.origin import NewRun
from tests.helpers.architectures import save
from tests.helpers.plans import job_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save("llama", tmp_path_factory.mktemp("micro"))


def automatic(gpu_memory: int = 80 * GIB, gpus: int = 1, **train) -> Job:
    job = job_of(1, length=3000)
    wanted = TrainConfig(precision="fp32", micro_batch_size="auto", **train)
    return Job.of(replace(job.config, train=wanted), job.given, Hardware(gpus=gpus, gpu_memory=gpu_memory))


@pytest.fixture(scope="module")
def needed(folder):
    """Micro-batch -> bytes of a GPU, each planned by itself with a model of its own."""
    job = automatic(global_batch_size=24)
    assert job.resolved.micro_choices == (1, 2, 3, 4, 6, 8, 12, 24)
    sized = [replace(job, resolved=job.resolved.with_micro_batch(micro)) for micro in job.resolved.micro_choices]
    return {one.resolved.micro_batch_size: memory(one, facts(folder, one)).total for one in sized}


def test_the_largest_that_fits_is_found_whatever_the_gpu(folder, needed):
    for limit in [*needed.values(), 80 * GIB, 1]:
        job = automatic(int(limit / 0.95) + 2, global_batch_size=24)
        sized = size_micro_batch(folder, job)
        largest = max((micro for micro, nbytes in needed.items() if nbytes <= limit), default=1)
        assert sized.job.resolved.micro_batch_size == largest
        assert sized.memory.total == needed[largest]
        assert fits(sized.job, sized.memory) is (limit > 1)
        assert sized.job.resolved.gradient_accumulation_steps * largest == 24


def test_the_share_of_a_rank_is_what_it_chooses_from(folder):
    for gpus, micro in ((2, 12), (8, 3), (24, 1)):
        sized = size_micro_batch(folder, automatic(gpus=gpus, global_batch_size=24))
        assert sized.job.resolved.micro_batch_size == micro
        assert sized.choice.endswith("(the global batch of 24 has no more for a rank).")


def test_the_model_is_built_once(folder, monkeypatch):
    built = []

    def counted(*arguments):
        built.append(arguments)
        return bare_model(*arguments)

    monkeypatch.setattr("sorsa_ds.plan.micro_batch.bare_model", counted)
    size_micro_batch(folder, automatic(global_batch_size=24))
    assert len(built) == 1


@pytest.mark.parametrize(
    ("strength", "method", "accumulation", "follows"),
    [
        ({"preset": "reference"}, "sorsa", None, True),
        ({"divide_by_accumulation": True}, "sorsa", None, True),
        ({"preset": "reference", "divide_by_accumulation": 64}, "sorsa", None, False),
        ({"preset": "reference", "gamma": 0.0}, "sorsa", None, False),
        ({"preset": "reference"}, "sorsa", 2, False),
        ({}, "sorsa", None, False),
        ({}, "lora", None, False),
    ],
)
def test_the_regulariser_does_not_follow_from_the_memory(strength, method, accumulation, follows):
    train = TrainConfig(micro_batch_size="auto", global_batch_size=8, gradient_accumulation_steps=accumulation)
    config = RunConfig(method=method, regularizer=RegularizerConfig(**strength), train=train)
    if follows:
        for refuse in (lambda: Job.of(config, {}, Hardware()), lambda: NewRun(again=False).check_settings(config)):
            with pytest.raises(
                ValueError, match=r"train.micro_batch_size=auto .* regularizer.divide_by_accumulation=64"
            ):
                refuse()
    else:
        Job.of(config, {}, Hardware())


def test_what_the_settings_say_is_not_chosen(folder):
    sized = size_micro_batch(folder, job_of(0))
    assert sized.choice is None and sized.job.resolved.micro_batch_size == 2


def test_a_guess_is_called_one(folder, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr("transformers.LlamaForCausalLM.forward", broken)
    assert "; activations are guessed)" in size_micro_batch(folder, automatic(global_batch_size=4)).choice


def test_the_plan_command_says_what_auto_would_take(folder, capsys):
    words = ["--ds_config", "ds_configs/stage0.json", f"model={folder}", "adapter.rank=5",
             "train.micro_batch_size=auto", "train.global_batch_size=4", "data.max_length=100"]  # fmt: skip
    assert print_plan(parse(words))
    told = capsys.readouterr().out
    assert "batch       4 = 4 x 1 ranks x 1 accumulated" in told
    assert "  Micro-batch 4: plans 0.7 of 80.0 GiB on its GPU (the global batch of 4 has no more for a rank).\n" in told
    assert print_plan(parse([*words, "--json"]))
    told = json.loads(capsys.readouterr().out)
    assert (told["micro_batch_size"], told["gradient_accumulation_steps"], told["global_batch_size"]) == (4, 1, 4)


def test_packed_rows_take_what_as_many_of_the_longest_examples_do(folder, capsys):
    words = ["--ds_config", "ds_configs/stage0.json", f"model={folder}", "adapter.rank=5",
             "train.micro_batch_size=auto", "train.global_batch_size=4", "data.max_length=100"]  # fmt: skip
    plans = []
    for packing in ("true", "false"):
        assert print_plan(parse([*words, f"data.packing={packing}", "--json"]))
        plans.append(json.loads(capsys.readouterr().out))
    packed, alone = (plan["gib"].pop("activations") for plan in plans)
    # The masks of rows, in fp32 and for a while as booleans, which others do without.
    assert 4 <= (packed - alone) * 2**30 / (4 * 100 * 100) < 6
    for plan in plans:
        for key in ("gib_per_rank", "host_gib_per_rank"):
            plan.pop(key, None)
    assert plans[0] == plans[1]
    assert print_plan(parse([*words, "data.packing=true"]))
    assert "accumulated, 100 tokens each, packed (shorter examples take fewer passes), " in capsys.readouterr().out


@pytest.mark.parametrize(("positions", "examples"), [(100, 1), (200, 2), (301, 4), (400, 4), (10**6, 4)])
def test_positions_take_the_memory_of_as_many_of_the_longest_examples(folder, capsys, positions, examples):
    """Rounded up: more but shorter examples may fill the positions. A rank has four examples of a step."""
    words = ["--ds_config", "ds_configs/stage0.json", f"model={folder}", "adapter.rank=5", "train.global_batch_size=4",
             "data.max_length=100"]  # fmt: skip
    plans = []
    for asked in (f"train.micro_batch_tokens={positions}", f"train.micro_batch_size={examples}"):
        assert print_plan(parse([*words, asked, "--json"]))
        plans.append(json.loads(capsys.readouterr().out))
    for key in ("gib", "gib_per_rank", "flops_per_rank"):
        assert plans[0][key] == plans[1][key]
    assert print_plan(parse([*words, f"train.micro_batch_tokens={positions}"]))
    assert f"100 tokens each, up to {positions:,} positions at once (shorter examples" in capsys.readouterr().out


def test_automatic_positions_are_those_of_the_micro_batch_that_the_planner_takes(folder, capsys):
    words = ["--ds_config", "ds_configs/stage0.json", f"model={folder}", "adapter.rank=5",
             "train.micro_batch_size=auto", "train.micro_batch_tokens=auto", "train.global_batch_size=4",
             "data.max_length=100"]  # fmt: skip
    assert print_plan(parse(words))
    told = capsys.readouterr().out
    assert "batch       4 = 4 x 1 ranks x 1 accumulated" in told
    assert "up to 400 positions at once" in told


def test_fewer_positions_are_advised_where_they_do_not_fit(folder):
    job = job_of(1, length=3000)
    wanted = TrainConfig(precision="fp32", micro_batch_tokens=72_000, global_batch_size=24)
    sized = {
        tokens: memory(one, facts(folder, one)).total
        for tokens in (72_000, 3000)
        for one in [
            Job.of(replace(job.config, train=replace(wanted, micro_batch_tokens=tokens)), job.given, Hardware())
        ]
    }
    assert sized[3000] < 0.7 * sized[72_000]
    tight = Hardware(gpu_memory=int(sized[3000] / 0.95) + 2)
    ways = advice(folder, Job.of(replace(job.config, train=wanted), job.given, tight))
    assert [(way.settings, way.gpu) for way in ways] == [("train.micro_batch_tokens=3000", sized[3000])]


def test_a_plan_refuses_to_pack_what_training_would_refuse(tmp_path):
    words = ["--ds_config", "ds_configs/stage0.json", f"model={save('rwkv', tmp_path)}", "data.packing=true"]
    with pytest.raises(ValueError, match="data.packing: RwkvForCausalLM carries a state"):
        print_plan(parse(words))
