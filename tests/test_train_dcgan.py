"""The first experiment: its networks, its loop, its run folder, and what a user can do wrong."""

import copy
import csv
import os
import shutil
import signal
import subprocess
import sys
import time

import imageio.v3 as imageio
import numpy as np
import pytest
import torch

import train_dcgan
from common.checkpoint import load_checkpoint
from common.data import load_dataset
from common.errors import UserError
from common.fid import SCORES
from common.glyphs import CLASSES as GLYPH_CLASSES
from tests.helpers import assert_same, read_metrics, save_classifier
from tests.processes import fork, train_together, wait, wait_for

# Small and quick: 2 batches of 16 glyphs an epoch, networks of a sixteenth of the width.
TINY = ["--dataset", "glyphs", "--glyphs", "32", "--batch-size", "16", "--width", "0.0625",
        "--lr", "0.02"]  # fmt: skip  # high, so that 8 steps make drawings that differ


def run(folder, *options, data):
    """Run the script in this process.

    :return: what main returns
    :rtype: dict
    """
    return train_dcgan.main([*TINY, "--data-dir", str(data), "--out", str(folder), *options])


def weights(folder):
    """Read every tensor and number that a run has learnt.

    :rtype: dict
    """
    state = load_checkpoint(folder, "train_dcgan")
    return {
        name: state[name]
        for name in ("generator", "discriminator", "ema", "g_optimizer", "d_optimizer")
    } | {"history": [{k: v for k, v in row.items() if k in train_dcgan.COLUMNS}
                     for row in state["history"]]}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Give the tests of this file one data folder, so that glyphs are drawn once."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def four_epochs(data, tmp_path_factory):
    """Train four epochs without interruption."""
    folder = tmp_path_factory.mktemp("runs") / "four"
    metrics = run(folder, "--epochs", "4", data=data)
    return folder, metrics


# ------------------------------------------------------------------------------------- networks


def test_generator_shapes_at_every_stage():
    """G is the post's: linear 1024, 256 x 5 x 5, then 7, 14 and 28 pixels."""
    x, shapes = torch.randn(2, 100), []
    for layer in train_dcgan.Generator():
        x = layer(x)
        shapes.append(tuple(x.shape[1:]))
    stages = [(1024,), (6400,), (256, 5, 5), (128, 7, 7), (64, 14, 14), (1, 28, 28)]
    assert list(dict.fromkeys(shapes)) == stages
    assert x.min() >= 0
    assert x.max() <= 1


def test_discriminator_shapes_at_every_stage():
    """D is G's mirror and returns one logit, not a probability."""
    x, shapes = torch.rand(2, 1, 28, 28), []
    for layer in train_dcgan.Discriminator():
        x = layer(x)
        shapes.append(tuple(x.shape[1:]))
    assert list(dict.fromkeys(shapes)) == [
        (64, 14, 14), (128, 7, 7), (256, 5, 5), (6400,), (1024,), (1,)]  # fmt: skip
    discriminator = train_dcgan.Discriminator()
    discriminator[-1].bias.data.fill_(-7.0)
    assert discriminator(torch.rand(2, 1, 28, 28)).max() < 0


@pytest.mark.parametrize("width", [0.02, 0.5, 1.3])
@pytest.mark.parametrize("channels", [1, 3])
def test_width_and_channels(width, channels):
    """Every width gives networks that fit together, for grey and for colour."""
    pictures = train_dcgan.Generator(7, channels, width)(torch.randn(3, 7))
    assert pictures.shape == (3, channels, 28, 28)
    assert train_dcgan.Discriminator(channels, width)(pictures).shape == (3, 1)


def test_linear_bn_flag_removes_exactly_the_linear_batchnorms():
    """The post's lesson can be taken back: without the flag's BatchNorm1d, biases return."""
    for network, count in ((train_dcgan.Generator, 2), (train_dcgan.Discriminator, 1)):
        kinds = [type(m).__name__ for m in network().modules()]
        without = network(linear_bn=False)
        assert kinds.count("BatchNorm1d") == count
        assert [type(m).__name__ for m in without.modules()] == [
            k for k in kinds if k != "BatchNorm1d"]  # fmt: skip
        assert all(m.bias is not None for m in without.modules() if isinstance(m, torch.nn.Linear))


