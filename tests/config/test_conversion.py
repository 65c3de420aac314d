"""Other trainers' files as settings of this program: what is carried over, what is said, and what is refused."""

import json

import pytest
import yaml
from peft import LoraConfig
from transformers import TrainingArguments

from sorsa_ds.config.command_line import load_settings
from sorsa_ds.config.conversion.convert import as_yaml, convert, settings_of, told
from sorsa_ds.config.conversion.foreign import KINDS
from sorsa_ds.config.conversion.rules import RULES
from sorsa_ds.config.fields import leaves
from sorsa_ds.config.other_names import TABLES, here
from sorsa_ds.config.schema import RunConfig
from sorsa_ds.config.yaml_reader import MOST_BYTES

AXOLOTL = """
base_model: NousResearch/Llama-3.2-1B
load_in_8bit: false
load_in_4bit: true
datasets:
  - path: teknium/GPT4-LLM-Cleaned
    type: alpaca
dataset_prepared_path: last_run_prepared
val_set_size: 0.1
output_dir: ./outputs/qlora-out
adapter: qlora
lora_model_dir:
sequence_len: 2048
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules: [q_proj, v_proj]
wandb_project: mine
wandb_name: first
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 3
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 2e-4
bf16: auto
gradient_checkpointing: true
flash_attention: true
warmup_steps: 10
max_steps: 200
evals_per_epoch: 4
save_steps: 50
weight_decay: 0.1
deepspeed: deepspeed_configs/zero2.json
loss_watchdog_threshold: 5.0
special_tokens: {pad_token: <|end_of_text|>}
"""
FACTORY = """
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
trust_remote_code: true
stage: sft
do_train: true
finetuning_type: lora
lora_target: q_proj,v_proj
dataset: identity,talks
template: llama3
max_samples: 1000
output_dir: saves/lora
save_steps: 500
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 7200
val_size: 0.1
quantization_bit: 8
interleave_probs: 0.7,0.3
mix_strategy: interleave_over
"""
INFO = {
    "identity": {"file_name": "identity.json"},
    "talks": {"hf_hub_url": "a/talks", "formatting": "sharegpt", "columns": {"messages": "conversations"},
              "split": "train"},
}  # fmt: skip


@pytest.fixture
def written(tmp_path):
    """Writes a text, or an object as JSON, into a file; returns the file."""

    def write(content):
        file = tmp_path / "theirs.yaml"
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        return file

    return write


def result(file, **options):
    """The settings that differ from this program's, as path -> value, and the conversion."""
    made = convert(file, **options)
    config, default = settings_of(made), RunConfig()
    found = {}
    for path in leaves(RunConfig):
        now, then = config, default
        for name in path.split("."):
            now, then = getattr(now, name), getattr(then, name)
        if now != then:
            found[path] = now
    return found, made


def test_a_file_of_axolotl(written):
    found, made = result(written(AXOLOTL), gpus=4)
    assert found == {
        "model": "NousResearch/Llama-3.2-1B", "loading.attn_implementation": "flash_attention_2",
        "adapter.targets": ["q_proj", "v_proj"], "adapter.rank": 32, "adapter.dropout": 0.05,
        "residual.storage": "nf4", "data.path": "teknium/GPT4-LLM-Cleaned", "data.format": "alpaca",
        "data.train_split": "train[:90%]", "data.eval_split": "train[90%:]", "data.max_length": 2048,
        "data.truncation": "drop",
        "data.packing": True, "train.steps": 200, "train.global_batch_size": 2 * 4 * 4, "train.micro_batch_size": 2,
        "train.warmup_ratio": 10 / 200, "train.optimizer": "adamw_8bit", "train.weight_decay": 0.1,
        "train.gradient_checkpointing": True, "train.precision": "mixed", "train.seed": 42,
        "output.folder": "./outputs/qlora-out", "output.name": "first", "output.save_every": 50,
        "output.wandb": "online", "output.wandb_project": "mine",
    }  # fmt: skip
    assert made.left.keys() == {
        "dataset_prepared_path", "num_epochs", "evals_per_epoch", "deepspeed", "loss_watchdog_threshold",
        "special_tokens", "lora_alpha",
    }  # fmt: skip
    assert made.unset == ["load_in_8bit", "lora_model_dir"]
    assert made.defaulted == ["excess_length_strategy=drop", "seed=42"]
    said = "\n".join(told(made))
    assert all(key in said for key in (*made.left, *made.unset, "seed=42"))
    assert "--ds_config deepspeed_configs/zero2.json" in said
    sources = {key for _, key in made.settings.values()} | {*made.left, *made.unset, *made.agreed, *made.notes}
    assert yaml.safe_load(AXOLOTL).keys() - sources == set(), "a key is lost without a word"


