"""Deletion: maps that name the pixels that matter do better than chance, others worse."""

import pytest
import torch
from torch import nn

from common.deletion import BLUR, TOP, blur, deletion_test


class Corner(nn.Module):
    """A classifier that reads one square: class 1 if its pixels are checkered."""

    def forward(self, x):
        """Map (N, C, 20, 20) to (N, 2)."""
        square = x[:, :, 2:8, 2:8].mean(1)
        sign = 1 - 2 * ((torch.arange(6)[:, None] + torch.arange(6)) % 2)
        score = (square * sign).mean((1, 2)) * 20
        return torch.stack([torch.zeros_like(score), score], 1)


@pytest.fixture
def photo():
    """Give a picture that is checkered all over."""
    board = (torch.arange(20)[:, None] + torch.arange(20)) % 2
    return (1 - board.float()).expand(1, 3, 20, 20).contiguous()


def make_map(photo, inside, outside, dtype=torch.float32):
    """Mark the square that the classifier reads."""
    heat = torch.full(photo.shape[2:], outside, dtype=dtype)
    heat[2:8, 2:8] = inside
    return heat


def test_a_perfect_map_beats_chance_and_a_wrong_one_does_not(photo):
    """Taking the square away takes the class away; taking others leaves it as it was."""
    network = Corner()
    before = float(network(photo).softmax(1)[0, 1])
    assert before > 0.99
    found = {}
    for name, heat in {
        "right": make_map(photo, 1.0, 0.0),
        "wrong": make_map(photo, 0.0, 1.0),
    }.items():
        rng = torch.Generator().manual_seed(0)
        found[name] = deletion_test(network, photo, 1, heat, rng)
    (right, chance), (wrong, same) = found["right"], found["wrong"]
    assert chance == same  # the random pixels don't depend on the map
    assert right < 0.6 < chance < 1
    assert wrong == pytest.approx(before, abs=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-60])
def test_tiny_maps_are_ranked_all_the_same(scale, photo):
    """Squares of small gradients vanish in single precision; their order is kept."""
    rng = torch.Generator().manual_seed(0)
    wanted = deletion_test(Corner(), photo, 1, make_map(photo, 1.0, 0.5), rng)
    rng.manual_seed(0)
    heat = make_map(photo, 2 * scale, scale, torch.float64)
    assert deletion_test(Corner(), photo, 1, heat, rng) == wanted


def test_a_tenth_of_the_pixels_is_blurred(photo):
    """Exactly so many, of the map and of each random choice; the rest is left alone."""
    seen = []

    def network(x):
        seen.append(x)
        return torch.zeros(len(x), 2)

    left = deletion_test(network, photo, 1, torch.rand(20, 20), torch.Generator())
    assert left == (0.5, 0.5)
    (pictures,) = seen
    changed = (pictures != photo).any(1)
    assert changed.sum((1, 2)).tolist() == [round(TOP * 400)] * 9
    blurred = blur(photo).expand_as(pictures)
    where = changed[:, None].expand_as(pictures)
    torch.testing.assert_close(pictures[where], blurred[where])
    assert len({tuple(c.flatten().tolist()) for c in changed}) == 9


def test_no_gradient_is_kept(photo):
    """The test is only looked at."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(1200, 2))
    deletion_test(network, photo, 0, torch.rand(20, 20), torch.Generator())
    assert all(p.grad is None and p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("side", [32, 224])
def test_blur_is_a_gaussian_of_the_sides_width(side):
    """A dot becomes a bell of the right width; brightness stays, edges do not darken."""
    x = torch.zeros(1, 1, side, side)
    x[0, 0, side // 2, side // 2] = 1
    row = blur(x)[0, 0].sum(0)
    place = torch.arange(side) - side // 2
    assert float(row.sum()) == pytest.approx(1, abs=1e-3)
    deviation = float((row * place**2).sum() ** 0.5)
    assert deviation == pytest.approx(BLUR * side, rel=0.05)
    torch.testing.assert_close(blur(torch.ones(2, 3, side, side)), torch.ones(2, 3, side, side))