def test_init_weights_is_the_papers():
    """Weights come from N(0, 0.02), BatchNorm's from N(1, 0.02), biases are zero."""
    network = train_dcgan.Discriminator().apply(train_dcgan.init_weights)
    assert network[1][0].weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert network[1][1].weight.mean().item() == pytest.approx(1.0, abs=0.01)
    assert network[0][0].bias.abs().max() == 0


def test_drawings_begin_as_bright_as_the_data():
    """The bias of G's last layer is the logit of the mean pixel; black data are no infinity."""
    torch.manual_seed(0)
    generator = train_dcgan.Generator(channels=3, width=0.25).apply(train_dcgan.init_weights)
    for level in (26, 204, 0):
        train_dcgan.init_output(generator, torch.full((9, 3, 28, 28), level, dtype=torch.uint8))
        drawn = generator(torch.randn(32, 100)).mean().item()
        assert drawn == pytest.approx(level / 255, abs=0.01)
        assert torch.isfinite(generator[-2].bias).all()


# --------------------------------------------------------------------------------------- method


def test_bce_is_the_log_loss():
    """Equal to -log sigmoid(logit) for data, -log(1 - sigmoid(logit)) for drawings."""
    logits = torch.tensor([[0.3], [-2.0]])
    assert train_dcgan.bce(logits, 1.0).item() == pytest.approx(
        -logits.sigmoid().log().mean().item()
    )
    assert train_dcgan.bce(logits, 0.0).item() == pytest.approx(
        -(1 - logits.sigmoid()).log().mean().item()
    )


def test_draw_z_has_the_distribution_it_says():
    """Normal noise has variance 1; uniform noise fills [-1, 1], variance 1/3."""
    rng = torch.Generator().manual_seed(0)
    normal = train_dcgan.draw_z(4000, 10, "normal", rng)
    uniform = train_dcgan.draw_z(4000, 10, "uniform", rng)
    assert normal.var().item() == pytest.approx(1, rel=0.05)
    assert uniform.var().item() == pytest.approx(1 / 3, rel=0.05)
    assert uniform.abs().max() <= 1


@pytest.mark.parametrize("latent", ["normal", "uniform"])
def test_interpolate_goes_from_end_to_end(latent):
    """The walk holds both ends, and on the sphere it keeps the length of z."""
    a, b = torch.randn(2, 100, generator=torch.Generator().manual_seed(0))
    walk = train_dcgan.interpolate(a, b, 8, latent)
    torch.testing.assert_close(walk[0], a)
    torch.testing.assert_close(walk[-1], b)
    if latent == "normal":
        assert walk.norm(dim=1).min() > 0.95 * min(a.norm(), b.norm())
    for z in torch.randn(200, 100, generator=torch.Generator().manual_seed(1)):
        # parallel ends have no angle between them, and rounding makes their cosine exceed 1
        for end in (z, 2 * z, -z):
            assert torch.isfinite(train_dcgan.interpolate(z, end, 3, latent)).all()


def test_update_ema_is_a_moving_average_of_weights_and_statistics():
    """Parameters and BatchNorm's running statistics are averaged."""
    generator = train_dcgan.Generator(width=0.05)
    ema = copy.deepcopy(generator)
    with torch.no_grad():
        for tensor in generator.state_dict().values():
            tensor.add_(1)
    before = copy.deepcopy(ema.state_dict())
    train_dcgan.update_ema(ema, generator, 0.9)
    for name, tensor in ema.state_dict().items():
        expected = before[name] + (0.1 if tensor.is_floating_point() else 0)
        torch.testing.assert_close(tensor, expected)


