"""The distributed initialisation: the same factors whoever makes them, from disk or from shards, cached or not."""

import copy
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sorsa_ds
from sorsa_ds.config.schema import AdapterConfig, SorsaConfig
from sorsa_ds.model.factor_cache import CachedDecomposition, FactorCache
from sorsa_ds.model.init_report import as_json, table
from sorsa_ds.model.schedule import Item, describe_schedule, schedule
from sorsa_ds.model.sharding import Whole
from sorsa_ds.model.targets import Target
from sorsa_ds.runtime import digest
from sorsa_ds.runtime.precision import resolve_precision
from sorsa_ds.sorsa.packed_storage import Nf4
from tests.helpers.architectures import CONFIGS, exactly, randomly, save
from tests.helpers.expert_models import save_experts
from tests.helpers.sorsa_models import load_sorsa_model
from tests.helpers.worlds import run_ranks

CPU = torch.device("cpu")
EXACTLY = {"adapter": AdapterConfig(rank=5), "sorsa": SorsaConfig(svd="exact", svd_cache="off")}
SOURCES = {"exact": exactly, "randomized": randomly}
DS = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0, "zero_optimization": {"stage": 3}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model with biases."""
    return save("qwen2", tmp_path_factory.mktemp("model") / "qwen2")


def _load(folder, source, zero3):
    """The model of this world, and what each of its adapted layers holds, whole, on every rank."""
    import deepspeed

    from sorsa_ds.model.sharding import Zero3

    loaded = load_sorsa_model(
        folder, adapter=AdapterConfig(rank=5), precision=resolve_precision("fp32", None, "cpu"),
        placement=Zero3(DS, CPU) if zero3 else Whole(CPU), device=CPU, factor_source=source,
    )  # fmt: skip
    if not zero3:
        return {name: p.detach().clone() for name, p in loaded.model.named_parameters()}, loaded.reports
    with deepspeed.zero.GatheredParameters(list(loaded.model.parameters())):
        return {name: p.detach().clone() for name, p in loaded.model.named_parameters()}, loaded.reports


def _load_kind(folder, kind, zero3):
    return _load(folder, SOURCES[kind], zero3)


@pytest.mark.slow
@pytest.mark.parametrize("zero3", [False, True])
@pytest.mark.parametrize("kind", SOURCES)
def test_every_rank_and_world_size_gets_the_same_factors(folder, kind, zero3):
    alone, _ = _load(folder, SOURCES[kind], zero3=False)
    for world in (1, 2, 3):
        for values, reports in run_ranks(world, _load_kind, folder, kind, zero3):
            assert values.keys() == alone.keys()
            for name, value in values.items():
                torch.testing.assert_close(
                    value, alone[name], rtol=1e-5, atol=1e-6, msg=f"{name} in a world of {world}"
                )
            assert {r.owner for r in reports} == set(range(world))
            assert len(reports) == 14


def _iterated(folder):
    """Factors of the MLPs of a model that is large enough for the iteration, and how they were made."""
    loaded = load_sorsa_model(
        folder, adapter=AdapterConfig(rank=8, targets=["*.mlp.*"]),
        precision=resolve_precision("fp32", None, "cpu"), placement=Whole(CPU), device=CPU, factor_source=randomly,
    )  # fmt: skip
    trained = {name: p.detach().clone() for name, p in loaded.model.named_parameters() if p.requires_grad}
    return trained, {report.way for report in loaded.reports}


@pytest.mark.slow
def test_iterated_factors_do_not_depend_on_the_ranks(tmp_path):
    from transformers import LlamaForCausalLM

    config = copy.copy(CONFIGS["llama"])
    config.hidden_size, config.intermediate_size, config.head_dim = 256, 512, 64
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    alone, ways = run_ranks(1, _iterated, tmp_path)[0]
    assert ways == {"krylov"}, "the model is too small for what is tested"
    for world in (2, 3):
        for values, _ in run_ranks(world, _iterated, tmp_path):
            for name, value in values.items():
                assert torch.equal(value, alone[name]), f"{name}, {world} ranks"


def _partitioned(folder):
    """A model that ZeRO-3 has cut while transformers read it, as a user's own program makes it."""
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    keep = HfDeepSpeedConfig(DS)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    del keep
    return model


