"""Modules trained whole beside the adapters, and rows of new tokens, against plain torch on every ZeRO stage."""

from dataclasses import replace

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sorsa_ds.config.schema import AdapterConfig, DataConfig, LoadingConfig, ResidualConfig, RunConfig, TrainConfig
from sorsa_ds.methods.registry import method_of
from sorsa_ds.methods.settings import ignored, with_trained_tokens
from sorsa_ds.model.selection import select_targets
from sorsa_ds.model.skeleton import skeleton
from sorsa_ds.plan.hardware import Hardware
from sorsa_ds.plan.job import Job
from sorsa_ds.plan.memory import memory
from sorsa_ds.plan.model_facts import facts
from sorsa_ds.runtime.precision import resolve_precision
from tests.helpers.engines import CASES, MICRO, RATE, WARMUP, ds_config, micro_losses, sequences, whole_factors
from tests.helpers.plans import bytes_by_kind
from tests.helpers.reference import peft_loop, plain_model, train
from tests.helpers.worlds import run_ranks

CPU = torch.device("cpu")
RANK, ROWS, OLD, STEPS = 5, 67, 64, 6
TOKENS = ["<|a|>", "<|b|>", "<|c|>"]
CASE = CASES[0]
WHOLE = ["norm", "layers.1.input_layernorm"]
RUNS = [("sorsa", 0, "tied"), ("sorsa", 1, "tied"), ("sorsa", 2, "apart"), ("sorsa", 3, "apart"), ("sorsa", 3, "tied")]
RUNS += [("lora", 0, "tied"), ("lora", 3, "apart"), ("full", 3, "tied"), ("partial", 3, "apart")]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Random Llamas on disk, one with tied embeddings and one without."""
    made = {}
    for kind in ("tied", "apart"):
        torch.manual_seed(3)
        config = LlamaConfig(
            hidden_size=40, intermediate_size=76, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=OLD, max_position_embeddings=64, initializer_range=0.2, tie_word_embeddings=kind == "tied",
        )  # fmt: skip
        made[kind] = tmp_path_factory.mktemp(kind)
        LlamaForCausalLM(config).save_pretrained(made[kind])
    return made


def config_of(method: str, **train_settings) -> RunConfig:
    """The settings of a run with new tokens, as a run resolves them."""
    layers = {} if method in ("full", "partial") else {"rank": RANK}
    whole = {} if method == "full" else {"train_whole": WHOLE}
    config = RunConfig(
        method=method, adapter=AdapterConfig(**layers, **whole), data=DataConfig(new_tokens=TOKENS, max_length=12),
        train=TrainConfig(learning_rate=RATE, micro_batch_size=MICRO, **train_settings),
    )  # fmt: skip
    return with_trained_tokens(config)


def build(folder, method: str, ds: dict, precision="fp32", storage=None):
    """An engine, as `assemble` makes it."""
    from sorsa_ds.engine.optimizers import adamw
    from sorsa_ds.engine.schedules import cosine_with_warmup
    from sorsa_ds.model.load import load_adapted_model
    from sorsa_ds.model.sharding import Whole, Zero3
    from sorsa_ds.sorsa.regularizer import Regularizer
    from sorsa_ds.sorsa.residual_storage import Dense

    config, formats = config_of(method), resolve_precision(precision, None, "cpu")
    loaded = load_adapted_model(
        folder, method_of(config).operation(config, formats, storage or Dense(formats.residual_dtype), CPU),
        loading=LoadingConfig(), rows=ROWS, dtype=formats.residual_dtype,
        placement=Zero3(ds, CPU) if ds["zero_optimization"]["stage"] == 3 else Whole(CPU), device=CPU,
    )  # fmt: skip
    regularizer = Regularizer(CASE["form"], CASE["reduction"], CASE["coefficient"]) if method == "sorsa" else None
    return method_of(config).engine(config, STEPS)(
        loaded.model, ds, adamw(RATE, (0.9, 0.999), 1e-8, 0.0), cosine_with_warmup(STEPS, WARMUP), regularizer,
        loaded.exact_factors,
    )  # fmt: skip


def batch_of(count: int, seed: int):
    """Sequences in which every new token stands, learned in some of them."""
    batch = sequences(count, seed)
    for number, (ids, labels) in enumerate(batch):
        ids[0, 7] = OLD + (number + seed) % 3
        labels[0, 7] = torch.where(labels[0, 7] == -100, -100, ids[0, 7])
    return batch


def _all_runs(models):
    """Every run on every rank: trained tensors at its start and end (on rank 0), and the bytes of its tensors."""
    from sorsa_ds.runtime import collectives

    results = []
    for method, stage, kind in RUNS:
        ds = ds_config(stage, "", CASE["clip"], 1)
        ds["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        engine = build(models[kind], method, ds)
        start = whole_factors(engine)
        for t in range(STEPS):
            engine.train_step(micro_losses(engine, batch_of(MICRO * collectives.world_size(), t), 1))
        results.append((start, whole_factors(engine), bytes_by_kind(engine)))
        engine.destroy()
    return results


@pytest.fixture(scope="module")
def everyone(models):
    """Each rank's results of `RUNS` on two ranks."""
    return run_ranks(2, _all_runs, models)