def test_samples_do_not_depend_on_their_batch():
    """Samples are drawn in eval mode: with BatchNorm in train mode they would differ."""
    ema = train_dcgan.Generator(width=0.1).apply(train_dcgan.init_weights)
    ema(torch.randn(64, 100))  # moves the running statistics
    z = torch.randn(64, 100)
    first = train_dcgan.test(ema, z, "normal", 1)
    z[8:] = torch.randn(56, 100)  # other neighbours, below the first row
    second = train_dcgan.test(ema, z, "normal", 1)
    assert np.array_equal(first[:60], second[:60])
    assert not np.array_equal(first[60:480], second[60:480])


def train_some(images, steps, seed=0, **changes):
    """Call train() on a small pair of networks.

    :return: generator, discriminator and the mean D and G loss of each epoch
    """
    args = train_dcgan.get_parser().parse_args([])
    vars(args).update({"batch_size": 16, "width": 0.125, "seed": seed, **changes})
    torch.manual_seed(seed)
    generator = train_dcgan.Generator(width=args.width).apply(train_dcgan.init_weights)
    discriminator = train_dcgan.Discriminator(width=args.width).apply(train_dcgan.init_weights)
    ema = copy.deepcopy(generator)
    optimizers = [train_dcgan.make_optimizer(n, args) for n in (generator, discriminator)]
    losses = []
    for epoch in range(1, steps + 1):
        progress = {"done": 0, "totals": [0.0] * 4}
        train_dcgan.train(generator, discriminator, ema, *optimizers, images, args, lambda: 0,
                          progress, epoch)  # fmt: skip
        losses.append(np.array(progress["totals"]) / progress["done"])
    return generator, discriminator, np.array(losses)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_every_weight_of_both_networks_changes(optimizer):
    """One epoch moves each parameter, and leaves D ready to learn again."""
    images = torch.randint(0, 256, (32, 1, 28, 28), dtype=torch.uint8)
    torch.manual_seed(0)
    args = train_dcgan.get_parser().parse_args([])
    old_g = train_dcgan.Generator(width=0.125).apply(train_dcgan.init_weights)
    old_d = train_dcgan.Discriminator(width=0.125).apply(train_dcgan.init_weights)
    generator, discriminator, _ = train_some(images, 1, optimizer=optimizer, lr=args.lr)
    for old, new in ((old_g, generator), (old_d, discriminator)):
        for (name, before), after in zip(old.named_parameters(), new.parameters(), strict=True):
            assert not torch.equal(before, after), name
            assert after.requires_grad, name


def test_discriminator_learns_to_tell_64_images_apart(data):
    """Overfit: on 64 images D's loss leaves chance, 2 log 2, although G learns as fast."""
    images = load_dataset("glyphs", data, glyphs=64).images
    _, _, losses = train_some(images, 25, lr=1e-3)
    d_loss, _, d_real, d_fake = losses.T
    assert np.isfinite(losses).all()
    assert d_loss[0] == pytest.approx(2 * np.log(2), abs=0.05)
    assert d_loss[-5:].mean() < 0.9 * d_loss[0]
    assert d_real[-5:].mean() > d_fake[-5:].mean() + 0.1


def test_generator_step_leaves_no_gradient_in_the_discriminator(monkeypatch):
    """D learns from its own loss only: G's backward pass must not add to D's gradients."""
    seen = []
    average = train_dcgan.average_gradients

    def spy(model):
        seen.append([p.grad.clone() for p in model.parameters()])
        average(model)

    monkeypatch.setattr(train_dcgan, "average_gradients", spy)
    images = torch.randint(0, 256, (16, 1, 28, 28), dtype=torch.uint8)
    _, discriminator, _ = train_some(images, 1)
    assert len(seen) == 2  # D's step, then G's
    for kept, parameter in zip(seen[0], discriminator.parameters(), strict=True):
        assert torch.equal(kept, parameter.grad)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """Write a checkpoint as train_classifier.py does, of random weights: features all the same."""
    folder = tmp_path_factory.mktemp("classifier")
    write_classifier(folder, seed=0)
    return str(folder)


