"""RWKV: version 4 in transformers' pure PyTorch, version 6 by flash-linear-attention where its kernels run."""

import json
import os
import shutil

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, RwkvConfig, RwkvForCausalLM

from sorsa_ds.config.deepspeed_json import resolve_ds_config
from sorsa_ds.config.schema import AdapterConfig, LoadingConfig
from sorsa_ds.model import architectures
from sorsa_ds.model.selection import select_targets
from sorsa_ds.model.skeleton import skeleton
from sorsa_ds.runtime.precision import resolve_precision
from tests.helpers.architectures import exactly, save
from tests.helpers.forked import launch_forked
from tests.helpers.projects import ROOT, launch, metrics
from tests.helpers.worlds import run_ranks

BLOCK = ["attn.r_proj.linear", "attn.k_proj.linear", "attn.v_proj.linear", "attn.g_proj.linear", "attn.o_proj",
         "ffn.key.linear", "ffn.value", "ffn.receptance.linear"]  # fmt: skip
"""The linears of an RWKV6 block that the papers adapt."""

INTERPRETED = (
    "from triton.runtime.autotuner import Autotuner\n"
    "Autotuner._bench = lambda self, *arguments, **settings: [1.0] * 3  # timing a kernel needs a GPU\n"
)
IDS = torch.arange(1, 25).view(2, 12) % 64


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, 256 in all; the first one ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: number for number, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=alphabet[0])


