"""Options of LoRA that people expect: LoRA+ and rsLoRA compute what PEFT's loop does, and blocks are PEFT's."""

import math

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, LlamaForCausalLM

from examples import sorsa_in_one_page as page
from sorsa_ds.config.schema import AdapterConfig, BaselineConfig, LoadingConfig, RunConfig, TrainConfig
from sorsa_ds.methods.loraplus import learning_faster
from sorsa_ds.methods.registry import method_of
from sorsa_ds.methods.settings import check_settings
from sorsa_ds.model.adapter_file import INITIAL, TRAINED
from sorsa_ds.model.blocks import block_of
from sorsa_ds.model.selection import choose, summed_up
from sorsa_ds.runtime.precision import resolve_precision
from tests.helpers.engines import MICRO, RATE, STEPS, WARMUP, ds_config, micro_losses, sequences, whole_factors
from tests.helpers.finished import base_of, finished_run
from tests.helpers.projects import metrics
from tests.helpers.runs import rewound, train
from tests.helpers.worlds import run_ranks

CPU = torch.device("cpu")
RANK, ALPHA, RATIO, CLIP, WIDER = 3, 6.0, 8.0, 0.02, {"q_proj": 5}
RUNS = [("lora", 0), ("lora", 1), ("lora", 2), ("lora", 3), ("dora", 3)]
SMALL = LlamaConfig(
    hidden_size=40, intermediate_size=76, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=64, max_position_embeddings=64, initializer_range=0.2, tie_word_embeddings=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory):
    """A random Llama of four blocks on disk."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(SMALL).save_pretrained(folder)
    return folder


def config_of(method: str) -> RunConfig:
    """Settings with LoRA+, rsLoRA's scale and linears of two ranks, in two of the blocks."""
    return RunConfig(
        method=method, train=TrainConfig(learning_rate=RATE), baseline=BaselineConfig(loraplus_lr_ratio=RATIO),
        adapter=AdapterConfig(rank=RANK, alpha=ALPHA, rslora=True, rank_pattern=WIDER, layers=[0, "2-3"]),
    )  # fmt: skip


def _trained(folder, runs):
    """Each run's trained tensors as it begins and ends, on rank 0."""
    from sorsa_ds.engine import optimizers, schedules
    from sorsa_ds.model.load import load_adapted_model
    from sorsa_ds.model.sharding import Whole, Zero3
    from sorsa_ds.runtime import collectives
    from sorsa_ds.sorsa.residual_storage import Dense

    found = []
    for method, stage in runs:
        ds = ds_config(stage, "", CLIP, 1)
        config, formats = config_of(method), resolve_precision("fp32", None, "cpu")
        loaded = load_adapted_model(
            folder, method_of(config).operation(config, formats, Dense(torch.float32), CPU), loading=LoadingConfig(),
            placement=Zero3(ds, CPU) if stage == 3 else Whole(CPU), device=CPU,
        )  # fmt: skip
        engine = method_of(config).engine(config, STEPS)(
            loaded.model, ds, optimizers.optimizer(config.train, *learning_faster(config, loaded.model)),
            schedules.cosine_with_warmup(STEPS, WARMUP), None, {},
        )  # fmt: skip
        start = whole_factors(engine)
        for t in range(STEPS):
            engine.train_step(micro_losses(engine, sequences(MICRO * collectives.world_size(), seed=t), 1))
        found.append((start, whole_factors(engine), engine.get_lr()))
        engine.destroy()
    return found


