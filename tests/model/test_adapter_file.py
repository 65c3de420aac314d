"""sorsa_config.json, which comes with an adapter from anywhere: what is wrong with it is said by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from sorsa_ds.model.adapter_file import (
    CONFIG,
    EARLIER,
    INITIAL,
    TRAINED,
    file_of,
    open_factors,
    read_description,
    record_digests,
)

ADAPTER = Path(__file__).parents[1] / "fixtures" / "run_of_0.1.0" / "adapter"
WHOLE = json.loads((ADAPTER / EARLIER[CONFIG]).read_text())
LAYER = "model.layers.0.mlp.up_proj"


def refusal(folder, text: str) -> str:
    (folder / CONFIG).write_text(text)
    with pytest.raises(ValueError) as caught:
        read_description(folder)
    assert str(caught.value).startswith(f"{folder / CONFIG}: not the description of an adapter of this program (")
    return str(caught.value)


def test_a_description_of_an_earlier_version_is_read():
    found = read_description(ADAPTER)
    assert found.base_model == WHOLE["base_model"]
    assert found.layers == WHOLE["layers"]
    assert found.adapter.rank == 4
    assert found.adapter.experts == "frozen", "it knew no other"


def test_files_of_an_earlier_version_are_found_under_the_names_that_it_gave_them(tmp_path):
    """PEFT's files may come to lie under these names once the adapter has been finished by this version."""
    folder = Path(shutil.copytree(ADAPTER, tmp_path / "adapter"))
    assert file_of(folder, TRAINED) == folder / "adapter_model.safetensors"
    described = read_description(folder)
    assert described.files.keys() == {TRAINED, INITIAL}
    name = f"{LAYER}.U"
    then = open_factors(folder, TRAINED, described).tensor(name).clone()  # which no longer maps the file
    shutil.copy(folder / "adapter_model.safetensors", folder / TRAINED)
    record_digests(folder)
    (folder / "adapter_model.safetensors").write_bytes(b"another's")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert file_of(folder, TRAINED) == folder / TRAINED
    assert read_description(folder) == described
    assert torch.equal(open_factors(folder, TRAINED, described).tensor(name), then)
    with (folder / TRAINED).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(ValueError, match="trained_factors.safetensors is damaged"):
        open_factors(folder, TRAINED, described)


def with_entry(path: str, value) -> str:
    """The description with one entry set; its path has slashes, because names of layers have dots."""
    found = json.loads(json.dumps(WHOLE))
    section = found
    *sections, last = path.split("/")
    for name in sections:
        section = section[name]
    section[last] = value
    return json.dumps(found)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("base_model", 5, "base_model"),
        ("base_model", "", "base_model"),
        ("base_model", "a\0b", "NUL"),
        ("base_model", "\ud800", "no character"),
        ("files", None, "files"),
        ("files", {"../../other.safetensors": "0" * 32}, "../../other.safetensors is no file of an adapter"),
        ("digests", [], "digests"),
        ("digests/model.layers.0.mlp.up_proj.weight", "x", "digests.model.layers.0.mlp.up_proj.weight"),
        ("method", "magic", "method"),
        ("method", [], "method"),
        ("precision", "fp8", "precision"),
        ("layers", [], "layers"),
        ("sorsa/rank", 10**9, "adapter.rank"),
        ("sorsa/rank", "4", "adapter.rank"),
        ("sorsa/rank_pattern", {"q": -1}, "adapter.rank_pattern.q"),
        ("sorsa/unheard", 1, "sorsa.unheard"),
        ("unheard", 1, "unheard"),
        ("residual", [], "residual"),
        ("residual/iterations", 3, "residual.iterations"),
        (f"layers/{LAYER}", {"out": 48, "in": 32}, f"layers.{LAYER}: has out, in instead of out, in and rank"),
        (f"layers/{LAYER}/rank", 33, f"layers.{LAYER}: rank 33 exceeds min(out, in)"),
        (f"layers/{LAYER}/out", 0, f"layers.{LAYER}.out"),
        (f"layers/{LAYER}/out", True, f"layers.{LAYER}.out"),
        (f"layers/{LAYER}/out", 1e300, f"layers.{LAYER}.out"),
        ("loading", "x", "loading"),
    ],
)
def test_an_entry_of_another_type_or_out_of_range_is_named(tmp_path, path, value, named):
    assert named in refusal(tmp_path, with_entry(path, value))


@pytest.mark.parametrize("text", ["[]", "null", "{}", "5", "[" * 100_000, '{"base_model": NaN}', "{"])
def test_what_is_no_description_is_refused(tmp_path, text):
    assert len(refusal(tmp_path, text)) < 400
