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

    def score(self, batches, labels):
        """Take the mean grey for FID."""
        self.seen.append(torch.cat(list(batches)))
        return {"fid": self.seen[-1].mean().item(), "precision": 0.5, "recall": 0.5,
                "largest_class": 0.1}  # fmt: skip


@pytest.fixture
def data():
    """Make 84 images of noise: 5 batches of 16 an epoch, and 4 left over."""
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (84, 1, 28, 28), dtype=torch.uint8, generator=rng)
    return Dataset("noise", images, torch.arange(84) % 3, list("abc"))


def get_args(*words):
    """Parse a command line of train_dcgan.py."""
    return train_dcgan.get_parser().parse_args([*FLAGS, *words])


def test_scores_come_after_the_batch_that_fills_the_mark(data):
    """Over the ends of epochs, too."""
    rows = dcgan_quality.measure("ours", get_args(), data, FakeScorer(), [25, 80, 90, 208])
    assert [row["images"] for row in rows] == [32, 80, 96, 208]
    assert len({row["fid"] for row in rows}) == 4
    assert all(0 < row["d_fake"] < 1 for row in rows)


def test_scoring_in_between_changes_nothing(data):
    """Training that was stopped for each score ends where an uninterrupted one does."""
    often = FakeScorer()
    dcgan_quality.measure("ours", get_args(), data, often, [20, 60, 100, 160])
    once = FakeScorer()
    dcgan_quality.measure("ours", get_args(), data, once, [160])
    assert torch.equal(often.seen[-1], once.seen[-1])


@pytest.mark.parametrize(("recipe", "flags"), [("ours", []), ("labels", ["--conditional"])])
def test_ours_is_what_the_script_trains(recipe, flags, data):
    """The same batches, noise and average as train() in train_dcgan.py, bit for bit."""
    args = get_args("--seed", "3", *flags)
    scorer = FakeScorer()
    dcgan_quality.measure(recipe, args, data, scorer, [160])
    torch.manual_seed(3)
    generator, discriminator = train_dcgan.make_networks(args, 1, 3)
    train_dcgan.init_brightness(generator, data.images)
    ema = copy.deepcopy(generator)
    optimizers = train_dcgan.make_optimizers((generator, discriminator), args)
    for epoch in (1, 2):
        train_dcgan.train(generator, discriminator, ema, optimizers, data, args, epoch)
    train_dcgan.score(ema, scorer, [28, 28, 28], args)
    assert torch.equal(scorer.seen[-1], scorer.seen[-2])


@pytest.mark.parametrize("recipe", dcgan_quality.RECIPES)
def test_recipes_differ_as_they_say(recipe, data):
    """Only the post's D has plain ReLUs and PyTorch's initial weights; only ours starts bright."""
    flags = dcgan_quality.RECIPES[recipe].split()
    args = train_dcgan.get_parser().parse_args([*flags, "--width", "0.5"])
    torch.manual_seed(0)
    dark = data._replace(images=data.images // 4)
    generator, discriminator = dcgan_quality.make_networks(recipe, args, dark)
    labels = torch.zeros(64, dtype=torch.int64)
    mean = generator(torch.randn(64, 100), labels).mean().item()
    assert (abs(mean - 0.125) < 0.02) == (recipe in ("ours", "labels"))
    slopes = {m.negative_slope for m in discriminator.modules() if type(m) is nn.LeakyReLU}
    assert slopes == ({0.0} if recipe == "post" else {0.2})
    assert (discriminator.layers[4].weight.std().item() < 0.019) == (recipe == "post")
    assert (args.ema == 0) == (recipe in ("post", "examples"))


def test_a_run_is_measured_once(data, tmp_path, monkeypatch):
    """The same settings are read from the file; other settings are measured."""
    calls = []

    def measure(*arguments):
        calls.append(arguments)
        return [{"fid": float(len(calls))}]

    monkeypatch.setattr(dcgan_quality, "measure", measure)

    def once(*flags, marks=(160,)):
        return dcgan_quality.measure_once(
            tmp_path, "ours", [*FLAGS, *flags], data, FakeScorer(), marks
        )

    assert once() == once() == [{"fid": 1.0}]
    assert once("--ema", "0") == [{"fid": 2.0}]
    assert once("--ema", "0", marks=(320,)) == [{"fid": 3.0}]
    monkeypatch.setattr(train_dcgan, "WARM_UP", 7)
    assert once("--ema", "0", marks=(320,)) == [{"fid": 4.0}]


def test_images_to_reach_is_the_first_time_that_the_mean_is_low_enough():
    """How many images there were, or None if it never is."""
    runs = [
        [{"images": 10 * i, "fid": 9 - i + shift} for i in range(1, 9)] for shift in (-0.5, 0.5)
    ]
    assert dcgan_quality.images_to_reach(runs, 5.0) == 40
    assert dcgan_quality.images_to_reach(runs, 100) == 10
    assert dcgan_quality.images_to_reach(runs, 0.9) is None


def test_the_report_is_the_mean_of_the_seeds(capsys):
    """The table's last line is RESULT, with the figures by name."""
    rows = [{"fid": 9.0 - i, "precision": 0.5, "recall": 0.25, "images": 80 + i, "d_real": 0.6,
             "d_fake": 0.4} for i in range(8)]  # fmt: skip
    other = [{**row, "fid": row["fid"] + 1} for row in rows]
    dcgan_quality.report({"examples": [rows, other], "ours": [rows, rows]}, 0.5)
    table, result = capsys.readouterr().out.split("RESULT ")
    assert '"fid_examples": 2.5' in result
    assert '"images_to_reach_examples_best": 87' in result
    assert "2.50 ± 0.71" in table