@pytest.fixture(scope="module")
def rwkv6(tmp_path_factory):
    """A random RWKV6 with a tokenizer."""
    fla = pytest.importorskip("fla.models", reason="needs flash-linear-attention: pip install -e '.[rwkv]'")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("rwkv6")
    config = fla.RWKV6Config(
        hidden_size=64, num_heads=2, expand_k=1.0, num_hidden_layers=2, vocab_size=256, proj_low_rank_dim=8,
        gate_low_rank_dim=8, initializer_range=0.2, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    fla.RWKV6ForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Short texts, where a byte is a token; RWKV6 has one kernel for up to 64 and another for more."""
    file = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    file.write_text(
        "".join(json.dumps({"text": f"{i} plus {i} is {2 * i}." + " Really." * (i % 3 * 4)}) + "\n" for i in range(24))
    )
    return [f"data.path={file}", "data.format=text", "data.eval_size=0"]


def falls(losses: list[float]) -> bool:
    return len(losses) >= 3 and losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("origin", ["random", "tiny-rwkv4-660k"])
def test_rwkv4_trains_through_the_command_on_two_ranks(origin, request, project, texts, tmp_path):
    if origin == "random":
        torch.manual_seed(0)
        config = RwkvConfig(
            vocab_size=256, context_length=1024, hidden_size=128, attention_hidden_size=128, intermediate_size=256,
            num_hidden_layers=4, rescale_every=0,
        )  # fmt: skip
        RwkvForCausalLM(config).save_pretrained(tmp_path / "model")
    else:
        real = request.getfixturevalue("shared_data") / "models" / origin
        shutil.copytree(real, tmp_path / "model", copy_function=shutil.copyfile)
        (tmp_path / "model").chmod(0o755)
    byte_tokenizer().save_pretrained(tmp_path / "model")
    short = "data.max_length=32"  # without a GPU a model of RWKV4 computes one position after the other
    words = (*texts, f"model={tmp_path / 'model'}", short, "train.steps=4")
    _, folder, _ = launch_forked(project, f"rwkv4-{origin}", *words)
    assert falls(metrics(folder, "loss"))
    report = json.loads((folder / "report.json").read_text())
    assert report["start_loss"] == pytest.approx(report["base_loss"], rel=1e-5)
    assert report["trainable_parameters"] == 4 * 4 * sum([4 * (128 + 128 + 1), 2 * (256 + 128 + 1), 128 + 128 + 1])


def _train(folder, steps=4):
    """Losses of a few ZeRO-3 steps of a random model on the same tokens."""
    from sorsa_ds.config.schema import TrainConfig
    from sorsa_ds.engine.engine import SorsaEngine
    from sorsa_ds.engine.optimizers import adamw
    from sorsa_ds.engine.schedules import cosine_with_warmup
    from sorsa_ds.model.sharding import Zero3
    from sorsa_ds.sorsa.regularizer import Regularizer
    from sorsa_ds.train.loss import summed_loss
    from tests.helpers.sorsa_models import load_sorsa_model

    device = torch.device("cpu")
    ds = resolve_ds_config({"zero_optimization": {"stage": 3}}, TrainConfig(), 2, "cpu", "fp32").ds
    loaded = load_sorsa_model(
        folder, adapter=AdapterConfig(rank=4), precision=resolve_precision("fp32", None, "cpu"),
        placement=Zero3(ds, device), device=device, factor_source=exactly,
    )  # fmt: skip
    engine = SorsaEngine(
        loaded.model, ds, adamw(3e-3, (0.9, 0.999), 1e-8, 0.0), cosine_with_warmup(steps, 0),
        Regularizer("norm", "mean", 0.2), loaded.exact_factors,
    )  # fmt: skip
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}
    losses = []

    def micro_batch():
        loss = summed_loss(engine, batch) / 22
        losses.append(loss.item())
        yield loss

    for _ in range(steps):
        engine.train_step(micro_batch())
    return losses


@pytest.mark.slow
def test_a_random_rwkv4_trains_under_zero3(tmp_path):
    assert all(falls(losses) for losses in run_ranks(2, _train, save("rwkv", tmp_path / "rwkv")))


def test_an_architecture_whose_package_is_missing_is_named_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(architectures, "PACKAGE", "no_such_package")
    monkeypatch.delitem(architectures.CONFIG_MAPPING._extra_content, "rwkv6", raising=False)
    (tmp_path / "config.json").write_text('{"model_type": "rwkv6"}')
    with pytest.raises(ValueError, match=r"architecture 'rwkv6' of .*: pip install -e '\.\[rwkv\]' \(No module named"):
        skeleton(tmp_path, LoadingConfig())


@pytest.mark.parametrize("text", ['{"model_type": "llama"}', '{"model_type": "own", "auto_map": {}}', "{", None])
def test_the_package_is_not_asked_for_otherwise(tmp_path, monkeypatch, text):
    monkeypatch.setattr(architectures, "PACKAGE", "no_such_package")
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    architectures.register_architecture(tmp_path)


def test_all_linear_is_attention_and_feed_forward_of_rwkv6(rwkv6):
    names = [target.name for target in select_targets(skeleton(rwkv6, LoadingConfig()), AdapterConfig(rank=4))]
    assert names == [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in BLOCK]


def test_a_linear_that_rwkv6_does_not_call_is_refused(rwkv6):
    with pytest.raises(ValueError, match=r"model\.layers\.0\.attn\.x_proj\.2 cannot be adapted"):
        select_targets(skeleton(rwkv6, LoadingConfig()), AdapterConfig(rank=4, targets=["o_proj", "x_proj.2"]))


def run_rwkv6(rwkv6, project, texts, name, *arguments, **options):
    """Losses of three steps on a random RWKV6, checked against the pre-trained model's."""
    _, folder, _ = launch(
        project, name, *texts, f"model={rwkv6}", "train.steps=3", "train.global_batch_size=4",
        "train.learning_rate=3e-3", *arguments, **options,
    )  # fmt: skip
    losses, report = metrics(folder, "loss"), json.loads((folder / "report.json").read_text())
    assert falls(losses)
    assert report["start_loss"] == pytest.approx(report["base_loss"], rel=2e-2)
    return losses


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_random_rwkv6_trains_on_a_gpu(rwkv6, project, texts):
    """Both kernels, in the papers' precision."""
    run_rwkv6(rwkv6, project, texts, "gpu", "train.precision=mixed", ds="stage0", ranks=1, DS_ACCELERATOR="cuda")


@pytest.mark.slow
def test_a_random_rwkv6_trains_alike_whole_and_cut(rwkv6, project, texts, tmp_path):
    """Without a GPU Triton interprets the kernels: slowly, only the one for short sequences, not in bf16."""
    (tmp_path / "sitecustomize.py").write_text(INTERPRETED)
    slow = {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    cut = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    cut["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # else all of so small a model stays whole
    (tmp_path / "zero3.json").write_text(json.dumps(cut))
    short = "data.max_length=64"
    whole = run_rwkv6(rwkv6, project, texts, "whole", short, ds="stage0", ranks=1, **slow)
    parts = run_rwkv6(rwkv6, project, texts, "cut", short, ds=tmp_path / "zero3.json", **slow)
    assert parts == pytest.approx(whole, rel=1e-5)