def plainly(folder, method: str, start: dict) -> dict:
    """What PEFT trains from the same start, with its own optimizer of LoRA+."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = peft.get_peft_model(model, peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, use_rslora=True, rank_pattern=WIDER, use_dora=method == "dora",
        layers_to_transform=[0, 2, 3], task_type="CAUSAL_LM",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    ))  # fmt: skip
    trained = {name: one for name, one in model.base_model.model.named_parameters() if one.requires_grad}
    assert trained.keys() == start.keys(), "PEFT adapts other linears"
    with torch.no_grad():
        for name, one in trained.items():
            one.copy_(start[name])
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=RATIO)
    optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
    rates = [group["lr"] for group in optimizer.param_groups]
    model.train()
    for t in range(STEPS):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = page.learning_rate(t, rate, WARMUP, STEPS)
        input_ids, labels = (torch.cat(parts) for parts in zip(*sequences(MICRO * 2, seed=t), strict=True))
        model(input_ids=input_ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return {name: one.detach() for name, one in trained.items()}


@pytest.mark.slow
def test_loraplus_and_rslora_take_pefts_steps_on_every_stage(tiny_llama):
    plain: dict = {}
    for (method, stage), (start, end, rates) in zip(RUNS, run_ranks(2, _trained, tiny_llama, RUNS)[0], strict=True):
        assert rates[1] == pytest.approx(RATIO * rates[0])
        if method not in plain:
            plain[method] = start, plainly(tiny_llama, method, start)
        begun, expected = plain[method]
        for name, value in end.items():
            assert torch.equal(start[name], begun[name]), f"stage {stage}: {name} begins elsewhere"
            gap = (value - expected[name]).norm() / expected[name].norm()
            assert gap < 1e-5, f"{method}, stage {stage}: {name} is {gap:.1e} off"


@pytest.mark.parametrize(
    ("kind", "last"), [(LlamaConfig, ["q_proj", "down_proj"]), (GPT2Config, ["c_attn", "mlp.c_proj"])]
)
def test_blocks_are_those_of_pefts_layers_to_transform(kind, last):
    config = SMALL if kind is LlamaConfig else GPT2Config(n_embd=40, n_layer=4, n_head=4, vocab_size=64)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        ours = choose(model, AdapterConfig(rank=4, targets=last, layers=["1-2"]))
        theirs = peft.get_peft_model(
            model, peft.LoraConfig(target_modules=last, layers_to_transform=[1, 2], fan_in_fan_out=kind is GPT2Config)
        )
    assert {one.name for one in ours.targets} == set(theirs.base_model.targeted_module_names)
    assert len(ours.targets) == 4
    assert summed_up(ours.left_out).endswith("not in the blocks that adapter.layers names")
    assert len(ours.left_out) == 4


def test_what_lies_in_no_block_is_left_out_and_said():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SMALL)
    selection = choose(model, AdapterConfig(rank=4, targets=["all-linear", "lm_head"], layers=3))
    assert {block_of(one.name) for one in selection.targets} == {3}
    assert len(selection.targets) == 7
    assert selection.left_out["lm_head"] == "not in the blocks that adapter.layers names"
    assert len(selection.left_out) == 3 * 7 + 1
    assert choose(model, AdapterConfig(rank=4, layers="0-3")) == choose(model, AdapterConfig(rank=4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": [0, "2-4"]}, "adapter.layers: there is no block 4: the linears of this model lie in blocks 0 to 3"),
        ({"layers": []}, "adapter.targets selects no linear: .*not in the blocks that adapter.layers names"),
        ({"layers": 1, "rank_pattern": {"*.2.*": 3}}, r"rank_pattern.*layers\.2\..* is not adapted: not in the blocks"),
    ],
)
def test_blocks_that_are_not_there_are_refused(settings, message):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SMALL)
    with pytest.raises(ValueError, match=message):
        choose(model, AdapterConfig(rank=4, **settings))


@pytest.mark.parametrize("text", ["3-1", "a", "-1", "1-", "1,2", "all of them"])
def test_what_is_no_range_of_blocks_is_refused(text):
    with pytest.raises(ValueError, match="is neither a block's number, nor a range with both ends as 8-15, nor all"):
        AdapterConfig(layers=[text])


@pytest.mark.parametrize(
    ("method", "settings", "named"),
    [
        ("sorsa", dict(baseline=BaselineConfig(loraplus_lr_ratio=4)), "baseline.loraplus_lr_ratio=4"),
        ("adalora", dict(baseline=BaselineConfig(loraplus_lr_ratio=4)), "baseline.loraplus_lr_ratio=4"),
        ("partial", dict(baseline=BaselineConfig(loraplus_lr_ratio=4)), "baseline.loraplus_lr_ratio=4"),
        ("adalora", dict(adapter=AdapterConfig(alpha=4, rslora=True)), "adapter.rslora=True"),
        ("partial", dict(adapter=AdapterConfig(alpha=4, rslora=True)), "adapter.rslora=True"),
        ("full", dict(adapter=AdapterConfig(layers="0-1")), "adapter.layers=0-1"),
    ],
)
def test_what_a_method_ignores_is_refused_by_name(method, settings, named):
    with pytest.raises(ValueError, match=f"method {method} has no use for .*{named}"):
        check_settings(RunConfig(method=method, **settings), 2, resolve_precision("fp32", None, "cpu"))


def test_rslora_without_alpha_is_refused():
    with pytest.raises(ValueError, match="adapter.rslora=true scales by alpha / sqrt"):
        AdapterConfig(rslora=True)


@pytest.mark.slow
def test_sorsas_change_is_scaled_by_alpha_over_the_root_of_the_rank(tiny_llama, tmp_path):
    from sorsa_ds.export.command import Options, export

    run = finished_run(tiny_llama, tmp_path / "run", alpha=ALPHA, rslora=True, rank_pattern={"q_proj": 9})
    export(Options(run, "merged", tmp_path / "merged"))
    export(Options(run, "lora", tmp_path / "lora"))
    base = AutoModelForCausalLM.from_pretrained(base_of(run))
    merged = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").named_parameters())
    lora = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_of(run)), tmp_path / "lora")
    served = dict(lora.merge_and_unload().named_parameters())
    end, start = (load_file(run / "adapter" / name) for name in (TRAINED, INITIAL))
    for name in {name.rpartition(".")[0] for name in end}:
        (U, s, V), (U0, s0, V0) = ([one[f"{name}.{leaf}"].double() for leaf in ("U", "s", "V")] for one in (end, start))
        change = ALPHA / math.sqrt(9 if name.endswith("q_proj") else 4) * ((U * s) @ V.T - (U0 * s0) @ V0.T)
        weight = base.get_parameter(f"{name}.weight").double()
        for found in (merged, served):
            gap = found[f"{name}.weight"].double() - weight - change
            assert gap.norm() < 1e-5 * change.norm() + 1e-6 * weight.norm(), name
    assert "6 / sqrt(rank)" in (tmp_path / "merged" / "README.md").read_text()


@pytest.mark.slow
def test_a_run_with_all_of_it_goes_on_bit_for_bit_and_at_other_ranks(project):
    words = [
        "method=lora", "baseline.loraplus_lr_ratio=8", "adapter.alpha=6", "adapter.rslora=true", "adapter.layers=[1]",
        "train.neftune_noise_alpha=3", "train.label_smoothing=0.1",
    ]  # fmt: skip
    run, _ = train(project, "options", *words, ds="zero3")
    again = rewound(project, run, "options-again", 4)
    train(project, again.name, *words, "--resume=auto", ds="zero3")
    for name in ("loss", "eval_loss"):
        assert metrics(again, name) == metrics(run, name)
    files = [load_file(one / "adapter" / TRAINED) for one in (run, again)]
    assert {block_of(name) for name in files[0]} == {1}
    assert all(torch.equal(files[0][name], value) for name, value in files[1].items())
    quiet = [word for word in words if "neftune" not in word]  # other ranks draw other noise
    plain, _ = train(project, "options-quiet", *quiet, ds="zero2")
    moved = rewound(project, plain, "options-moved", 2)
    train(project, moved.name, *quiet, "--resume=auto", ds="zero3", ranks=1)
    assert metrics(moved, "loss") == pytest.approx(metrics(plain, "loss"), rel=1e-5)
    with pytest.raises(AssertionError, match=r"baseline\.loraplus_lr_ratio was 8\.0 and is now 2\.0"):
        train(
            project,
            rewound(project, plain, "options-other", 2).name,
            *quiet,
            "baseline.loraplus_lr_ratio=2",
            "--resume=auto",
        )
