"""The benchmark beside other libraries: the parts that need none of them."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import compare_explanations

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import against_peers


class Reader(nn.Module):
    """A classifier that sees the upper left quarter: class 1 where it is bright."""

    def forward(self, x):
        """Map (N, C, 16, 16) to logits (N, 2)."""
        bright = x[..., :8, :8].mean((1, 2, 3))
        return torch.stack([torch.full_like(bright, 6.0), 12 * bright], 1)


def test_the_judge_tells_a_good_map_from_a_bad_one():
    """The areas of compare_explanations.py: deletion low, insertion high."""
    x = torch.zeros(1, 3, 16, 16)
    x[..., :8, :8] = 1
    good, bad = (
        against_peers.judge(Reader(), x, torch.tensor([1]), heat) for heat in (x[0, 0], -x[0, 0])
    )
    assert good["deletion"] < bad["deletion"] - 0.3
    assert good["insertion"] > bad["insertion"] + 0.3


@pytest.mark.parametrize("library", against_peers.LIBRARIES)
def test_each_library_is_listed_with_what_installs_it(library):
    """And our methods are those of the script."""
    listed = Path(compare_explanations.__file__).with_name("requirements-dev.txt").read_text()
    packages = against_peers.LIBRARIES[library].packages
    assert all(f"\n{package}>=" in listed for package in packages)
    if not packages:
        assert set(against_peers.LIBRARIES[library].methods) <= set(compare_explanations.METHODS)
