"""What other trainers' files say of their data: it becomes the same rows here, is said, or is refused."""

import json
from pathlib import Path

import pytest
import yaml

from sorsa_ds.config.conversion.convert import convert, settings_of, told
from sorsa_ds.config.other_names import here

FACTORY = "model_name_or_path: a\nstage: sft\nfinetuning_type: lora\ntemplate: llama3\ndataset: mine\n"
AXOLOTL = "base_model: a\nadapter: lora\nlora_target_linear: true\n"


@pytest.fixture
def converted(tmp_path):
    """Converts a text beside a listing of one data set, `mine`; returns the settings and the conversion."""

    def act(text, entry=None, **options):
        file = tmp_path / "theirs.yaml"
        file.write_text(text)
        if entry is not None:
            (tmp_path / "data").mkdir(exist_ok=True)
            (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({"mine": entry}))
        made = convert(file, **options)
        return settings_of(made), made

    return act


def test_llama_factorys_instructions_become_turns_in_the_template(converted, tmp_path):
    config, made = converted(FACTORY, {"file_name": "mine.json"})
    assert (config.data.format, config.data.columns) == ("alpaca_chat", {})
    assert "alpaca_chat" in made.notes["dataset"]
    columns = {"prompt": "q", "query": "more", "response": "a", "system": "s", "history": "h"}
    config, _ = converted(FACTORY, {"file_name": "mine.json", "columns": columns})
    assert config.data.columns == {"prompt": "q", "input": "more", "response": "a", "system": "s", "history": "h"}
    for template in ("empty", "default"):
        with pytest.raises(ValueError, match=f"template: '{template}' is a layout of LLaMA-Factory's own"):
            converted(FACTORY.replace("llama3", template), {"file_name": "mine.json"})


def test_llama_factorys_own_sets_on_the_hub_are_taken_from_this_hub(converted):
    entry = {"hf_hub_url": "a/b", "ms_hub_url": "c/d", "om_hub_url": "e/f", "ranking": False, "file_sha1": "0"}
    assert converted(FACTORY, entry)[0].data.path == "a/b"
    del entry["hf_hub_url"]
    with pytest.raises(ValueError, match="ms_hub_url, om_hub_url of mine"):
        converted(FACTORY, entry)
    with pytest.raises(ValueError, match="ranking of mine"):
        converted(FACTORY, {"file_name": "mine.json", "ranking": True})


def test_what_stands_beside_conversations_is_read_by_its_own_name(converted):
    entry = {"file_name": "mine.json", "formatting": "sharegpt"}
    columns = {"messages": "talk", "system": "system", "tools": "tools"}
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    config, _ = converted(FACTORY, {**entry, "columns": columns, "tags": tags})
    assert (config.data.format, config.data.columns) == ("chat", {"messages": "talk"})
    for odd in ({"columns": {"tools": "schemas"}}, {"tags": {"role_tag": "who"}}, {"tags": {"user_tag": "me"}}):
        with pytest.raises(ValueError, match=f"{next(iter(next(iter(odd.values()))))} of mine"):
            converted(FACTORY, {**entry, **odd})


def test_plain_text_is_learned_as_such(converted):
    text = FACTORY.replace("stage: sft", "stage: pt")
    config, made = converted(text, {"file_name": "mine.json", "columns": {"prompt": "text"}})
    assert (config.data.format, config.data.columns) == ("text", {"text": "text"})
    assert "loses its end" in made.notes["dataset"]
    with pytest.raises(ValueError, match="formatting"):
        converted(text, {"file_name": "mine.json", "formatting": "sharegpt"})