def write_classifier(folder, seed, channels=1):
    """Write a classifier of 28 x 28 pixels and the glyphs' 62 classes."""
    torch.manual_seed(seed)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(channels, 8, 5, stride=3), torch.nn.ReLU(), torch.nn.Flatten(),
        torch.nn.Linear(8 * 8 * 8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 62),
    )  # fmt: skip
    save_classifier(folder, network, GLYPH_CLASSES, [channels, 28, 28], std=0.5)


# ----------------------------------------------------------------------------------- the script


def test_a_run_leaves_what_it_promises(four_epochs):
    """Pictures, GIF, curves, table and metrics.json are there, readable and not blank."""
    folder, metrics = four_epochs
    grids = [imageio.imread(folder / "samples" / f"epoch_{e:03d}.png") for e in range(5)]
    assert {g.shape for g in grids} == {grids[0].shape}
    assert all(g.std() > 5 for g in grids)
    assert not np.array_equal(grids[0], grids[-1])
    gif = imageio.imread(folder / "epochs.gif", index=None)
    assert len(gif) == 5
    assert gif.shape[1:3] == grids[0].shape[:2]
    assert imageio.imread(folder / "losses.png").std() > 5

    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3, 4]
    saved = read_metrics(folder, metrics)
    assert saved["dataset"] == "glyphs"
    assert [set(e) for e in saved["epochs"]] == [
        {"epoch", "d_loss", "g_loss", "d_real", "d_fake", "images_per_second"}] * 4  # fmt: skip
    assert all(0 < e["d_real"] < 1 and e["images_per_second"] > 0 for e in saved["epochs"])


def test_resume_is_bit_exact(four_epochs, data, tmp_path):
    """4 epochs = 2 + resume 2, every tensor of networks and optimizers equal."""
    run(tmp_path / "two", "--epochs", "2", data=data)
    metrics = train_dcgan.main(["--resume", str(tmp_path / "two"), "--epochs", "4"])
    assert_same(weights(tmp_path / "two"), weights(four_epochs[0]))
    assert [row["epoch"] for row in metrics["epochs"]] == [1, 2, 3, 4]
    for epoch in range(5):
        name = f"samples/epoch_{epoch:03d}.png"
        assert (tmp_path / "two" / name).read_bytes() == (four_epochs[0] / name).read_bytes()


def test_a_signal_saves_within_the_epoch_and_resumes_bit_exactly(
    four_epochs, data, tmp_path, monkeypatch
):
    """Ctrl-C in the middle of epoch 2 loses nothing: not even the batches of that epoch."""
    calls = []

    def interrupt(model):
        calls.append(model)
        if len(calls) == 5:  # two calls a batch, two batches an epoch: epoch 2, first batch
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train_dcgan, "average_gradients", interrupt)
    with pytest.raises(train_dcgan.Interrupted, match="--resume") as stop:
        run(tmp_path / "cut", "--epochs", "4", data=data)
    assert stop.value.signum == signal.SIGINT
    assert load_checkpoint(tmp_path / "cut", "train_dcgan")["progress"]["done"] == 1
    monkeypatch.undo()
    train_dcgan.main(["--resume", str(tmp_path / "cut"), "--epochs", "4"])
    assert_same(weights(tmp_path / "cut"), weights(four_epochs[0]))


def test_same_seed_same_weights_and_looking_changes_nothing(
    four_epochs, data, tmp_path, monkeypatch
):
    """A second run is equal bit for bit, although it draws samples far more often."""
    look = train_dcgan.test

    def look_often(*arguments):
        for _ in range(3):
            picture = look(*arguments)
        torch.randn(1000)  # and the global generator has nothing to do with it either
        return picture

    monkeypatch.setattr(train_dcgan, "test", look_often)
    run(tmp_path / "again", "--epochs", "4", "--gif-every", "2", data=data)
    assert_same(weights(tmp_path / "again"), weights(four_epochs[0]))
    assert len(imageio.imread(tmp_path / "again" / "epochs.gif", index=None)) == 3  # 0, 2, 4
    run(tmp_path / "other", "--epochs", "4", "--seed", "1", data=data)
    a, b = (weights(f)["generator"]["0.weight"] for f in (tmp_path / "other", four_epochs[0]))
    assert not torch.equal(a, b)


