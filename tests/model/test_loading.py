"""From disk to a SORSA model: equal to the pre-trained one at step 0, whole or cut, in every architecture."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from sorsa_ds.config.schema import AdapterConfig, LoadingConfig
from sorsa_ds.model.fill import fill_parameters
from sorsa_ds.model.selection import select_targets
from sorsa_ds.model.sharding import Whole
from sorsa_ds.model.skeleton import skeleton
from sorsa_ds.model.targets import insert_sorsa_layers
from sorsa_ds.runtime.precision import resolve_precision
from sorsa_ds.sorsa.residual_storage import Dense
from tests.helpers.architectures import CONFIGS, exactly, save
from tests.helpers.distances import relative
from tests.helpers.engines import INPUT, logits_and_gradients
from tests.helpers.sorsa_models import load_sorsa_model, sorsa_layers
from tests.helpers.worlds import run_ranks

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One checkpoint of each architecture."""
    root = tmp_path_factory.mktemp("models")
    return {name: save(name, root / name) for name in CONFIGS}


def load_whole(folder, precision="fp32", **adapter):
    """The model in one process."""
    return load_sorsa_model(
        folder, adapter=AdapterConfig(**{"rank": 5, **adapter}),
        precision=resolve_precision(precision, None, "cpu"), placement=Whole(CPU), device=CPU, factor_source=exactly,
    )  # fmt: skip


def base_logits(folder, dtype=torch.float32):
    """What transformers' own loader computes (RWKV without its fp16 rescaling, which moves LayerNorm's epsilon)."""
    changes = {"rescale_every": 0} if folder.name == "rwkv" else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **changes).eval()(INPUT).logits.detach()


