"""The benchmark of recipes: what it counts, and what it keeps."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import train_dcgan
from common.data import Dataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import dcgan_quality

FLAGS = ["--batch-size", "16", "--width", "0.0625", "--lr", "0.01"]
CPU = torch.device("cpu")


class FakeScorer:
    """Scores by the mean of the samples, and remembers what it saw."""

    samples = 20

    def __init__(self):
        self.floor = {"fid": 0.5}
        self.seen = []

    def score(self, batches):
        """Take the mean grey for FID."""
        self.seen.append(torch.cat(list(batches)))
        return {"fid": self.seen[-1].mean().item(), "precision": 0.5, "recall": 0.5,
                "largest_class": 0.1}  # fmt: skip


@pytest.fixture
def images():
    """Make 84 images of noise: 5 batches of 16 an epoch, and 4 left over."""
    rng = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (84, 1, 28, 28), dtype=torch.uint8, generator=rng)


def get_args(*words):
    """Parse a command line of train_dcgan.py."""
    return train_dcgan.get_parser().parse_args([*FLAGS, *words])


def test_scores_come_at_equal_numbers_of_images(images):
    """8 scores, each after the first batch that fills its eighth, over the ends of epochs."""
    rows = dcgan_quality.measure("ours", get_args(), images, FakeScorer(), CPU, 256)
    assert [row["images"] for row in rows] == [32 * i for i in range(1, 9)]
    rows = dcgan_quality.measure("ours", get_args(), images, FakeScorer(), CPU, 200)
    assert [row["images"] for row in rows] == [32, 64, 80, 112, 128, 160, 176, 208]
    assert len({row["fid"] for row in rows}) == 8


def test_scoring_in_between_changes_nothing(images, monkeypatch):
    """Training that was stopped for each score ends where an uninterrupted one does."""
    often = FakeScorer()
    dcgan_quality.measure("ours", get_args(), images, often, CPU, 160)
    monkeypatch.setattr(dcgan_quality, "POINTS", 1)
    once = FakeScorer()
    dcgan_quality.measure("ours", get_args(), images, once, CPU, 160)
    assert torch.equal(often.seen[-1], once.seen[-1])


def test_ours_is_what_the_script_trains(images):
    """The same batches, noise and average as train() in train_dcgan.py, bit for bit."""
    args = get_args("--seed", "3")
    scorer = FakeScorer()
    dcgan_quality.measure("ours", args, images, scorer, CPU, 160)
    torch.manual_seed(3)
    generator, discriminator = train_dcgan.make_networks(args, 1)
    train_dcgan.init_brightness(generator, images)
    ema = copy.deepcopy(generator)
    optimizers = [train_dcgan.make_optimizer(n, args) for n in (generator, discriminator)]
    data = Dataset("noise", images, torch.zeros(84, dtype=torch.int64), ["noise"])
    for epoch in (1, 2):
        train_dcgan.train(generator, discriminator, ema, optimizers, data, args, epoch)
    train_dcgan.score(ema, scorer, args)
    assert torch.equal(scorer.seen[-1], scorer.seen[-2])


@pytest.mark.parametrize("recipe", dcgan_quality.RECIPES)
def test_recipes_differ_as_they_say(recipe, images):
    """Only the post's D has plain ReLUs and PyTorch's initial weights; only ours starts bright."""
    flags = dcgan_quality.RECIPES[recipe].split()
    args = train_dcgan.get_parser().parse_args([*flags, "--width", "0.5"])
    torch.manual_seed(0)
    generator, discriminator = dcgan_quality.make_networks(recipe, args, images // 4)
    mean = generator(torch.randn(64, 100)).mean().item()
    assert (abs(mean - 0.125) < 0.02) == (recipe == "ours")
    slopes = {m.negative_slope for m in discriminator.modules() if type(m) is nn.LeakyReLU}
    assert slopes == ({0.0} if recipe == "post" else {0.2})
    assert (discriminator[4].weight.std().item() < 0.019) == (recipe == "post")
    assert (args.ema == 0) == (recipe != "ours")


def test_a_run_is_measured_once(images, tmp_path, monkeypatch):
    """The same settings are read from the file; other settings are measured."""
    calls = []

    def measure(*arguments):
        calls.append(arguments)
        return [{"fid": float(len(calls))}]

    monkeypatch.setattr(dcgan_quality, "measure", measure)

    def once(*flags, total=160):
        return dcgan_quality.measure_once(
            tmp_path, "ours", [*FLAGS, *flags], images, FakeScorer(), CPU, total
        )

    assert once() == once() == [{"fid": 1.0}]
    assert once("--ema", "0") == [{"fid": 2.0}]
    assert once("--ema", "0", total=320) == [{"fid": 3.0}]
    monkeypatch.setattr(
        train_dcgan, "make_optimizer", lambda model, _: torch.optim.SGD(model.parameters(), lr=7)
    )  # another default learning rate
    assert once("--ema", "0", total=320) == [{"fid": 4.0}]


def test_images_to_reach_is_the_first_time_that_the_mean_is_low_enough():
    """A share of all images, or None if it never is."""
    runs = [[{"fid": float(fid + shift)} for fid in range(8, 0, -1)] for shift in (-0.5, 0.5)]
    assert dcgan_quality.images_to_reach(runs, 5.0) == 0.5
    assert dcgan_quality.images_to_reach(runs, 100) == 1 / 8
    assert dcgan_quality.images_to_reach(runs, 0.9) is None


def test_the_report_is_the_mean_of_the_seeds(capsys):
    """The table's last line is RESULT, with the figures by name."""
    rows = [{"fid": 9.0 - i, "precision": 0.5, "recall": 0.25, "images": 80, "seconds": 2.0}
            for i in range(8)]  # fmt: skip
    other = [{**row, "fid": row["fid"] + 1} for row in rows]
    dcgan_quality.report({"examples": [rows, other], "ours": [rows, rows]}, 0.5)
    table, result = capsys.readouterr().out.split("RESULT ")
    assert '"fid_examples": 2.5' in result
    assert '"images_to_reach_examples_final": 1.0' in result
    assert "2.500 ± 0.707" in table