def test_sample_draws_from_a_finished_run(four_epochs, tmp_path):
    """--sample needs no training and no data; seed 0 begins with the run's own grid."""
    folder = four_epochs[0]
    train_dcgan.main(["--sample", str(folder), "-n", "70", "--out", str(tmp_path / "drawn")])
    images = np.load(tmp_path / "drawn" / "samples.npz")["images"]
    assert images.shape == (70, 1, 28, 28)
    assert images.dtype == np.uint8
    assert not np.array_equal(images[0], images[1])
    grid = imageio.imread(folder / "samples" / "epoch_004.png")
    first = grid[4:60:2, 4:60:2, 0].astype(int)  # scaled by 2, behind a gap of 2 pixels
    assert np.abs(first - images[0, 0]).max() <= 1
    train_dcgan.main(
        ["--sample", str(folder), "-n", "70", "--seed", "1", "--out", str(tmp_path / "other")]
    )
    assert not np.array_equal(np.load(tmp_path / "other" / "samples.npz")["images"], images)


@pytest.fixture(scope="module")
def scored(classifier, data, tmp_path_factory):
    """Train as four_epochs does, and score each epoch."""
    folder = tmp_path_factory.mktemp("runs") / "scored"
    return folder, run(folder, "--epochs", "4", "--fid", classifier, data=data)


def test_scoring_changes_no_weight(scored, four_epochs):
    """With --fid every tensor of a run is the same, bit for bit."""
    assert_same(weights(scored[0]), weights(four_epochs[0]))


def test_scores_lie_between_floor_and_ceiling(scored):
    """Training data scores best, then the trained generator, then the untrained one."""
    folder, metrics = scored
    fid = metrics["fid"]
    assert fid["floor"]["fid"] < fid["final"]["fid"] < fid["ceiling"]["fid"]
    assert fid["samples"] == 10_000
    assert fid["test_images"] == 32
    assert sum(fid["final"]["classes"].values()) == 10_000
    last = {name: fid["final"][name] for name in SCORES}
    assert last.items() <= metrics["epochs"][-1].items()
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["fid"]) for row in rows] == [e["fid"] for e in metrics["epochs"]]


def test_a_run_can_be_scored_at_any_time(scored, four_epochs, classifier, data, tmp_path):
    """--sample RUN --fid gives the numbers of the training itself, to the last bit."""
    options = ["--fid", classifier, "--data-dir", str(data), "--out", str(tmp_path / "drawn")]
    metrics = train_dcgan.main(["--sample", str(four_epochs[0]), *options])
    assert metrics["fid"]["final"] == scored[1]["fid"]["final"]
    assert metrics["fid"]["floor"] == scored[1]["fid"]["floor"]


def test_resume_goes_on_scoring_or_begins_to(
    scored, four_epochs, classifier, data, tmp_path, capsys
):
    """A resumed run keeps its --fid; one that had none gets columns that begin with empty cells."""
    run(tmp_path / "kept", "--epochs", "2", "--fid", classifier, data=data)
    metrics = train_dcgan.main(["--resume", str(tmp_path / "kept"), "--epochs", "4"])
    columns = ("epoch", *train_dcgan.COLUMNS, *SCORES)
    for ours, whole in zip(metrics["epochs"], scored[1]["epochs"], strict=True):
        assert {c: ours[c] for c in columns} == {c: whole[c] for c in columns}
    assert metrics["fid"] == scored[1]["fid"]

    run(tmp_path / "late", "--epochs", "2", data=data)
    train_dcgan.main(["--resume", str(tmp_path / "late"), "--epochs", "4", "--fid", classifier])
    assert_same(weights(tmp_path / "late"), weights(four_epochs[0]))
    with open(tmp_path / "late" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["fid"] == "" for row in rows] == [True, True, False, False]
    assert float(rows[3]["fid"]) == scored[1]["epochs"][3]["fid"]
    assert rows[0].keys() == set(columns) | {"images_per_second"}


