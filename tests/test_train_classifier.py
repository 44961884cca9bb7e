"""The classifier: its network, augmentation, loop, verdict, and what a user can do wrong."""

import csv
import shutil
import signal

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import EMNIST

import train_classifier
from common.checkpoint import load_checkpoint
from common.errors import UserError
from common.glyphs import CLASSES
from common.layers import from_plain
from tests.helpers import assert_same, read_metrics
from tests.processes import train_together

# Small and quick: 4 batches of 15 pictures an epoch, a network of an eighth of the width.
TINY = ["--dataset", "folder", "--batch-size", "15", "--width", "0.125", "--size", "12"]


def make_folder(root, train=30, test=12, classes=("blue", "red"), seed=0):
    """Write a tiny dataset that can be told apart: noise with one channel brighter.

    :return: the folder
    :rtype: pathlib.Path
    """
    rng = np.random.default_rng(seed)
    for half, count in (("train", train), ("test", test)):
        for k, name in enumerate(classes):
            (root / half / name).mkdir(parents=True)
            for i in range(count):
                picture = rng.integers(0, 128, (12, 12, 3), np.uint8)
                picture[3:9, 3:9, 2 - 2 * k] += 64
                Image.fromarray(picture).save(root / half / name / f"{i}.png")
    return root


def run(folder, *options, data):
    """Run the script in this process.

    :return: what main returns
    :rtype: dict
    """
    return train_classifier.main([*TINY, "--data-dir", str(data), "--out", str(folder), *options])


