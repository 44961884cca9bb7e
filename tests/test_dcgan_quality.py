"""The benchmark of recipes: what it counts, and what it keeps."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import train_dcgan

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import dcgan_quality

FLAGS = ["--batch-size", "16", "--width", "0.0625", "--lr", "0.01"]


class FakeJudge:
    """Scores by the mean of the pictures, and remembers what it saw."""

    samples = 20

    def __init__(self):
        self.floor, self.seen = {"fid": 0.5}, []

    def score(self, batches):
        """Take the mean grey for FID."""
        self.seen.append(torch.cat(list(batches)))
        return {"fid": self.seen[-1].mean().item(), "precision": 0.5, "recall": 0.5,
                "largest_class": 0.1}  # fmt: skip


@pytest.fixture
def data():
    """Make 80 pictures of noise: 5 batches of 16 an epoch."""
    images = torch.randint(
        0, 256, (80, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    return SimpleNamespace(images=images)


def test_scores_come_at_equal_numbers_of_images(data):
    """8 scores, each after the first batch that fills its eighth, over the ends of epochs."""
    args, judge = train_dcgan.get_parser().parse_args(FLAGS), FakeJudge()
    rows = dcgan_quality.measure("ours", args, data, judge, torch.device("cpu"), 256)
    assert [row["images"] for row in rows] == [32 * i for i in range(1, 9)]
    rows = dcgan_quality.measure("ours", args, data, judge, torch.device("cpu"), 200)
    assert [row["images"] for row in rows] == [32, 64, 80, 112, 128, 160, 176, 208]
    assert len({row["fid"] for row in rows}) == 8


def test_scoring_in_between_changes_nothing(data, monkeypatch):
    """Training that was stopped for each score ends where an uninterrupted one does."""
    args, often = train_dcgan.get_parser().parse_args(FLAGS), FakeJudge()
    dcgan_quality.measure("ours", args, data, often, torch.device("cpu"), 160)
    monkeypatch.setattr(dcgan_quality, "POINTS", 1)
    once = FakeJudge()
    dcgan_quality.measure("ours", args, data, once, torch.device("cpu"), 160)
    assert torch.equal(often.seen[-1], once.seen[-1])


def test_recipes_differ_as_they_say(data):
    """Only the post's D has plain ReLUs and PyTorch's initial weights; only ours starts bright."""
    for recipe, flags in dcgan_quality.RECIPES.items():
        train_dcgan.get_parser().parse_args(flags.split())
        generator, discriminator = dcgan_quality.make_networks(recipe, 0.5, data.images // 4)
        drawn = generator(torch.randn(64, 100)).mean().item()
        assert (abs(drawn - 0.125) < 0.02) == (recipe == "ours")
        slopes = {m.negative_slope for m in discriminator.modules() if type(m) is nn.LeakyReLU}
        assert slopes == ({0.0} if recipe == "post" else {0.2})
        assert (discriminator[4].weight.std().item() < 0.019) == (recipe == "post")


def test_a_run_is_measured_once(data, tmp_path, monkeypatch):
    """The same settings are read from the file; other settings are measured."""
    calls = []

    def measure(*arguments):
        calls.append(arguments)
        return [{"fid": float(len(calls))}]

    monkeypatch.setattr(dcgan_quality, "measure", measure)

    def once(*flags, images=160):
        return dcgan_quality.measure_once(
            tmp_path, "ours", [*FLAGS, *flags], data, FakeJudge(), torch.device("cpu"), images
        )

    assert once() == once() == [{"fid": 1.0}]
    assert once("--ema", "0") == [{"fid": 2.0}]
    assert once("--ema", "0", images=320) == [{"fid": 3.0}]
    monkeypatch.setattr(
        train_dcgan, "make_optimizer", lambda model, _: torch.optim.SGD(model.parameters(), lr=7)
    )  # another default learning rate
    assert once("--ema", "0", images=320) == [{"fid": 4.0}]


def test_images_to_reach_is_the_first_time_that_the_mean_is_low_enough():
    """A share of all images, or None if it never is."""
    runs = [[{"fid": float(fid + shift)} for fid in range(8, 0, -1)] for shift in (-0.5, 0.5)]
    assert dcgan_quality.images_to_reach(runs, 5.0) == 0.5
    assert dcgan_quality.images_to_reach(runs, 100) == 1 / 8
    assert dcgan_quality.images_to_reach(runs, 0.9) is None
