"""The page in examples/: it runs by itself, learns, and its functions are what their equations say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples.sorsa_in_one_page import DenseSorsa, change, learning_rate, regularizer_loss

PAGE = Path(__file__).resolve().parents[2] / "examples" / "sorsa_in_one_page.py"


def test_the_program_learns_keeps_vectors_orthonormal_and_merges(tmp_path):
    """Run anywhere, without arguments, and without the package."""
    isolated = [sys.executable, "-I", str(PAGE)]
    done = subprocess.run(isolated, cwd=tmp_path, text=True, capture_output=True, check=True, timeout=120)
    parts = done.stdout.split("gamma / eta_d = ")[1:]
    assert [part.partition(":")[0] for part in parts] == ["0.0", "0.2"]
    ends = []
    for part in parts:
        steps = [tuple(map(float, found)) for found in re.findall(r"^ +(\d+) +(\S+) +(\S+) +(\S+)$", part, re.M)]
        assert [step[0] for step in steps] == [1, *range(25, 201, 25)]
        assert steps[0][1] > 3.0
        assert steps[-1][1] < 0.15
        assert steps[0][3] < 1e-4
        assert float(re.search(r"start (\S+) from", part)[1]) < 1e-6
        gaps = [float(gap) for gap in re.findall(r"within (\S+)", part)]
        assert len(gaps) == 2
        assert max(gaps) < 1e-5
        ends.append(steps[-1][3])
    assert ends[1] < 0.1 * ends[0]
    assert "sorsa_ds" not in re.findall(r"^(?:from|import) (\w+)", PAGE.read_text(encoding="utf-8"), re.M)


def test_a_layer_starts_as_its_weight_with_the_largest_triplets_in_front():
    torch.manual_seed(0)
    W = torch.randn(7, 5)
    layer = DenseSorsa.of(W, 3)
    assert (layer.merged() - W).abs().max() < 1e-5
    assert torch.linalg.matrix_rank(layer.W_r) == 2
    torch.testing.assert_close(layer.s.detach(), torch.linalg.svdvals(W)[:3])
    assert regularizer_loss(layer).item() < 1e-5


@pytest.mark.parametrize(("form", "of_U", "of_V"), [("norm", 3 * 3**0.5, 8 * 3**0.5), ("squared", 27.0, 192.0)])
def test_the_regulariser_of_doubled_and_tripled_vectors(form, of_U, of_V):
    """With U^T U = 4 I and V^T V = 9 I, E is 3 I and 8 I."""
    layer = DenseSorsa.of(torch.eye(5), 3)
    layer.U.data *= 2
    layer.V.data *= 3
    assert regularizer_loss(layer, form, "sum").item() == pytest.approx(of_U + of_V)
    assert regularizer_loss(layer, form, "mean").item() == pytest.approx((of_U + of_V) / 2)


def test_changes_of_singular_values_and_vectors_by_hand():
    """Values 3, 2 become 4, 2, which is half of 1; the vectors of one of the two bases change places."""
    W_0 = torch.diag(torch.tensor([3.0, 2.0]))
    assert change(torch.diag(torch.tensor([4.0, 2.0])), W_0) == pytest.approx((0.5, 0.0))
    assert change(torch.tensor([[0.0, 2.0], [3.0, 0.0]]), W_0) == pytest.approx((0.0, 0.5))


def test_the_learning_rate_warms_up_and_follows_half_a_cosine():
    rates = [learning_rate(t, 1.0, 2, 6) for t in range(7)]
    assert rates == pytest.approx([0, 0.5, 1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0])