def learnt(folder):
    """Read every tensor and number that a run has learnt.

    :rtype: dict
    """
    state = load_checkpoint(folder, "train_classifier")
    rows = [{k: v for k, v in row.items() if "second" not in k} for row in state["history"]]
    return {key: state[key] for key in ("network", "optimizer", "epoch")} | {"history": rows}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Give the tests of this file one folder of pictures."""
    return make_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def six_epochs(data, tmp_path_factory):
    """Train six epochs without interruption."""
    folder = tmp_path_factory.mktemp("runs") / "six"
    return folder, run(folder, "--epochs", "6", data=data)


# ---------------------------------------------------------------------------------------- model


@pytest.mark.parametrize(("channels", "side"), [(1, 28), (3, 32), (3, 8), (1, 45)])
def test_network_shapes(channels, side):
    """Any side from 8 on, grey or colour; the last layer is linear, its input the features."""
    network = train_classifier.make_network(channels, 7, 0.5)
    x = torch.randn(2, channels, side, side)
    assert network[:-1](x).shape == (2, 64)
    assert network(x).shape == (2, 7)
    assert isinstance(network[-1], torch.nn.Linear)


@pytest.mark.parametrize("width", [0.02, 1.0, 1.3])
def test_width_scales_every_layer(width):
    """The channels are the written ones times the width, never fewer than one."""
    network = train_classifier.make_network(3, 5, width)
    sizes = [m.out_channels for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    plain = [32, 32, 32, 64, 64, 128, 128]
    assert sizes == [max(1, round(width * size)) for size in plain]
    assert network(torch.randn(2, 3, 28, 28)).shape == (2, 5)


# --------------------------------------------------------------------------------------- method


def test_augment_without_shift_and_flip_changes_nothing():
    """Nothing asked for, nothing done."""
    images = torch.randint(0, 256, (5, 3, 9, 8), dtype=torch.uint8)
    same = train_classifier.augment(images, 0, False, torch.Generator())
    assert torch.equal(same, images)
    assert same.dtype == torch.uint8


def test_augment_shifts_to_every_side_and_fills_with_the_edge():
    """A dot on paper stays one dot on the same paper, within reach, whatever the paper."""
    for paper in (0, 200):
        images = torch.full((400, 1, 9, 9), paper, dtype=torch.uint8)
        images[:, :, 4, 5] = 77
        moved = train_classifier.augment(images, 2, False, torch.Generator().manual_seed(0))
        assert ((moved == 77).sum((1, 2, 3)) == 1).all()
        assert ((moved == paper).sum((1, 2, 3)) == 80).all()
        places = {tuple(p) for p in (moved[:, 0] == 77).nonzero()[:, 1:].tolist()}
        assert places == {(4 + dy, 5 + dx) for dy in range(-2, 3) for dx in range(-2, 3)}


def test_augment_mirrors_half_of_the_pictures_left_and_right():
    """Each picture is itself or its mirror image, about as often."""
    images = torch.randint(0, 256, (400, 3, 6, 7), dtype=torch.uint8)
    drawn = train_classifier.augment(images, 0, True, torch.Generator().manual_seed(0))
    same = (drawn == images).flatten(1).all(1)
    mirrored = (drawn == images.flip(3)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 160 < mirrored.sum() < 240


def test_normalise_gives_mean_0_and_deviation_1():
    """With the training images' own numbers, each channel is centred and scaled."""
    images = torch.randint(0, 200, (50, 3, 8, 8), dtype=torch.uint8)
    images[:, 1] //= 7
    mean, std = train_classifier.describe_pixels(images)
    exact = images.double() / 255
    np.testing.assert_allclose(mean, exact.mean((0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(std, exact.std((0, 2, 3), correction=0), rtol=1e-6)
    x = train_classifier.normalise(images, mean, std)
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(3), rtol=1e-3, atol=0)


def test_normalise_survives_blank_pictures():
    """A channel that is the same everywhere is divided by something."""
    images = torch.full((2, 1, 8, 8), 255, dtype=torch.uint8)
    x = train_classifier.normalise(images, *train_classifier.describe_pixels(images))
    assert x.abs().max() < 1e-3


def test_one_cycle_climbs_and_falls_to_nothing():
    """0 at both ends, the peak after the warm-up, straight lines between."""
    points = {0: 0, 0.1: 1, 0.2: 2, 0.6: 1, 1: 0}
    for done, expected in points.items():
        assert train_classifier.one_cycle(done, 2.0) == pytest.approx(expected)


def test_the_learning_rate_of_a_run_is_one_cycle(data, tmp_path, monkeypatch):
    """Over all epochs, not in each of them."""
    rates, step = [], torch.optim.SGD.step

    def spy(self, *args, **kwargs):
        rates.extend({group["lr"] for group in self.param_groups})
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    run(tmp_path / "run", "--epochs", "5", "--lr", "2", data=data)
    done = (np.arange(20) + 0.5) / 20
    np.testing.assert_allclose(rates, [train_classifier.one_cycle(d, 2) for d in done])


def test_weight_decay_spares_biases_and_batchnorm():
    """Only what has two dimensions or more is pulled to zero, and every parameter is trained."""
    args = train_classifier.get_parser().parse_args(["--weight-decay", "0.25"])
    network = train_classifier.make_network(1, 3, 0.1)
    decayed, spared = train_classifier.make_optimizer(network, args).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.25, 0)
    assert all(p.ndim > 1 for p in decayed["params"])
    assert all(p.ndim == 1 for p in spared["params"])
    assert len(decayed["params"]) + len(spared["params"]) == len(list(network.parameters()))


# -------------------------------------------------------------------------------------- verdict


def test_judge_adds_up():
    """The truth is in the matrix's rows: two of class a taken for c are row 0, column 2."""
    labels, predicted = torch.tensor([0, 0, 0, 1, 2]), torch.tensor([2, 2, 0, 1, 2])
    found = train_classifier.judge(labels, predicted, ["a", "b", "c", "none"])
    assert found["test_accuracy"] == pytest.approx(3 / 5)
    assert found["class_accuracy"] == pytest.approx({"a": 1 / 3, "b": 1, "c": 1, "none": 0})
    assert found["confusions"] == [[1, 0, 2, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert "merged_accuracy" not in found


def test_look_alikes_are_emnists_47_classes():
    """What is merged are the classes that EMNIST's split balanced leaves."""
    balanced = EMNIST.classes_split_dict["balanced"]
    assert set(train_classifier.merge_look_alikes(CLASSES)) == set(balanced)
    assert train_classifier.merge_look_alikes(balanced) == balanced
    c, lower_c, a, lower_a = (CLASSES.index(name) for name in "CcAa")
    labels, predicted = torch.tensor([c, lower_c, a, a]), torch.tensor([lower_c, c, a, lower_a])
    found = train_classifier.judge(labels, predicted, CLASSES)
    assert found["test_accuracy"] == 0.25
    assert found["merged_accuracy"] == 0.75  # A and a don't look alike
    assert found["merged_classes"] == 47


def test_find_mistakes_gives_the_surest_first():
    """Right answers are left out, however unsure."""
    labels, logits = torch.zeros(6).long(), torch.tensor([[0.1, 0.0]]).repeat(6, 1)
    assert train_classifier.find_mistakes(labels, logits) == []
    logits[3:] = torch.tensor([[0.0, 1.0], [0.0, 3.0], [0.0, 2.0]])
    (i, taken, sure), (j, *_) = train_classifier.find_mistakes(labels, logits, most=2)
    assert (i, taken, j) == (4, 1, 5)
    assert sure == pytest.approx(1 / (1 + np.exp(-3)))


# ----------------------------------------------------------------------------------- the script


def test_a_run_learns_and_leaves_what_it_promises(six_epochs):
    """Pictures, table and metrics.json are there; what can be told apart is told apart."""
    folder, metrics = six_epochs
    saved = read_metrics(folder, metrics)
    assert saved["dataset"] == "folder"
    assert [row["epoch"] for row in saved["epochs"]] == [1, 2, 3, 4, 5, 6]
    columns = {"epoch", "train_loss", "test_loss", "test_accuracy", "images_per_second"}
    assert all(set(row) == columns for row in saved["epochs"])
    assert saved["epochs"][-1]["train_loss"] < 0.6 * saved["epochs"][0]["train_loss"]
    assert saved["test_accuracy"] == saved["epochs"][-1]["test_accuracy"] >= 0.95
    matrix = np.array(saved["confusions"])
    assert matrix.sum(1).tolist() == [12, 12]
    assert matrix.trace() / matrix.sum() == pytest.approx(saved["test_accuracy"])
    shares = matrix.diagonal() / matrix.sum(1)
    assert list(saved["class_accuracy"]) == ["blue", "red"]
    assert list(saved["class_accuracy"].values()) == pytest.approx(shares.tolist())
    assert "merged_accuracy" not in saved
    with open(folder / "metrics.csv", newline="") as file:
        assert [int(row["epoch"]) for row in csv.DictReader(file)] == [1, 2, 3, 4, 5, 6]
    for name in ("curves.png", "confusions.png"):
        assert imageio.imread(folder / name).std() > 5


def test_the_checkpoint_says_how_to_build_the_network(six_epochs, data):
    """From its file alone, without the script: the same accuracy on the same pictures."""
    state = load_checkpoint(six_epochs[0], "train_classifier")
    with torch.device("meta"):
        network = from_plain(state["layers"])
    network.load_state_dict(state["network"], assign=True)
    assert state["shape"] == [3, 12, 12]
    assert state["classes"] == ["blue", "red"]
    files = sorted((data / "test").glob("*/*.png"))
    x = np.stack([imageio.imread(f) for f in files]).transpose(0, 3, 1, 2) / 255
    x = (x - np.reshape(state["mean"], (3, 1, 1))) / np.reshape(state["std"], (3, 1, 1))
    logits = network.eval()(torch.tensor(x, dtype=torch.float32))
    labels = torch.tensor([state["classes"].index(f.parent.name) for f in files])
    right = (logits.argmax(1) == labels).float().mean().item()
    assert right == pytest.approx(six_epochs[1]["test_accuracy"])


def interrupt_at(call, monkeypatch):
    """Send ourselves SIGINT in one of the batches, counted from 1."""
    calls = []

    def count(network):
        calls.append(network)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train_classifier, "average_gradients", count)


@pytest.mark.parametrize(("call", "epoch", "done"), [(8, 2, 4), (10, 3, 2)])
def test_resume_is_bit_exact(call, epoch, done, six_epochs, data, tmp_path, monkeypatch):
    """Stopped after an epoch's last batch or within an epoch, and gone on: nothing is lost."""
    interrupt_at(call, monkeypatch)
    with pytest.raises(train_classifier.Interrupted, match="--resume") as stop:
        run(tmp_path / "cut", "--epochs", "6", data=data)
    assert stop.value.signum == signal.SIGINT
    state = load_checkpoint(tmp_path / "cut", "train_classifier")
    if done == 4:  # the epoch was whole: the next one begins
        epoch, done = epoch + 1, 0
    assert (state["epoch"], state["progress"]["done"]) == (epoch, done)
    monkeypatch.undo()
    metrics = train_classifier.main(["--resume", str(tmp_path / "cut")])
    assert_same(learnt(tmp_path / "cut"), learnt(six_epochs[0]))
    assert metrics["confusions"] == six_epochs[1]["confusions"]


def test_same_seed_same_weights(six_epochs, data, tmp_path, monkeypatch):
    """A second run is equal bit for bit, although others use the global generator."""
    look = train_classifier.test

    def look_often(*arguments):
        torch.randn(1000)
        return look(*arguments)

    monkeypatch.setattr(train_classifier, "test", look_often)
    run(tmp_path / "again", "--epochs", "6", "--checkpoint-every", "4", data=data)
    assert_same(learnt(tmp_path / "again"), learnt(six_epochs[0]))
    run(tmp_path / "other", "--epochs", "6", "--seed", "1", data=data)
    a, b = (learnt(f)["network"]["0.0.weight"] for f in (tmp_path / "other", six_epochs[0]))
    assert not torch.equal(a, b)


def test_a_finished_run_can_be_judged_again_but_not_prolonged(six_epochs, tmp_path):
    """--resume of a finished run makes its pictures again; its schedule has come to its end."""
    shutil.copytree(six_epochs[0], tmp_path / "run")
    (tmp_path / "run" / "confusions.png").unlink()
    metrics = train_classifier.main(["--resume", str(tmp_path / "run")])
    assert metrics["confusions"] == six_epochs[1]["confusions"]
    assert (tmp_path / "run" / "confusions.png").exists()
    with pytest.raises(UserError, match="--epochs"):
        train_classifier.main(["--resume", str(tmp_path / "run"), "--epochs", "7"])


def test_resume_wants_the_same_data(six_epochs, tmp_path):
    """Another folder of pictures is not what the run was trained on."""
    shutil.copytree(six_epochs[0], tmp_path / "run")
    other = make_folder(tmp_path / "data", classes=("green", "red"))
    with pytest.raises(UserError, match="the data of this run"):
        train_classifier.main(["--resume", str(tmp_path / "run"), "--data-dir", str(other)])


def test_another_number_of_processes_begins_the_epoch_anew(six_epochs, tmp_path, capsys):
    """Half an epoch of two processes is no half of ours: it is trained again, and said."""
    state = load_checkpoint(six_epochs[0], "train_classifier")
    state |= {"world": 2, "epoch": 6, "history": state["history"][:5]}
    state |= {"progress": {"done": 1, "loss": 9.0, "whole": False}}
    (tmp_path / "run").mkdir()
    torch.save(state, tmp_path / "run" / "checkpoint.pt")
    metrics = train_classifier.main(["--resume", str(tmp_path / "run")])
    assert "epoch 6 begins anew" in capsys.readouterr().out
    assert [row["epoch"] for row in metrics["epochs"]] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("dataset", "options", "flip"),
    [
        ("glyphs", [], False),
        ("folder", [], True),
        ("folder", ["--no-flip"], False),
    ],
)
def test_characters_are_never_mirrored(dataset, options, flip, data, tmp_path, monkeypatch):
    """A mirrored letter is another one, or none: only photos are mirrored."""
    seen, augment = set(), train_classifier.augment

    def spy(images, shift, flip, rng):
        seen.add(flip)
        return augment(images, shift, flip, rng)

    monkeypatch.setattr(train_classifier, "augment", spy)
    run(tmp_path / "run", "--dry-run", "--dataset", dataset, *options, data=data)
    assert seen == {flip}


def test_glyphs_are_judged_with_look_alikes_merged_too(tmp_path, data, capsys):
    """Both numbers are there, and merging can only help."""
    metrics = run(tmp_path / "run", "--dry-run", "--dataset", "glyphs", data=data)
    assert metrics["merged_accuracy"] >= metrics["test_accuracy"]
    assert "47 classes" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [["--amp"], ["--shift", "0"], ["--label-smoothing", "0"], ["--width", "0.02"],
     ["--weight-decay", "0"], ["--size", "8"]],
    ids=lambda options: options[0],
)  # fmt: skip
def test_variants_run(options, data, tmp_path):
    """Every variant trains to finite losses."""
    metrics = run(tmp_path / "run", "--dry-run", *options, data=data)
    assert all(np.isfinite(v) for v in metrics["epochs"][0].values())