def _zero3_logits_and_gradients(folders, checkpointing):
    """Logits at step 0 and gradient norms after one backward, on ZeRO-3, for every architecture."""
    from sorsa_ds.model.sharding import Zero3
    from sorsa_ds.runtime import collectives

    results = {}
    for name, folder in folders.items():
        ds = {"train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0.0, "zero_allow_untested_optimizer": True,
              "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100}}  # fmt: skip
        loaded = load_sorsa_model(
            folder, adapter=AdapterConfig(rank=5), precision=resolve_precision("fp32", None, "cpu"),
            placement=Zero3(ds, CPU), device=CPU, factor_source=exactly,
        )  # fmt: skip
        held = sum(p.numel() for p in loaded.model.parameters())
        shards = sum(p.ds_tensor.numel() for p in loaded.model.parameters())
        whole = sum(p.ds_numel for p in loaded.model.parameters())
        if checkpointing and loaded.model.supports_gradient_checkpointing:
            from sorsa_ds.train.setup import checkpoint_activations

            checkpoint_activations(loaded.model)
        results[name] = (*logits_and_gradients(loaded.model, ds), held, shards, whole)
    return results if collectives.rank() == 0 else None


@pytest.mark.parametrize("name", CONFIGS)
def test_whole_model_equals_the_base_model_at_step_0(folders, name):
    loaded = load_whole(folders[name])
    assert len(loaded.targets) >= 8
    with torch.no_grad():
        assert relative(loaded.model.eval()(INPUT).logits, base_logits(folders[name])) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_zero3_equals_the_base_model_and_its_gradients_those_of_one_process(folders, checkpointing):
    results = run_ranks(2, _zero3_logits_and_gradients, folders, checkpointing)[0]
    for name, (logits, norms, held, shards, whole) in results.items():
        assert relative(logits, base_logits(folders[name])) < 1e-5, name
        assert held == 0, f"{name}: a rank holds whole parameters"
        assert whole / 2 <= shards < 0.52 * whole, f"{name}: {shards} of {whole} on one of two ranks"
        model = load_whole(folders[name]).model.train()
        if "dropout" not in str(model):  # the same function only where nothing is random
            model(INPUT).logits.float().logsumexp(-1).mean().backward()
            expected = [p.grad.norm().item() for p in model.parameters() if p.requires_grad]
            assert norms == pytest.approx(expected, rel=1e-4, abs=1e-7), name


def test_memory_that_the_decompositions_leave_is_returned_when_the_model_is_filled(folders, monkeypatch):
    happened = []

    def filled(*arguments, **options):
        found = fill_parameters(*arguments, **options)
        happened.append("filled")
        return found

    monkeypatch.setattr("sorsa_ds.model.load.fill_parameters", filled)
    monkeypatch.setattr("sorsa_ds.model.load.return_cached_memory", happened.append)
    load_whole(folders["llama"])
    assert happened == ["filled", CPU]


@pytest.mark.parametrize("name", CONFIGS)
def test_an_fp32_run_on_a_bf16_checkpoint_is_what_transformers_loads_in_fp32(tmp_path, name):
    """Buffers too: in bf16, Gemma's embedding scale would be off by 1e-3. RWKV's states multiply rounding errors."""
    folder = save(name, tmp_path / "bf16", torch.bfloat16)
    with torch.no_grad():
        gap = relative(load_whole(folder).model.eval()(INPUT).logits, base_logits(folder))
    assert gap < (2e-4 if name == "rwkv" else 1e-5)


def test_bf16_checkpoint_and_bf16_run_start_where_the_base_does(tmp_path):
    folder = save("llama", tmp_path / "bf16", torch.bfloat16)
    with torch.no_grad():
        exact = load_whole(folder).model.eval()(INPUT).logits
        assert relative(exact, base_logits(folder)) < 1e-5
        ours = load_whole(folder, "bf16").model.eval()(INPUT).logits.float()
        theirs = base_logits(folder, torch.bfloat16).float()
    # Both are roundings of the same function; SORSA's must not be further off than plain bf16 by more than its own.
    assert relative(ours, exact) < 2 * relative(theirs, exact)


@pytest.mark.parametrize(
    ("shape", "rank", "expected"),
    [
        (dict(model_type="llama", hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
              num_attention_heads=32, num_key_value_heads=32, vocab_size=32000), 128, 319.8e6),
        (dict(model_type="mistral", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
              num_attention_heads=32, num_key_value_heads=8, vocab_size=32000), 64, 167.8e6),
        (dict(model_type="gemma", hidden_size=3072, intermediate_size=24576, num_hidden_layers=28,
              num_attention_heads=16, num_key_value_heads=16, head_dim=256, vocab_size=256000), 64, 200.0e6),
    ],
    ids=["llama-2-7b", "mistral-7b", "gemma-7b"],
)  # fmt: skip
def test_parameter_counts_are_the_published_ones(tmp_path, shape, rank, expected):
    import json

    (tmp_path / "config.json").write_text(json.dumps(shape))
    model = skeleton(tmp_path, LoadingConfig())
    config = AdapterConfig(rank=rank)
    targets = select_targets(model, config)
    insert_sorsa_layers(model, targets, config, resolve_precision("fp32", None, "cpu"), Dense(torch.float32))
    counted = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counted == sum(t.trainable for t in targets)
    assert counted == pytest.approx(expected, rel=5e-4)


def test_rank_by_pattern_and_targets_by_suffix_and_glob(folders):
    loaded = load_whole(folders["llama"], targets=["q_proj", "*layers.1.mlp.*"], rank_pattern={"mlp.up_proj": 3})
    ranks = {name.split("layers.")[1]: layer.rank for name, layer in sorsa_layers(loaded.model).items()}
    assert ranks == {
        "0.self_attn.q_proj": 5, "1.self_attn.q_proj": 5,
        "1.mlp.gate_proj": 5, "1.mlp.up_proj": 3, "1.mlp.down_proj": 5,
    }  # fmt: skip
    trainable = {name for name, p in loaded.model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in trainable} == {"U", "s", "V"}


def test_output_head_is_adapted_only_when_it_is_named(folders):
    assert not any("lm_head" in t.name for t in load_whole(folders["llama"]).targets)
    assert [t.name for t in load_whole(folders["llama"], targets=["lm_head"]).targets] == ["lm_head"]


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"targets": ["qproj"]}, "'qproj' matches no linear of this model. Did you mean 'q_proj'"),
        ({"rank_pattern": {"router": 4}}, "adapter.rank_pattern: 'router' matches no linear"),
        (
            {"rank": 61},
            r"rank 61 exceeds min\(out, in\) = 40 of model.layers.0.self_attn.q_proj \(40 x 40\) and of 3 more; "
            r".* = 20 of model.layers.0.self_attn.k_proj \(20 x 40\) and of 3 more; .*: lower adapter.rank "
            r"\(all of them allow 20\)",
        ),
        ({"targets": []}, "selects no linear"),
    ],
)
def test_bad_targets_and_ranks_are_named(folders, adapter, message):
    with pytest.raises(ValueError, match=message):
        load_whole(folders["llama"], **adapter)