def test_a_data_file_is_named_from_where_its_listing_was_found(converted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    config, _ = converted(FACTORY, {"file_name": "mine.json"})
    assert Path(config.data.path).absolute() == tmp_path / "data" / "mine.json"
    monkeypatch.chdir(tmp_path)
    assert converted(FACTORY, {"file_name": "mine.json"})[0].data.path == "data/mine.json"


@pytest.mark.parametrize(
    ("roles", "known"),
    [
        ({"user": ["human", "user"], "assistant": ["gpt"]}, True),
        ({"system": ["system"], "tool": ["observation"]}, True),
        ({"user": ["gpt"]}, False),
        ({"critic": ["critic"]}, False),
        (["user"], False),
    ],
)
def test_roles_that_conversations_may_have_are_understood(converted, roles, known):
    text = AXOLOTL + yaml.safe_dump({"datasets": [{"path": "a/b", "type": "chat_template", "roles": roles}]})
    if known:
        assert converted(text)[0].data.format == "chat"
    else:
        with pytest.raises(ValueError, match="datasets: roles="):
            converted(text)


def test_held_out_rows_are_read_as_training_rows_are(converted):
    held = {"path": "json", "data_files": "e.jsonl", "type": "chat_template", "split": "test"}
    text = AXOLOTL + yaml.safe_dump({"datasets": [{"path": "a/b", "type": "chat_template"}], "test_datasets": [held]})
    config, _ = converted(text)
    assert (config.data.eval_path, config.data.eval_split) == ("e.jsonl", "test")
    with pytest.raises(ValueError, match="test_datasets: .* data.format is 'alpaca' for them and 'chat' for those"):
        converted(
            text.replace("e.jsonl\n  path: json\n  split: test\n  type: chat_template", "e.jsonl\n  type: alpaca")
        )
    several = yaml.safe_dump({"datasets": [{"path": one, "type": "alpaca"} for one in "ab"], "test_datasets": [held]})
    with pytest.raises(
        ValueError, match="test_datasets: several training sets .* write eval_path into one of data.mix"
    ):
        converted(AXOLOTL + several)


@pytest.mark.parametrize("text", [AXOLOTL + "sample_packing: true\n", "use_peft: false\npacking: true\n"])
def test_packing_says_what_becomes_of_the_batch(converted, text):
    config, made = converted(text)
    assert config.data.packing
    assert "multiply it by the examples that fit into a row" in "\n".join(told(made))


def test_axolotls_long_examples_are_dropped_unless_it_says_otherwise(converted):
    assert converted(AXOLOTL)[0].data.truncation == "drop"
    assert converted(AXOLOTL + "excess_length_strategy: truncate\n")[0].data.truncation == "right"
    assert converted(AXOLOTL + "excess_length_strategy: raise\n")[0].data.truncation == "error"


@pytest.mark.parametrize(
    "key", ["lora_model_dir", "adapter_name_or_path", "default_system", "rope_scaling", "eos_token"]
)
def test_keys_that_change_what_is_learned_are_refused(converted, key):
    with pytest.raises(ValueError, match=f"  {key}: "):
        converted(f"{AXOLOTL}{key}: something\n")
    assert here(key).alters


@pytest.mark.parametrize("first", ["cosine_min_lr_ratio", "lr_scheduler"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_order_of_keys_does_not_choose_the_schedule(converted, first, schedule):
    lines = {"cosine_min_lr_ratio": "cosine_min_lr_ratio: 0.1\n", "lr_scheduler": f"lr_scheduler: {schedule}\n"}
    last = next(key for key in lines if key != first)
    config, made = converted(AXOLOTL + lines[first] + lines[last])
    if schedule == "cosine":
        assert (config.train.schedule, config.train.min_lr_ratio) == ("cosine_with_min_lr", 0.1)
    else:
        assert (config.train.schedule, config.train.min_lr_ratio) == ("linear", 0.0)
        assert "linear has no floor" in made.left["cosine_min_lr_ratio"]


@pytest.mark.parametrize(
    ("text", "precision"),
    [
        ("num_train_epochs: 1\nbf16: false\nfp16: false\n", "fp32"),
        ("num_train_epochs: 1\nbf16: true\nfp16: false\n", "mixed"),
        ("num_train_epochs: 1\nbf16: false\nfp16: true\n", "auto"),
        ("num_train_epochs: 1\n", "auto"),
        ("base_model: a\nbf16: false\n", "fp32"),
    ],
)
def test_a_trainer_without_bf16_and_fp16_computes_in_fp32(converted, text, precision):
    assert converted(text)[0].train.precision == precision


def test_a_hub_revision_is_one_to_upload_to(converted):
    config, made = converted("num_train_epochs: 1\nhub_revision: mine\nmodel_revision: theirs\n")
    assert config.loading.revision == "theirs"
    assert "nothing is uploaded" in made.left["hub_revision"]


@pytest.mark.parametrize("value", ["none", "[none]"])
def test_no_tracker_is_no_name_of_one(converted, value):
    _, made = converted(f"num_train_epochs: 1\nreport_to: {value}\n")
    assert "report_to" in made.unset
    assert "report_to" not in made.left


def test_axolotls_prompt_differs_by_a_line_end(converted):
    _, made = converted(AXOLOTL + "datasets: [{path: a/b, type: alpaca}]\n")
    assert "on a new line in axolotl" in made.notes["datasets"]