def test_a_loss_that_is_no_number_stops_and_keeps_the_checkpoint(data, tmp_path, monkeypatch):
    """NaN ends the run with a line that says when; the last good checkpoint stays."""
    train = train_classifier.train

    def spoil(*arguments):
        train(*arguments)
        if arguments[-1] == 2:
            arguments[-2]["loss"] = float("nan")

    monkeypatch.setattr(train_classifier, "train", spoil)
    with pytest.raises(UserError, match=r"epoch 2.*smaller --lr"):
        run(tmp_path / "run", "--epochs", "3", data=data)
    assert load_checkpoint(tmp_path / "run", "train_classifier")["epoch"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs"),
        (["--lr", "nan"], "--lr"),
        (["--batch-size", "1"], "--batch-size"),
        (["--label-smoothing", "1"], "--label-smoothing"),
        (["--weight-decay", "-1"], "--weight-decay"),
        (["--shift", "-1"], "--shift"),
        (["--size", "7"], "--size"),
        (["--width", "0"], "--width"),
        (["--seed", "-1"], "--seed"),
        (["--dataset", "imagenet"], "--dataset"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--resume", "nowhere"], "no checkpoint"),
        (["--glyphs", "8", "--dataset", "glyphs"], "--batch-size"),
        (["--dataset", "folder", "--data-dir", "nowhere"], "nowhere"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, tmp_path, monkeypatch, refused):
    """A mistake ends in exit code 2 and one line that names it; nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    assert message in refused(train_classifier, *arguments)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("half", ["train", "test"])
def test_a_class_in_one_half_only_is_named(half, tmp_path):
    """Labels of the two halves would not mean the same."""
    root = make_folder(tmp_path / "data", train=8, test=2, classes=("a", "b", "c"))
    shutil.rmtree(root / half / "b")
    with pytest.raises(UserError, match="b is in one of train/ and test/ only"):
        run(tmp_path / "run", data=root)
    assert not (tmp_path / "run").exists()


def test_one_class_is_nothing_to_tell_apart(tmp_path):
    """A folder of one class is a mistake, not an accuracy of 100 %."""
    with pytest.raises(UserError, match="one class only"):
        run(tmp_path / "run", data=make_folder(tmp_path / "data", classes=("a",)))


def test_a_folder_without_a_test_half_is_refused(tmp_path):
    """Without pictures kept apart there would be nothing to judge by."""
    root = make_folder(tmp_path / "data")
    shutil.rmtree(root / "test")
    with pytest.raises(UserError, match=r"no folder test/"):
        run(tmp_path / "run", data=root)


def test_a_used_folder_is_refused(six_epochs, data):
    """--out never writes over another run."""
    with pytest.raises(UserError, match="isn't empty"):
        run(six_epochs[0], data=data)


def test_two_processes_train_one_model(data, tmp_path, monkeypatch):
    """They agree on every weight; rank 0 alone writes, prints and tests."""

    def train():
        run(tmp_path / "run", "--epochs", "2", data=data)

    train_together(train_classifier, train, tmp_path, monkeypatch)
    assert (tmp_path / "run" / "confusions.png").exists()