def _adapt(folder, residual=None):
    """Weights and factors of a partitioned model that was adapted in memory."""
    import deepspeed

    model = _partitioned(folder)
    before = {name: p.ds_id for name, p in model.named_parameters()}
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        weights = {name: p.detach().float() for name, p in model.named_parameters()}
    done = sorsa_ds.adapt_partitioned_model(model, DS, **EXACTLY, residual=residual, precision="fp32")
    kept = [name for name, p in model.named_parameters() if before.get(name) == p.ds_id]
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        values = {name: p.detach().clone() for name, p in model.named_parameters()}
    return values, weights, kept, len(done.reports), sum(p.numel() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_partitioned_model_is_adapted_in_memory(folder, world):
    for values, weights, kept, count, held in run_ranks(world, _adapt, folder):
        assert count == 14
        assert held == 0, "a rank holds whole parameters"
        assert any("q_proj.bias" in name for name in kept), "biases stay in place"
        for name, rest in values.items():
            if name.endswith(".residual"):
                layer = name.removesuffix(".residual")
                U, s, V = (values[f"{layer}.{leaf}"] for leaf in ("U", "s", "V"))
                weight = weights[f"{layer}.weight"]
                torch.testing.assert_close(rest + (U * s) @ V.T, weight, rtol=0, atol=1e-5)
                torch.testing.assert_close(s, torch.linalg.svdvals(weight)[:5], rtol=1e-4, atol=1e-5)


def _packed(folder, storage):
    """The packed tensors of the model loaded from disk."""
    model = load_sorsa_model(
        folder, adapter=AdapterConfig(rank=5), precision=resolve_precision("fp32", None, "cpu"),
        placement=Whole(CPU), device=CPU, factor_source=exactly, storage=storage,
    ).model  # fmt: skip
    return {name: p.detach() for name, p in model.named_parameters() if p.dtype == torch.uint8}


@pytest.mark.slow
def test_a_model_adapted_in_memory_holds_the_same_packed_residual(folder):
    storage = Nf4(64)
    [packed] = run_ranks(1, _packed, folder, storage)  # with one thread, as the ranks below
    assert len(packed) == 28
    for values, *_ in run_ranks(2, _adapt, folder, sorsa_ds.ResidualConfig(storage="nf4")):
        assert all(torch.equal(values[name], tensor) for name, tensor in packed.items())


def test_adapting_a_whole_model_in_memory_is_refused(folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="embed_tokens.weight is not partitioned by ZeRO-3"):
        sorsa_ds.adapt_partitioned_model(model, DS)


def _train_in_memory(folder, steps):
    """A user's own program: logits before and after the adaptation, then losses of DeepSpeed's plain engine."""
    import deepspeed

    model, ids = _partitioned(folder), torch.arange(1, 25).view(2, 12) % 64
    logits = []
    with torch.no_grad(), deepspeed.zero.GatheredParameters(list(model.parameters())):
        logits.append(model.eval()(ids).logits)
    adapted = sorsa_ds.adapt_partitioned_model(model, DS, **EXACTLY, precision="fp32")
    assert not adapted.exact_factors, "fp32 parameters are exact themselves"
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ds = {**DS, "zero_allow_untested_optimizer": True}
    optimizer = torch.optim.AdamW(named.values(), lr=3e-3)
    engine, *_ = deepspeed.initialize(model=model, config=ds, optimizer=optimizer)
    engine.eval()
    with torch.no_grad():
        logits.append(engine(ids).logits)
    engine.train()
    losses = []
    for _ in range(steps):
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    targets = [target.name for target in adapted.targets]
    return logits, losses, sorted(named), sorted(f"{name}.{leaf}" for name in targets for leaf in ("U", "s", "V"))


@pytest.mark.parametrize("mixture", [None, "mixtral", "gpt_oss"])
def test_a_model_adapted_in_memory_starts_as_the_base_and_trains_on_plain_deepspeed(folder, tmp_path, mixture):
    ranks = run_ranks(2, _train_in_memory, save_experts(mixture, tmp_path / "model") if mixture else folder, 4)
    for (before, after), losses, trained, factors in ranks:
        assert any("experts" in name for name in factors) == (mixture is not None)
        assert trained == factors
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
        assert losses == ranks[0][1], "the ranks saw the same tokens"
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < losses[0] - 0.1


@pytest.mark.slow
def test_the_public_names_are_imported_at_their_first_use():
    lines = [
        "import sys, sorsa_ds",
        "assert 'torch' not in sys.modules",
        "for name in sorsa_ds.__all__: assert getattr(sorsa_ds, name).__name__ == name",
        "assert 'torch' in sys.modules",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'adopt'"):
        sorsa_ds.adopt  # noqa: B018


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_schedule_deals_everything_once_and_evenly(world):
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 3
    items = [
        Item(f"layers.{i}.{j}", torch.Size(shape), Target(f"layers.{i}.{j}", *shape, 8, False, False))
        for i in range(32)
        for j, shape in enumerate(shapes)
    ]
    rounds = schedule(list(reversed(items)), world)
    assert rounds == schedule(items, world), "the order in which items are named must not matter"
    dealt = [item for one in rounds for item in one if item is not None]
    assert sorted(i.name for i in dealt) == sorted(i.name for i in items)
    work = [sum(one[rank].cost for one in rounds if one[rank]) for rank in range(world)]
    assert max(work) < 1.06 * sum(work) / world
    waiting = sum(max(i.cost for i in one if i) * world - sum(i.cost for i in one if i) for one in rounds)
    assert waiting < 0.06 * sum(work)
    assert describe_schedule(rounds).count("decompositions") == world
    assert sum(int(line.split(": ")[1].split()[0]) for line in describe_schedule(rounds).splitlines()) == len(items)


def counting(calls):
    """The exact decomposition, with a note of each call."""

    def source(target, weight):
        calls.append(target.name)
        return exactly(target, weight)

    return source


TARGET = Target("model.q_proj", 12, 9, 3, False, False)


def test_cache_gives_back_what_was_found(tmp_path):
    torch.manual_seed(0)
    weight, calls, told = torch.randn(12, 9), [], []
    cached = FactorCache(tmp_path / "c", {"method": "exact"}, told.append).wrap(counting(calls))
    first, second = cached(TARGET, weight), cached(TARGET, weight)
    assert calls == ["model.q_proj"]
    assert isinstance(second, CachedDecomposition)
    for leaf in ("U", "s", "V"):
        assert torch.equal(getattr(first, leaf), getattr(second, leaf))
    assert second.accuracy == first.accuracy
    other = FactorCache(tmp_path / "c", {"method": "randomized"}, told.append).wrap(counting(calls))
    other(TARGET, weight)
    cached(TARGET, weight + 1e-6)
    cached(Target("model.q_proj", 12, 9, 4, False, False), weight)
    cached(TARGET, weight.bfloat16())
    assert len(calls) == 5, "another method, weight, rank or dtype is another entry"
    assert not told


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_each_weight_is_hashed_once_whether_the_cache_has_it_or_not(tmp_path, monkeypatch, kind):
    """A digest is a pass over the weight; gpt2's linears are stored transposed."""
    monkeypatch.setattr(digest, "of_tensor", lambda x, of=digest.of_tensor: hashed.append((of(x), x.nbytes)) or of(x))
    model, calls = save(kind, tmp_path / kind), []
    for decomposed in (True, False):
        hashed, before = [], len(calls)
        loaded = load_sorsa_model(
            model, adapter=AdapterConfig(rank=5), precision=resolve_precision("fp32", None, "cpu"),
            placement=Whole(CPU), device=CPU,
            factor_source=FactorCache(tmp_path / "cache", {}, pytest.fail).wrap(counting(calls)),
        )  # fmt: skip
        assert (len(calls) - before) == (len(loaded.targets) if decomposed else 0)
        of_weights = [(found, size) for found, size in hashed if found in loaded.digests.values()]
        # Two equal parameters, such as two norms, have one digest; each is hashed once.
        assert sorted(found for found, _ in of_weights) == sorted(loaded.digests.values())
        assert sum(size for _, size in of_weights) == sum(
            loaded.source.parameter(name).nbytes for name in loaded.digests
        )


def test_a_known_digest_finds_what_was_stored_without_it(tmp_path):
    weight, calls = torch.randn(9, 12), []
    cached = FactorCache(tmp_path, {}, pytest.fail).wrap(counting(calls))
    straight, turned = (
        Target("model.q_proj", *shape, 3, False, turn) for shape, turn in (((9, 12), False), ((12, 9), True))
    )
    for target, matrix in ((straight, weight), (turned, weight.t())):
        cached(target, matrix)
        cached(target, matrix, digest.of_tensor(weight))
    assert len(calls) == 2
    cached(straight, weight, digest.of_tensor(weight + 1))
    assert len(calls) == 3


@pytest.mark.parametrize("damage", ["flip", "truncate", "foreign", "pickle"])
def test_damaged_cache_is_rebuilt(tmp_path, damage):
    torch.manual_seed(0)
    weight, calls, told = torch.randn(12, 9), [], []
    cached = FactorCache(tmp_path, {}, told.append).wrap(counting(calls))
    expected = cached(TARGET, weight)
    (file,) = tmp_path.glob("*.safetensors")
    good = file.read_bytes()
    if damage == "flip":
        file.write_bytes(good[:-5] + bytes([good[-5] ^ 1]) + good[-4:])
    elif damage == "truncate":
        file.write_bytes(good[:-50])
    elif damage == "pickle":
        torch.save({"U": expected.U}, file)
    else:
        save_file({"U": expected.U, "s": expected.s, "V": expected.V}, file)
    again = cached(TARGET, weight)
    assert torch.equal(again.U, expected.U)
    assert len(calls) == 2
    assert len(told) == 1
    assert "model.q_proj is decomposed again" in told[0]
    assert isinstance(cached(TARGET, weight), CachedDecomposition), "the file was not mended"


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    told = []
    cached = FactorCache(tmp_path / "file" / "below", {}, told.append).wrap(counting([]))
    assert cached(TARGET, torch.randn(12, 9)).U.shape == (12, 3)
    assert "the factor cache is not written" in told[0]


def test_a_cache_file_of_other_shapes_is_rebuilt(tmp_path):
    torch.manual_seed(0)
    weight, calls, told = torch.randn(12, 9), [], []
    cached = FactorCache(tmp_path, {}, told.append).wrap(counting(calls))
    cached(TARGET, weight)
    (file,) = tmp_path.glob("*.safetensors")
    with safe_open(file, "pt") as stored:
        metadata, tensors = stored.metadata(), {key: stored.get_tensor(key).clone() for key in ("U", "s", "V")}
    save_file(tensors | {"U": tensors["U"].view(3, 12)}, file, metadata=metadata)
    assert cached(TARGET, weight).U.shape == (12, 3)
    assert len(told) == 1


def test_table_and_json_tell_each_kind_of_layer(folder):
    _, reports = _load(folder, exactly, zero3=False)
    told = table(reports)
    for kind in ("q_proj", "k_proj", "down_proj"):
        assert f"  {kind} " in told
    line = next(line for line in told.splitlines() if "k_proj" in line)
    assert "20 x 40" in line
    captured = [r.captured for r in reports if "k_proj" in r.name]
    weights = [v.double() for k, v in load_file(folder / "model.safetensors").items() if "k_proj.weight" in k]
    expected = [torch.linalg.svdvals(w)[:5].square().sum() / w.square().sum() for w in weights]
    assert captured == pytest.approx([float(e) for e in expected], rel=1e-5)
    stored = as_json(reports, seconds=1.5, world_size=1, peak_gib=[0.5])
    assert len(stored["layers"]) == len(reports) == 14
    assert stored["seconds_by_rank"] == [pytest.approx(sum(r.seconds for r in reports))]


def test_all_architectures_are_listed():
    assert {"llama", "mistral", "gemma", "qwen2", "phi3", "gpt2", "rwkv"} <= set(CONFIGS)
