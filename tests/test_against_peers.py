"""The benchmark beside other libraries: the parts that need none of them."""

from pathlib import Path

import pytest
import torch
from torch import nn

import compare_explanations
from benchmarks import against_peers


class Reader(nn.Module):
    """A classifier that sees the upper left quarter: class 1 where it is bright."""

    def forward(self, x):
        """Map (N, C, 16, 16) to logits (N, 2)."""
        bright = x[..., :8, :8].mean((1, 2, 3))
        return torch.stack([torch.full_like(bright, 6.0), 12 * bright], 1)


def test_maps_are_judged_alike():
    """A good map is told from a bad one by its areas, and each held against ours of its name."""
    x = torch.zeros(1, 3, 16, 16)
    x[..., :8, :8] = 1
    good = x[0, 0].numpy()
    made = {
        ("ours", "gradient"): (good, 1.0, 1),
        ("captum", "gradient"): (-good, 2.0, 3),
        ("captum", "RISE"): (good, 1.0, 1),
    }
    rows = against_peers.measure_photo(Reader(), x, 1, made)
    ours, captum, rise = rows.values()
    assert list(rows) == ["gradient: ours", "gradient: captum", "RISE: captum"]
    assert ours["deletion"] < captum["deletion"] - 0.3
    assert ours["insertion"] > captum["insertion"] + 0.3
    assert (captum["CPU seconds"], captum["evaluations"]) == (2.0, 3)
    assert captum["r"] == pytest.approx(-1)
    assert "r" not in ours
    assert "r" not in rise


def test_what_is_compared_can_be_had():
    """Libraries are in the file that the README installs, our methods in the script."""
    root = Path(compare_explanations.__file__).parent
    listed = (root / "requirements-dev.txt").read_text()
    assert all(f"\n{package}>=" in listed for package in against_peers.PACKAGES)
    assert set(against_peers.LIBRARIES["ours"]) <= set(compare_explanations.METHODS)
    known = {(library, name) for library, made in against_peers.LIBRARIES.items() for name in made}
    assert set(against_peers.SLOW) <= known