def test_resume_refuses_another_classifier(scored, tmp_path):
    """Scores of two classifiers don't compare, so they don't go into one curve."""
    write_classifier(tmp_path, seed=1)
    with pytest.raises(UserError, match="isn't the classifier that scored the run"):
        train_dcgan.main(["--resume", str(scored[0]), "--epochs", "5", "--fid", str(tmp_path)])


def test_fid_says_what_does_not_fit(classifier, data, tmp_path, capsys):
    """A classifier of colour is refused before anything is written; few images are warned of."""
    write_classifier(tmp_path, seed=0, channels=3)
    with pytest.raises(UserError, match="3 x 28 x 28 pixels, but glyphs is 1 x 28 x 28"):
        run(tmp_path / "run", "--fid", str(tmp_path), data=data)
    with pytest.raises(UserError, match="no model or checkpoint nowhere"):
        run(tmp_path / "run", "--fid", "nowhere", data=data)
    assert not (tmp_path / "run").exists()
    capsys.readouterr()
    run(tmp_path / "run", "--dry-run", "--fid", classifier, data=data)
    assert capsys.readouterr().err.count("fewer than 10,000") == 1


@pytest.mark.parametrize(
    "options",
    [
        ["--latent", "uniform"],
        ["--no-linear-bn"],
        ["--ema", "0"],
        ["--optimizer", "sgd"],
        ["--amp"],
        ["--z-dim", "1"],
    ],
)
def test_variants_run(options, data, tmp_path):
    """Every variant trains to finite losses."""
    metrics = run(tmp_path / "run", "--dry-run", *options, data=data)
    assert all(np.isfinite(v) for v in metrics["epochs"][0].values())


def test_warns_when_the_discriminator_has_won(data, tmp_path, monkeypatch, capsys):
    """A generator that is no match for D is said to be none."""
    # what a run without BatchNorm after the linear layers showed, while its drawings collapsed
    won = {"done": 2, "totals": [0.58, 21.2, 1.88, 0.12], "whole": True}
    monkeypatch.setattr(train_dcgan, "train", lambda *a: a[-2].update(won))
    run(tmp_path / "run", "--epochs", "1", data=data)
    assert "discriminator has won" in capsys.readouterr().err


