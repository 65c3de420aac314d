"""Where other trainers' keys mean something else than they seem to: it is said or refused, and never carried over."""

import pytest
import yaml

from sorsa_ds.config.conversion.convert import convert, settings_of, told

LORA = {
    "axolotl": "base_model: a\nadapter: lora\nlora_r: 16\nlora_target_modules: [q_proj]\nlora_alpha: 32\n",
    "LLaMA-Factory": "model_name_or_path: a\nstage: sft\nfinetuning_type: lora\nlora_rank: 16\nlora_alpha: 32\n",
    "PEFT": "peft_type: LORA\nr: 16\ntarget_modules: [q_proj]\nlora_alpha: 32\nuse_rslora: true\n",
    "TRL": "model_name_or_path: a\nuse_peft: true\nlora_target_modules: [q_proj]\nlora_alpha: 32\n",
}
"""A file of each kind that trains LoRA at rank 16 with alpha 32."""


@pytest.fixture
def converted(tmp_path):
    """Converts a text; returns the settings and the conversion."""

    def act(text, **options):
        file = tmp_path / "theirs.yaml"
        file.write_text(text)
        made = convert(file, **options)
        return settings_of(made), made

    return act


@pytest.mark.parametrize("kind", LORA)
@pytest.mark.parametrize("method", [None, "sorsa"])
def test_loras_scale_is_left_with_lora(converted, kind, method):
    """SORSA begins at the weight itself, which has nothing to scale."""
    config, made = converted(LORA[kind], method=method)
    assert made.kind.title == kind
    assert (config.method, config.adapter.rank, config.adapter.alpha, config.adapter.rslora) == (
        "sorsa",
        16,
        None,
        False,
    )
    assert "scale 1" in made.left["lora_alpha"]
    assert "lora_alpha" in "\n".join(told(made))
    kept, _ = converted(LORA[kind], method="lora")
    assert (kept.method, kept.adapter.alpha) == ("lora", 32.0)
    assert kept.adapter.rslora == (kind == "PEFT")


@pytest.mark.parametrize("kind", LORA)
def test_a_scale_that_the_file_does_not_say_is_that_of_lora_alone(converted, kind):
    text = LORA[kind].replace("lora_alpha: 32\n", "").replace("use_rslora: true\n", "")
    config, made = converted(text)
    assert config.adapter.alpha is None
    assert not any("alpha" in key for key in (*made.defaulted, *made.left))
    kept, _ = converted(text, method="lora")
    assert kept.adapter.alpha == {"axolotl": None, "LLaMA-Factory": 32.0, "PEFT": 8.0, "TRL": 32.0}[kind]


def test_axolotls_batch_is_that_of_one_gpu(converted):
    """Its accumulation is batch_size // micro_batch_size, where the file does not say it."""
    text = "base_model: a\nadapter: lora\nmicro_batch_size: 2\nbatch_size: 8\n"
    config, made = converted(text)
    assert (config.train.gradient_accumulation_steps, config.train.global_batch_size) == (4, None)
    assert "8 // 2" in made.notes["batch_size"]
    config, _ = converted(text, gpus=4)
    assert config.train.global_batch_size == 32
    config, _ = converted(text + "gradient_accumulation_steps: 3\n", gpus=4)
    assert config.train.global_batch_size == 24
    with pytest.raises(ValueError, match="batch_size: 1 is no number of examples of one GPU"):
        converted(text.replace("batch_size: 8", "batch_size: 1"))


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("peft_type: LORA\nr: 8\ntarget_modules: null\n", "target_modules"),
        ("peft_type: LORA\nr: 8\n", "target_modules"),
        ("model_name_or_path: a\nuse_peft: true\n", "lora_target_modules"),
    ],
)
@pytest.mark.parametrize("method", [None, "lora"])
def test_targets_that_peft_would_choose_are_not_made_all_linears(converted, text, key, method):
    with pytest.raises(ValueError, match=rf"  {key}: PEFT chooses them(?s:.)*--without {key}"):
        converted(text, method=method)
    config, made = converted(text, method=method, without=[key])
    assert config.adapter.targets == "all-linear"
    assert "all linears" in made.left[key]


