"""What benchmarks/helpers/live_bytes.py counts, against sizes that are known."""

import torch

from benchmarks.helpers.live_bytes import LiveBytes


def test_the_peak_is_of_tensors_alive_together_and_views_count_once():
    before = torch.zeros(1000)
    with LiveBytes() as live:
        first = before * 2
        second = first + 1
        del first
        view = second.view(10, 100)
        second.add_(1)
        before.add_(1)
        rest = torch.ones(500)
    assert live.peak == 2 * 1000 * 4
    assert live.now == (1000 + 500) * 4
    del second, view, rest
    assert live.now == 0


def test_gradients_count_and_what_backward_has_freed_does_not():
    x, w = torch.randn(100, 50, requires_grad=True), torch.randn(50, 20, requires_grad=True)
    with LiveBytes() as live:
        y = (x @ w).exp()
        y.sum().backward()
        del y
    assert live.now == (x.numel() + w.numel()) * 4
    assert live.peak >= live.now + 100 * 20 * 4