def test_a_file_of_llama_factory(written, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(INFO))
    file = written(FACTORY.replace("dataset: identity,talks", "dataset: identity"))
    file.write_text(file.read_text().replace("interleave_probs: 0.7,0.3\nmix_strategy: interleave_over\n", ""))
    found, made = result(file, method="lora")
    assert found == {
        "model": "meta-llama/Meta-Llama-3-8B-Instruct", "method": "lora", "adapter.targets": ["q_proj", "v_proj"],
        "adapter.rank": 8, "adapter.alpha": 16.0, "residual.storage": "int8",
        "data.path": str(tmp_path / "data" / "identity.json"),
        "data.format": "alpaca_chat",
        "data.train_split": "train[:1000]", "data.eval_size": 100, "data.max_length": 2048, "train.epochs": 3.0,
        "train.micro_batch_size": 8, "train.gradient_accumulation_steps": 8, "train.learning_rate": 1e-4,
        "train.warmup_ratio": 0.1, "train.gradient_checkpointing": True, "train.precision": "mixed", "train.seed": 42,
        "train.timeout_minutes": 120.0, "output.folder": "saves/lora", "output.save_every": 500,
    }  # fmt: skip
    assert {"trust_remote_code", "template", "do_train"} <= made.left.keys()
    assert any("lora_alpha=16" in line and "cutoff_len=2048" in line for line in told(made))


def test_several_data_sets_are_a_mix(written, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(INFO))
    text = FACTORY.replace("max_samples: 1000\n", "").replace("val_size: 0.1", "val_size: 30")
    config = settings_of(convert(written(text)))
    assert [(one.path, one.weight, one.format, one.columns) for one in config.data.mix] == [
        (str(tmp_path / "data" / "identity.json"), 0.7, "alpaca_chat", None),
        ("a/talks", 0.3, "chat", {"messages": "conversations"}),
    ]  # fmt: skip
    assert (config.data.mix_until, config.data.eval_size) == ("all_exhausted", 30)


def test_an_adapter_of_pefts(written):
    theirs = LoraConfig(
        r=12, lora_alpha=24, lora_dropout=0.1, use_rslora=True, target_modules=["q_proj"], layers_to_transform=[1, 2],
        modules_to_save=["norm"], rank_pattern={"q_proj": 4}, init_lora_weights="pissa_niter_4", task_type="CAUSAL_LM",
        base_model_name_or_path="facebook/opt-125m",
    )  # fmt: skip
    values = {key: [*value] if isinstance(value, set) else value for key, value in theirs.to_dict().items()}
    found, made = result(written(json.loads(json.dumps(values, default=str))))
    assert found == {
        "model": "facebook/opt-125m", "method": "pissa", "baseline.pissa_iterations": 4,
        "adapter.targets": ["q_proj"], "adapter.layers": [1, 2], "adapter.train_whole": ["norm"], "adapter.rank": 12,
        "adapter.rank_pattern": {"q_proj": 4}, "adapter.alpha": 24.0, "adapter.rslora": True, "adapter.dropout": 0.1,
    }  # fmt: skip
    assert "The file names no data" in "\n".join(told(made))


def test_training_arguments_of_transformers(written, tmp_path):
    theirs = TrainingArguments(
        output_dir="out", per_device_train_batch_size=4, num_train_epochs=2, learning_rate=3e-5, adam_beta2=0.95,
        lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.1}, warmup_steps=0.05,
        label_smoothing_factor=0.1, neftune_noise_alpha=5, save_strategy="no", max_grad_norm=0.5, use_cpu=True,
        report_to="tensorboard",
    )  # fmt: skip
    found, made = result(written(theirs.to_json_string()), method="lora")
    assert found == {
        "method": "lora", "train.micro_batch_size": 4, "train.epochs": 2.0, "train.learning_rate": 3e-5,
        "train.gradient_accumulation_steps": 1, "train.gradient_clipping": 0.5,
        "train.adam_betas": (0.9, 0.95), "train.schedule": "cosine_with_min_lr", "train.min_lr_ratio": 0.1,
        "train.warmup_ratio": 0.05, "train.label_smoothing": 0.1, "train.neftune_noise_alpha": 5.0,
        "train.seed": 42, "train.timeout_minutes": 30.0, "output.folder": "out", "output.save_every": 0,
        "train.precision": "fp32",
        "data.eval_size": 0,
        "output.trackers": ["tensorboard"],
    }  # fmt: skip
    assert "this program does not know it" not in made.left.values()
    assert "keep_best" in made.left["load_best_model_at_end"]


