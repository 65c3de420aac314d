"""The file of input directions: what it gives back, and every way in which it does not fit a model."""

import pytest
import torch
from safetensors.torch import save_file

from sorsa_ds.model.input_directions import Directions, InputDirections, Origin, images_of, write_directions
from sorsa_ds.model.targets import Target

M, N, K = 12, 20, 6


@pytest.fixture
def weight():
    return torch.randn(M, N, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def file(tmp_path, weight):
    """Directions of one linear, `q`."""
    directions = torch.linalg.qr(torch.randn(N, K, generator=torch.Generator().manual_seed(1)))[0].t().contiguous()
    path = tmp_path / "directions.safetensors"
    write_directions(path, {"q": Directions(directions, images_of(weight, directions))}, Origin("BASE", "texts", 9))
    return path


def target(name="q", inputs=N, rank=4, experts=0):
    return Target(name, M, inputs, rank, bias=False, transposed=False, experts=experts)


def test_the_first_directions_come_back_for_the_weight_they_were_made_for(file, weight):
    found = InputDirections(str(file))
    found.check([target()])
    all_of_them = found.of("q", weight, K)
    torch.testing.assert_close(all_of_them @ all_of_them.t(), torch.eye(K))
    torch.testing.assert_close(found.of("q", weight, 4), all_of_them[:4], rtol=0, atol=0)
    for dtype in (torch.bfloat16, torch.float16):
        torch.testing.assert_close(found.of("q", weight.to(dtype), 4), all_of_them[:4], rtol=0, atol=0)


def test_another_weight_is_refused_also_one_that_was_trained_a_little(file, weight):
    other = torch.randn(M, N, generator=torch.Generator().manual_seed(2))
    for changed in (other, 1.1 * weight, weight + 0.2 * other):
        with pytest.raises(ValueError, match="was made from BASE, whose q has other weights"):
            InputDirections(str(file)).of("q", changed, K)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (target("k"), "has nothing of k: it was made from BASE"),
        (target(inputs=N + 1), f"q has {N + 1} inputs and {N} in the file"),
        (target(rank=K + 1), f"has {K} directions of q, and rank {K + 1} takes as many as that.*--rank {K + 1}"),
        (target(experts=4), "q holds experts, whose inputs are not measured"),
    ],
)
def test_layers_that_the_file_does_not_fit_are_named(file, asked, said):
    with pytest.raises(ValueError, match=said):
        InputDirections(str(file)).check([target(), asked])


def test_files_of_another_kind_are_refused(tmp_path, file):
    with pytest.raises(ValueError, match="sorsa.directions=.*absent cannot be read"):
        InputDirections(str(tmp_path / "absent"))
    (tmp_path / "cut").write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match="sorsa.directions=.*cut cannot be read"):
        InputDirections(str(tmp_path / "cut"))
    save_file({"q.directions": torch.zeros(K, N)}, tmp_path / "foreign", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="is no file of directions; `sorsa calibrate` writes one"):
        InputDirections(str(tmp_path / "foreign"))