def test_a_loss_that_is_no_number_stops_and_keeps_the_checkpoint(data, tmp_path, monkeypatch):
    """NaN ends the run with a line that says when; the last good checkpoint stays."""
    run(tmp_path / "run", "--epochs", "1", data=data)
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    nan = {"done": 2, "totals": [float("nan")] * 4, "whole": True}
    monkeypatch.setattr(train_dcgan, "train", lambda *a: a[-2].update(nan))
    with pytest.raises(UserError, match=r"epoch 2.*smaller --lr"):
        train_dcgan.main(["--resume", str(tmp_path / "run"), "--epochs", "2"])
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs"),
        (["--epochs", "ten"], "--epochs"),
        (["--lr", "nan"], "--lr"),
        (["--lr", "-1"], "--lr"),
        (["--batch-size", "1"], "--batch-size"),
        (["--ema", "1"], "--ema"),
        (["--width", "0"], "--width"),
        (["--seed", "-1"], "--seed"),
        (["--dataset", "imagenet"], "--dataset"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--resume", "nowhere"], "no checkpoint"),
        (["--sample", "nowhere"], "no checkpoint"),
        (["--glyphs", "8", "--dataset", "glyphs"], "--batch-size"),
        (["--dataset", "folder", "--data-dir", "nowhere"], "nowhere"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, tmp_path, monkeypatch, refused):
    """A mistake ends in exit code 2 and one line that names it; nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    assert message in refused(train_dcgan, *arguments)
    assert not (tmp_path / "runs").exists()


def test_resume_keeps_the_settings_of_the_run(four_epochs):
    """A resumed run can't quietly become another experiment."""
    with pytest.raises(UserError, match="--batch-size"):
        train_dcgan.main(["--resume", str(four_epochs[0]), "--batch-size", "8"])


def test_resume_never_goes_back(four_epochs, data, tmp_path):
    """Fewer epochs than trained, or other data, is a mistake; as many makes the GIF again."""
    shutil.copytree(four_epochs[0], tmp_path / "run")
    (tmp_path / "run" / "epochs.gif").unlink()
    with pytest.raises(UserError, match="has 4 epochs"):
        train_dcgan.main(["--resume", str(tmp_path / "run"), "--epochs", "3"])
    seconds = train_dcgan.main(["--resume", str(tmp_path / "run"), "--epochs", "4"])["seconds"]
    assert (tmp_path / "run" / "epochs.gif").exists()
    assert seconds >= 0.5 * four_epochs[1]["seconds"]  # the time of all sessions
    other = load_checkpoint(tmp_path / "run", "train_dcgan")
    torch.save(other | {"shape": [33, 1, 28, 28]}, tmp_path / "run" / "checkpoint.pt")
    with pytest.raises(UserError, match="the data of this run"):
        train_dcgan.main(["--resume", str(tmp_path / "run"), "--epochs", "5"])


def test_another_number_of_processes_begins_the_epoch_anew(four_epochs, tmp_path, capsys):
    """Half an epoch of two processes is no half of ours: it is trained again, and said."""
    state = load_checkpoint(four_epochs[0], "train_dcgan")
    state |= {"world": 2, "progress": {"done": 1, "totals": [1.0] * 4, "whole": False}}
    (tmp_path / "run" / "samples").mkdir(parents=True)
    torch.save(state, tmp_path / "run" / "checkpoint.pt")
    metrics = train_dcgan.main(["--resume", str(tmp_path / "run"), "--epochs", "5"])
    assert "epoch 5 begins anew" in capsys.readouterr().out
    assert [row["epoch"] for row in metrics["epochs"]] == [1, 2, 3, 4, 5]


def test_a_used_folder_is_refused(four_epochs, data):
    """--out never writes over another run."""
    with pytest.raises(UserError, match="isn't empty"):
        run(four_epochs[0], data=data)


# ----------------------------------------------------------------------------- as processes


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_a_process_with_their_code(signum, data, tmp_path):
    """SIGINT ends with 130 and SIGTERM with 143, both saved and with the line that resumes."""
    child = fork(lambda: run(tmp_path / "run", "--epochs", "100000", data=data), tmp_path / "log")
    wait_for(child, tmp_path / "log", "epoch   2")
    os.kill(child, signum)
    assert wait(child) == 128 + signum
    assert f"--resume {tmp_path / 'run'}" in (tmp_path / "log").read_text()
    assert load_checkpoint(tmp_path / "run", "train_dcgan")["epoch"] >= 2


def test_two_processes_train_one_model(data, classifier, tmp_path, monkeypatch):
    """They agree on every weight; rank 0 alone writes, prints and scores."""
    started = time.time()
    options = ["--batch-size", "8", "--epochs", "2", "--fid", classifier]
    said = train_together(
        train_dcgan, lambda: run(tmp_path / "run", *options, data=data), tmp_path, monkeypatch
    )
    assert said.count("fid      floor") == 1
    assert (tmp_path / "run" / "checkpoint.pt").stat().st_mtime > started - 1
    assert (tmp_path / "run" / "epochs.gif").exists()


def test_torchrun_stops_all_processes_after_the_same_batch(data, tmp_path):
    """Ctrl-C under torchrun saves once, says so once, and leaves no process waiting."""
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         train_dcgan.__file__, *TINY, "--batch-size", "8", "--epochs", "100000",
         "--data-dir", str(data), "--out", "run"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("epoch   2"):
            break
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert error.count("--resume run") == 1
    state = load_checkpoint(tmp_path / "run", "train_dcgan")
    assert state["epoch"] >= 2
    assert state["world"] == 2