def resized(folder) -> torch.nn.Module:
    """The base model with rows for the new tokens, as transformers resizes it; new rows are the mean of the others."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    means = [table.weight.detach().numpy().astype("float64").mean(0) for table in tables]
    model.resize_token_embeddings(ROWS, mean_resizing=False)
    with torch.no_grad():
        for table, mean in zip([model.get_input_embeddings(), model.get_output_embeddings()], means, strict=True):
            table.weight[OLD:] = torch.tensor(mean, dtype=torch.float32)
    return model


def plainly(folder, method: str, start: dict) -> dict[str, torch.Tensor]:
    """What a plain program in one process trains from the same start, by the names that our engine has for it."""
    torch.manual_seed(0)
    batches = [batch_of(MICRO * 2, t) for t in range(STEPS)]
    base = resized(folder)
    whole = ["model.norm.weight", "model.layers.1.input_layernorm.weight", "model.embed_tokens.weight"]
    whole += [] if base.config.tie_word_embeddings else ["lm_head.weight"]
    targets = [t.name for t in select_targets(base, AdapterConfig(rank=1))]
    loop = dict(rate=RATE, clip=CASE["clip"], steps=STEPS, warmup=WARMUP)
    if method == "sorsa":
        base.save_pretrained(folder / "resized")
        factors = {name: tuple(start[f"{name}.{leaf}"] for leaf in ("U", "s", "V")) for name in targets}
        model = plain_model(folder / "resized", factors)
        for name in whole:
            model.get_parameter(name).requires_grad_(True)
        train(model, batches, **loop, **{key: CASE[key] for key in ("coefficient", "form", "reduction")})
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if method == "lora":
        wrapped = peft.get_peft_model(base, peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
        inner = wrapped.base_model.model
    else:
        wrapped = inner = base.requires_grad_(method == "full")
        whole += [f"{name}.weight" for name in targets] if method == "partial" else []
    with torch.no_grad():
        for name, value in start.items():
            if "lora_" in name:
                inner.get_parameter(name).copy_(value)
    for name in whole:
        inner.get_parameter(name).requires_grad_(True)
    peft_loop(wrapped.train(), batches, **loop)
    return {name: p.detach() for name, p in inner.named_parameters() if p.requires_grad}


def test_steps_are_those_of_plain_torch(models, everyone):
    for (method, stage, kind), (start, end, _) in zip(RUNS, everyone[0], strict=True):
        label = f"{method}, stage {stage}, {kind}"
        begun = resized(models[kind])
        for name in ("model.embed_tokens.weight", "model.norm.weight", *(["lm_head.weight"] * (kind == "apart"))):
            assert torch.equal(start[name], begun.get_parameter(name)), f"{label}: {name} begins elsewhere"
        expected = plainly(models[kind], method, start)
        assert end.keys() == expected.keys(), label
        for name, value in end.items():
            gap = (value - expected[name]).norm() / expected[name].norm()
            assert gap < 1e-5, f"{label}: {name} is {gap:.1e} off"
            assert (value - start[name]).norm() > 1e-4 * value.norm(), f"{label}: {name} did not move"
        moved = (end["model.embed_tokens.weight"] - start["model.embed_tokens.weight"])[OLD:]
        assert moved.abs().amax(1).min() > 1e-4, f"{label}: a new row did not move"


def test_the_plan_counts_what_is_trained_whole(models, everyone):
    for i, (method, stage, kind) in enumerate(RUNS):
        given = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}
        job = Job.of(config_of(method, precision="fp32"), given, Hardware(gpus=2))
        model = facts(models[kind], job)
        planned = memory(job, model).gpu
        for name in ("residual", "frozen", "trained", "masters", "moments"):
            largest = max(rank[i][-1].get(name, 0) for rank in everyone)
            assert planned[name] == largest, (method, stage, name)
        assert model.trainable == sum(value.numel() for value in everyone[0][i][0].values())


def test_the_plan_has_room_to_read_a_large_table(tmp_path):
    """An embedding of 2^27 numbers is there once as it is read and once as a message, both in fp32."""
    LlamaConfig(
        hidden_size=64, intermediate_size=76, num_hidden_layers=1, num_attention_heads=4, vocab_size=2**21,
    ).save_pretrained(tmp_path)  # fmt: skip
    peaks = []
    for whole in ([], ["embeddings-and-head"]):
        config = replace(config_of("sorsa"), data=DataConfig(max_length=12), adapter=AdapterConfig(train_whole=whole))
        job = Job.of(config, {"zero_optimization": {"stage": 3}}, Hardware(gpus=2))
        needed = memory(job, facts(tmp_path, job))
        peaks.append(needed.initialisation - sum(needed.gpu[name] for name in ("residual", "frozen", "trained")))
    assert peaks[1] >= 8 * 2**27 > peaks[0]


def _logits_at_the_start(models):
    """Over a residual in 4 bits: logits on known tokens, and the dtypes of what is held."""
    from sorsa_ds.sorsa.residual_storage import resolve_storage

    found = {}
    for kind in ("tied", "apart"):
        for precision in ("fp32", "mixed", "bf16"):
            formats = resolve_precision(precision, None, "cpu")
            storage = resolve_storage(ResidualConfig(storage="nf4" if kind == "tied" else "auto"), formats, CPU)
            engine = build(models[kind], "sorsa", ds_config(3, "", 0.0, 1, precision == "bf16"), precision, storage)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "mixed"):
                logits = engine(torch.arange(2, 26).view(2, 12)).logits.float()
            start = whole_factors(engine)
            [loss] = micro_losses(engine, batch_of(MICRO, 0), 1)
            engine.backward(loss)
            engine.step()
            dtypes = {name: parameter.dtype for name, parameter in engine.module.named_parameters()}
            found[kind, precision] = logits, start, dtypes
            engine.destroy()
    return found


def test_whole_modules_stay_dense_over_a_packed_residual_and_start_exactly(models):
    [found] = run_ranks(1, _logits_at_the_start, models)
    for (kind, precision), (logits, start, dtypes) in found.items():
        trained = torch.bfloat16 if precision == "bf16" else torch.float32
        frozen = torch.float32 if precision == "fp32" else torch.bfloat16
        model = resized(models[kind])
        assert dtypes["model.embed_tokens.weight"] == dtypes["model.norm.weight"] == trained
        assert dtypes["model.layers.0.input_layernorm.weight"] == frozen
        assert torch.equal(start["model.embed_tokens.weight"], model.get_input_embeddings().weight), "rounded masters"
        with torch.no_grad():
            expected = model(torch.arange(2, 26).view(2, 12)).logits
        gap = (logits - expected).norm() / expected.norm()
        assert gap < {"fp32": 1e-5, "mixed": 0.03, "bf16": 0.03}[precision] + 0.4 * (kind == "tied"), (kind, precision)


def test_full_fine_tuning_trains_everything_anyway():
    config = RunConfig(method="full", data=DataConfig(new_tokens=TOKENS))
    assert with_trained_tokens(config) == config and not ignored(config)
    asked = RunConfig(method="full", adapter=AdapterConfig(train_whole=["norm"]))
    assert ignored(asked) == {"adapter.train_whole": ["norm"]}


def test_new_tokens_have_embeddings_and_head_trained(models):
    config = config_of("sorsa")
    assert with_trained_tokens(config) == config
    assert config.adapter.train_whole == [*WHOLE, "embeddings-and-head"]
    for kind, names in (
        ("tied", {"model.embed_tokens.weight"}),
        ("apart", {"model.embed_tokens.weight", "lm_head.weight"}),
    ):
        selection = method_of(config).choose(skeleton(models[kind], LoadingConfig()), config.adapter)
        assert {one.name for one in selection.whole} - {
            one.name for one in selection.whole if "norm" in one.name
        } == names
