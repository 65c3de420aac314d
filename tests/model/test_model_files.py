"""What is no model, and is given as one, is named with what it is and what to do."""

import json

import pytest

from sorsa_ds.config.schema import LoadingConfig
from sorsa_ds.model.data_fit import check_fits
from sorsa_ds.model.model_files import check_model_files, check_model_name
from sorsa_ds.model.skeleton import read_config, skeleton
from sorsa_ds.plan.configuration import configuration_of


def write(path, content) -> None:
    """A JSON file, in a folder that is made for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("described", "base"),
    [
        ({"peft_type": "LORA", "base_model_name_or_path": "Qwen/Qwen3-8B"}, "Qwen/Qwen3-8B"),
        ({"base_model": "meta-llama/Llama-3.1-8B", "layers": {}}, "meta-llama/Llama-3.1-8B"),
        ([], "a base model that it does not name"),
    ],
)
@pytest.mark.parametrize("check", [check_model_files, lambda folder: configuration_of(str(folder), LoadingConfig())])
@pytest.mark.parametrize("name", ["adapter_config.json", "sorsa_config.json"])
def test_an_adapter_is_named_with_its_base_and_the_way_to_train_on_it(tmp_path, name, described, base, check):
    write(tmp_path / name, described)
    with pytest.raises(ValueError, match=rf"is an adapter of {base}, not a model: give that one, or.*merge it first"):
        check(tmp_path)


@pytest.mark.parametrize("name", ["adapter_config.json", "sorsa_config.json"])
def test_the_folder_of_a_run_is_named_with_the_ways_on(tmp_path, name):
    write(tmp_path / "adapter" / name, {"base_model": "base"})
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ValueError, match=r"is a run that fine-tuned base, not a model.*--resume .*--format merged"):
        check_model_files(tmp_path)


@pytest.mark.parametrize("with_config", [False, True])
def test_gguf_is_refused_with_what_to_give_in_its_place(tmp_path, with_config):
    (tmp_path / "model-q4_k_m.gguf").touch()
    if with_config:
        write(tmp_path / "config.json", {"model_type": "llama"})
    with pytest.raises(ValueError, match="weights in GGUF.*give the model that they were made from, in safetensors"):
        check_model_files(tmp_path)
    with pytest.raises(ValueError, match=r"model-q4_k_m.gguf: weights in GGUF"):
        check_model_name(str(tmp_path / "model-q4_k_m.gguf"))


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="is a file; give the folder of a model"):
        check_model_name(str(tmp_path / "model.safetensors"))


def test_code_of_a_models_own_is_named_with_the_option_that_allows_it(tmp_path):
    classes = {"AutoConfig": "configuration_new.NewConfig", "AutoModelForCausalLM": "someone/new--modeling_new.New"}
    write(tmp_path / "config.json", {"model_type": "brand_new", "auto_map": classes})
    with pytest.raises(ValueError, match=r"'brand_new'.*\(configuration_new.py, modeling_new.py\).*trust_remote_code"):
        read_config(tmp_path, LoadingConfig())


@pytest.mark.parametrize("kind", ["t5", "musicgen"])
def test_a_model_that_writes_no_text_by_itself_is_refused_before_it_is_built(tmp_path, kind):
    write(tmp_path / "config.json", {"model_type": kind})
    with pytest.raises(ValueError, match="cannot be built as a causal language model"):
        skeleton(tmp_path, LoadingConfig())


def test_positions_that_need_one_length_are_refused(tmp_path):
    write(tmp_path / "config.json", {"model_type": "reformer", "is_decoder": True, "axial_pos_shape": [8, 16]})
    with pytest.raises(ValueError, match="trained on sequences of exactly 128 tokens"):
        check_fits(tmp_path, LoadingConfig(), [])