def test_trls_defaults_are_taken_for_its_files(converted):
    config, made = converted(LORA["TRL"] + "dataset_name: my/data\n", method="lora")
    assert (config.data.path, config.data.max_length, config.data.eval_size) == ("my/data", 1024, 0)
    assert (config.train.learning_rate, config.train.epochs, config.train.micro_batch_size) == (2e-5, 3.0, 8)
    assert (config.train.precision, config.train.schedule) == ("mixed", "linear")
    assert (config.adapter.rank, config.adapter.dropout) == (16, 0.05)
    said = "\n".join(told(made))
    assert all(one in said for one in ("learning_rate=2e-05", "max_length=1024", "bf16=True", "no held-out rows"))
    assert "learns whole conversations" in said


def test_trl_without_an_adapter_trains_all_weights(converted):
    text = "model_name_or_path: a\ndataset_name: my/data\n"
    config, made = converted(text)
    assert config.method == "full"
    assert "--method sorsa" in made.notes["use_peft"]
    assert converted(text + "use_peft: false\n")[0].method == "full"
    assert converted(text, method="sorsa")[0].method == "sorsa"
    config, made = converted("dataset_name: my/data\nlearning_rate: 1e-4\n")  # a trainer's alone say nothing of it
    assert config.method == "sorsa"
    assert "does not say it" in made.notes["method"]


@pytest.mark.parametrize(
    "text",
    [
        "per_device_train_batch_size: 4\nnum_train_epochs: 1\n",
        "base_model: a\nadapter: lora\n",
        "model_name_or_path: a\nstage: sft\nfinetuning_type: lora\n",
    ],
)
def test_no_rows_are_held_out_of_the_training_data_unless_the_file_says_so(converted, text):
    config, made = converted(text)
    assert config.data.eval_size == 0
    assert "no held-out rows" in made.defaulted


def test_held_out_data_that_a_file_names_is_evaluated(converted):
    text = "base_model: a\nadapter: lora\ntest_datasets: [{path: held.jsonl}]\n"
    config, _ = converted(text)
    assert (config.data.eval_path, config.data.eval_size) == ("held.jsonl", 16)


def test_the_best_checkpoint_is_not_what_a_run_leaves_at_its_end(converted):
    _, made = converted("per_device_train_batch_size: 4\nload_best_model_at_end: true\n")
    assert "last step" in made.notes["load_best_model_at_end"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"min_lr": 1e-6, "min_lr_rate": 0.1}, "min_lr=1e-06, min_lr_rate=0.1: leave one"),
        ({"min_lr": "low"}, "min_lr='low'"),
        ({"min_lr": None}, "nothing"),
    ],
)
def test_two_least_rates_or_none_are_refused_by_name(converted, given, message):
    text = yaml.safe_dump({"num_train_epochs": 1, "learning_rate": 1e-4, "lr_scheduler_kwargs": given})
    with pytest.raises(
        ValueError, match=f"lr_scheduler_kwargs: the least rate is one number, and here it is {message}"
    ):
        converted(text)


def test_a_least_rate_beside_an_unset_one_is_taken(converted):
    given = {"min_lr": None, "min_lr_rate": 0.1}
    config, _ = converted(yaml.safe_dump({"num_train_epochs": 1, "lr_scheduler_kwargs": given}))
    assert config.train.min_lr_ratio == 0.1


def test_a_place_where_data_sets_are_looked_up_is_named_once(converted, tmp_path, monkeypatch):
    text = "model_name_or_path: a\nstage: sft\ndataset: mine\n"
    for folder in (str(tmp_path / "data"), "data"):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match="dataset_info.json") as error:
            converted(text + f"dataset_dir: {folder}\n")
        assert str(error.value).count("dataset_info.json,") + str(error.value).count("data/dataset_info.json") == 2
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"data/dataset_info\.json or /"):
        converted(text)