@pytest.mark.parametrize("options", [{}, {"gpus": 2}, {"method": "lora", "without": ["load_in_4bit", "adapter"]}])
def test_what_is_written_is_read_by_the_trainer(written, tmp_path, options):
    made = convert(written(AXOLOTL), **options)
    config = settings_of(made)
    file = tmp_path / "ours.yaml"
    file.write_text(as_yaml(made, config))
    assert load_settings(RunConfig, file) == config
    comments = [line for line in file.read_text().splitlines() if line.startswith("#")]
    assert all(any(key in line for line in comments) for key in made.left)
    assert max(map(len, comments)) <= 110


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("adapter: qlora", "adapter: llama-adapter", "adapter: there is no 'llama-adapter' here"),
        ("optimizer: adamw_bnb_8bit", "optimizer: lion_8bit", "optimizer: there is no optimizer 'lion_8bit'"),
        ("lr_scheduler: cosine", "lr_scheduler: rex", "lr_scheduler: there is no schedule 'rex'"),
        ("type: alpaca", "type: metharme", "datasets: type 'metharme'"),
        ("type: alpaca", "type: alpaca\n    shards: 4", "datasets: shards=4"),
        ("max_steps: 200", "", "warmup_steps: 10 steps are a share of a number .*--steps N"),
        ("val_set_size: 0.1", "val_set_size: 0.015", "val_set_size: a share is cut in whole per cent"),
        ("weight_decay: 0.1", "rl: dpo", "rl: preference training"),
        ("weight_decay: 0.1", "train_on_inputs: true", "train_on_inputs: prompts are never learned here"),
        ("weight_decay: 0.1", "total_batch_size: 8\ntrain_batch_size: 9",
         "train_batch_size: train.global_batch_size is 9"),
        ("weight_decay: 0.1", "use_galore: true", "use_galore: there is no such method"),
        ("{pad_token: <|end_of_text|>}", "{eos_token: <|im_end|>}", "special_tokens: eos_token would get another"),
        ("lora_target_modules: [q_proj, v_proj]", "lora_target_modules: 'layers.*q'", r"'layers\.\*q' is a pattern"),
    ],
)  # fmt: skip
def test_what_would_change_the_training_is_refused_by_name(written, before, after, message):
    text = AXOLOTL.replace(before, after)
    assert text != AXOLOTL
    with pytest.raises(ValueError, match=message) as error:
        convert(written(text))
    key = message.partition(":")[0] if ": " in message else "lora_target_modules"
    assert f"--without {key}" in str(error.value)
    left = convert(written(text), without=[key]).left
    assert left[key] == "left out as asked"


def test_axolotl_trains_all_weights_without_an_adapter(written):
    text = "base_model: a\nlearning_rate: 1e-5\nadapter:\nmicro_batch_size: 4\n"
    found, _ = result(written(text))
    assert (found["method"], found["train.micro_batch_size"]) == ("full", 4)


def test_all_linears_that_are_asked_for_beside_some_are_all(written):
    found, _ = result(written(AXOLOTL + "lora_target_linear: true\n"))
    assert "adapter.targets" not in found, "all-linear is the default"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\n", "not a file of a kind that is known, which has one of these keys"),
        ("- base_model\n", "a mapping of settings to values is expected"),
        ("base_model: [\n", "neither YAML nor JSON"),
        ("base_model: &a b\nmodel_type: *a\n", r"an alias \(\*name\) is not read"),
        ("base_model: !!python/object/apply:os.system ['true']\n", r"a tag \(!name\) is not read"),
        ("base_model: a\nbase-model: b\n", "base_model stands there twice, in two spellings"),
        ("base_model: " + "a" * MOST_BYTES, "is larger than the"),
        ("base_model: a\nadapter: lora\nlora_r: 0\n", "adapter.rank = 0: must be integer from 1"),
    ],
)
def test_what_is_no_such_file_is_refused(written, text, message):
    with pytest.raises(ValueError, match=message):
        settings_of(convert(written(text)))


def test_a_key_cannot_step_out_of_its_comment(written, tmp_path):
    made = convert(written({"base_model": "a", "adapter": "lora", "x\nmethod: full\n#": 1, "\u001b[2J": 2}))
    text = as_yaml(made, settings_of(made))
    assert "\x1b" not in text
    assert yaml.safe_load(text) == {
        "model": "a",
        "method": "sorsa",
        **yaml.safe_load(text.partition("method: sorsa\n")[2]),
    }


def test_every_rule_and_default_is_for_a_name_of_the_table():
    tables = yaml.safe_load(TABLES.read_text())
    assert RULES.keys() - leaves(RunConfig).keys() <= tables["same"].keys()
    absent = {name for names in tables["absent"].values() for name in names.split()}
    assert set(tables["alters"].split()) <= absent
    assert here("rl").alters
    assert not here("logging_steps").alters
    for kind in KINDS:
        for key in kind.defaults:
            assert here(key) is not None or [path for path in leaves(RunConfig) if path.endswith(f".{key}")], key
