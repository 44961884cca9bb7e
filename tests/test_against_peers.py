"""The benchmark beside other libraries: the parts that need none of them."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import compare_explanations

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import against_peers


def test_every_method_has_its_turn_in_an_order_of_the_photo():
    everything = {
        (library, name) for library, s in against_peers.LIBRARIES.items() for name in s.methods
    }
    turns = [against_peers.take_turns(against_peers.LIBRARIES, i, True) for i in (0, 0, 1)]
    assert turns[0] == turns[1] != turns[2]
    for order in turns:
        assert len(order) == len(everything)
        assert set(order) == everything
    few = against_peers.take_turns(against_peers.LIBRARIES, 0, False)
    assert everything - set(few) == set(against_peers.SLOW)


def test_our_methods_are_those_of_the_script():
    assert set(against_peers.Ours.methods) <= set(compare_explanations.METHODS)


class Reader(nn.Module):
    """A classifier that sees the upper left quarter: class 1 where it is bright."""

    def forward(self, x):
        """Map (N, C, 16, 16) to logits (N, 2)."""
        bright = x[..., :8, :8].mean((1, 2, 3))
        return torch.stack([torch.full_like(bright, 6.0), 12 * bright], 1)


def test_the_judge_tells_a_good_map_from_a_bad_one():
    x = torch.zeros(1, 3, 16, 16)
    x[..., :8, :8] = 1
    good, target = x[0, 0], torch.tensor([1])
    found = [against_peers.judge(Reader(), x, target, heat) for heat in (good, -good)]
    assert found[0]["deletion"] < found[1]["deletion"] - 0.3
    assert found[0]["insertion"] > found[1]["insertion"] + 0.3
    with torch.no_grad():
        before = float(Reader()(x).softmax(1)[0, 1])
    assert max(found[0].values()) <= before + 1e-6


@pytest.mark.parametrize("library", against_peers.LIBRARIES)
def test_each_library_is_listed_with_what_installs_it(library):
    root = Path(against_peers.__file__).resolve().parent.parent
    listed = (root / "requirements-dev.txt").read_text()
    for package in against_peers.LIBRARIES[library].packages:
        assert f"\n{package}>=" in listed
