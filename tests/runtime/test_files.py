"""Files that are never seen half-written."""

import pytest
import torch
from safetensors.torch import save_file

from sorsa_ds.runtime.files import write_atomic, write_json, write_text


def test_every_file_may_be_read_by_whom_any_other_may(tmp_path):
    """safetensors itself makes files of mode 0600, which nobody else on a shared disk could resume from or load."""
    write_text(tmp_path / "text", "x")
    write_atomic(tmp_path / "numbers", lambda temporary: save_file({"x": torch.ones(2)}, temporary))
    assert (tmp_path / "numbers").stat().st_mode == (tmp_path / "text").stat().st_mode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["numbers", "text"]


@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan")])
def test_a_number_that_json_cannot_hold_is_named_with_its_place_and_file(tmp_path, number):
    file = tmp_path / "report.json"
    write_json(file, {"loss": 1.5})
    with pytest.raises(ValueError) as caught:
        write_json(file, {"layers": [{"error": 0.5}, {"error": number}]})
    assert str(caught.value) == f"{file}: layers.1.error is {number}, which JSON cannot hold"
    assert file.read_text() == '{\n  "loss": 1.5\n}\n'