def test_bad_checkpoints_are_named(tmp_path):
    folder = save("llama", tmp_path / "m")
    file = folder / "model.safetensors"
    good = file.read_bytes()
    file.write_bytes(good[: len(good) // 2])
    with pytest.raises(ValueError, match=r"model.safetensors: truncated"):
        load_whole(folder)
    file.rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="only pickle files.*save_pretrained"):
        load_whole(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="no model.safetensors"):
        load_whole(folder)


def _shards(folder):
    """Save the weights of a folder again, in several files with an index."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20kB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_sharded_checkpoint_in_any_dtype_is_the_base_model(tmp_path, dtype):
    folder = _shards(save("qwen2", tmp_path / "m", dtype))
    with torch.no_grad():
        assert relative(load_whole(folder).model.eval()(INPUT).logits, base_logits(folder)) < 1e-5


def test_bad_shards_and_indices_are_named(tmp_path):
    folder = _shards(save("llama", tmp_path / "m"))
    second = sorted(folder.glob("model-*.safetensors"))[1]
    good = second.read_bytes()
    second.write_bytes(good[:-100])
    with pytest.raises(ValueError, match=rf"{second.name}: truncated"):
        load_whole(folder)
    second.unlink()
    with pytest.raises(ValueError, match=rf"1 shards are missing, first {second.name}"):
        load_whole(folder)
    for text in ("[]", "{", '{"weight_map": 3}'):
        (folder / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ValueError, match="index.json: not a safetensors index"):
            load_whole(folder)


def test_a_single_file_comes_before_an_index_as_in_transformers(tmp_path):
    folder = _shards(save("llama", tmp_path / "m"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.save_pretrained(tmp_path / "again")
    (tmp_path / "again" / "model.safetensors").rename(folder / "model.safetensors")
    with torch.no_grad():
        assert relative(load_whole(folder).model.eval()(INPUT).logits, base_logits(folder)) < 1e-5


def _rewrite(folder, change):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


UP, EMBEDDING = "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({UP: torch.zeros(80, 40)}), rf"{UP} has shape \[80, 40\], the model's .* \[76, 40\]"),
        (lambda t: t.update({EMBEDDING: t[EMBEDDING].t()}), rf"{EMBEDDING} has shape \[40, 64\]"),
        (lambda t: t.update({UP: t[UP].to(torch.int8)}), rf"{UP} is stored as I8; F64, F32, F16, BF16 can be read"),
        (lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)}), rf"{UP} is stored as F8_E4M3"),
        (lambda t: t[EMBEDDING].fill_(float("nan")), rf"{EMBEDDING}: the pre-trained parameter holds NaN or Inf"),
    ],
)
def test_weights_that_do_not_fit_the_model_are_named(tmp_path, change, message):
    folder = save("llama", tmp_path / "m")
    _rewrite(folder, change)
    with pytest.raises(ValueError, match=message):
        load_whole(folder)


def test_quantised_and_falsely_tied_checkpoints_are_refused(tmp_path):
    import json

    folder = save("llama", tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(ValueError, match=r"lm_head.weight and model.embed_tokens.weight are tied by config.json"):
        load_whole(folder)
    _rewrite(folder, lambda t: t.update({"lm_head.weight": t[EMBEDDING].clone()}))
    load_whole(folder)
    quantised = config | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    (folder / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(ValueError, match="its weights are quantised"):
        load_whole(folder)


def test_a_pickle_only_repository_on_the_hub_is_refused_with_the_way_to_convert_it(tmp_path, monkeypatch):
    from sorsa_ds.model import pretrained

    class Hub:
        def list_repo_files(self, name, revision):
            return ["config.json", "pytorch_model.bin"]

    monkeypatch.setattr(pretrained, "snapshot_download", lambda *_, **__: tmp_path)
    monkeypatch.setattr(pretrained, "HfApi", Hub)
    monkeypatch.setattr(pretrained.hub, "can_be_read", lambda *_: True)
    with pytest.raises(ValueError, match=r"someone/old: only pickle files.*T.from_pretrained\('someone/old'\)"):
        pretrained.find_folder("someone/old", LoadingConfig())


def test_missing_parameter_and_nan_weight_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save("llama", tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    broken = {k: v for k, v in tensors.items() if "layers.1.mlp.up_proj" not in k}
    save_file(broken, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 parameters of LlamaForCausalLM.*up_proj"):
        load_whole(folder)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="model.layers.1.mlp.up_proj: .* NaN or Inf"):
        load_whole(folder)


def _fails_everywhere(folder):
    """The type and message that each rank gets from a checkpoint with one bad layer."""
    try:
        load_whole(folder)
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def _one_rank_sees_a_truncated_copy(good, bad):
    from sorsa_ds.runtime import collectives

    return _fails_everywhere(bad if collectives.rank() == 1 else good)


@pytest.mark.slow
def test_a_copy_that_is_bad_on_one_node_stops_all_ranks(tmp_path):
    good, bad = save("llama", tmp_path / "good"), save("llama", tmp_path / "bad")
    file = bad / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    (kind0, told0), (kind1, told1) = run_ranks(2, _one_rank_sees_a_truncated_copy, good, bad)
    assert (kind0, kind1) == ("PeerError", "ValueError")
    assert "truncated" in told0 and "truncated" in told1


@pytest.mark.slow
def test_a_bad_layer_stops_all_ranks_with_its_message(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save("llama", tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    told = run_ranks(2, _fails_everywhere, folder)
    assert sorted(kind for kind, _ in told) == ["PeerError", "ValueError"]
    assert all("model.layers.1.mlp.up_proj" in message for _, message in told)
