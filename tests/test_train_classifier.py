"""The classifier: its network, augmentation, loop, mistakes, and what its data must be like."""

import csv
import shutil

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.datasets import EMNIST

import train_classifier
from common.classifiers import load_classifier
from common.fast import FastLinear
from common.glyphs import CLASSES
from tests.helpers import assert_same, learnt, read_metrics, refusal, with_buffers

# Small and quick: 4 batches of 15 images an epoch, a network of an eighth of the width.
TINY = ["--dataset", "folder", "--batch-size", "15", "--width", "0.125", "--size", "12"]


def make_folder(root, train=30, test=12, classes=("blue", "red")):
    """Write a tiny dataset that can be told apart, noise with one channel brighter; return it."""
    rng = np.random.default_rng(0)
    for half, count in (("train", train), ("test", test)):
        for k, name in enumerate(classes):
            (root / half / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 128, (12, 12, 3), np.uint8)
                pixels[3:9, 3:9, 2 - 2 * k] += 64
                Image.fromarray(pixels).save(root / half / name / f"{i}.png")
    return root


def run(folder, *options, data):
    """Run the script in this process; return what main returns."""
    return train_classifier.main([*TINY, "--data-dir", str(data), "--out", str(folder), *options])


def get_args(*words):
    """Parse a command line for functions that want arguments."""
    return train_classifier.get_parser().parse_args([*TINY, *words])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Give the tests of this file one folder of pictures."""
    return make_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def six_epochs(data, tmp_path_factory):
    """Train six epochs; no test may change the folder."""
    folder = tmp_path_factory.mktemp("runs") / "six"
    return folder, run(folder, "--epochs", "6", data=data)


# ---------------------------------------------------------------------------------------- model


def test_network_shapes_at_every_stage():
    """Half the side three times, wider each time; the last layer is linear."""
    x = torch.randn(2, 1, 28, 28)
    shapes = []
    network = train_classifier.make_network(1, 47)
    for layer in network:
        x = layer(x)
        shapes.append(tuple(x.shape[1:]))
    assert list(dict.fromkeys(shapes)) == [
        (32, 28, 28), (32, 14, 14), (64, 14, 14), (64, 7, 7), (128, 7, 7), (128, 3, 3),
        (128, 1, 1), (128,), (47,)]  # fmt: skip
    assert isinstance(network[-1], nn.Linear)


@pytest.mark.parametrize(("channels", "side"), [(3, 32), (3, 8), (1, 45)])
@pytest.mark.parametrize("width", [0.02, 1.3])
def test_width_channels_and_side(channels, side, width):
    """Any side from 8 on; the channels are the written ones times the width, at least one."""
    network = train_classifier.make_network(channels, 7, width).eval()
    assert network(torch.randn(2, channels, side, side)).shape == (2, 7)
    sizes = [m.out_channels for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert sizes == [max(1, round(width * size)) for size in (32, 32, 32, 64, 64, 128, 128)]


def test_residual_adds_what_its_layers_make():
    """x + f(x); f(x) = -2 x leaves -x."""
    layer = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.constant_(layer.weight, -2.0)
    x = torch.randn(2, 1, 3, 3)
    torch.testing.assert_close(train_classifier.Residual(layer)(x), -x)


# --------------------------------------------------------------------------------------- method


def augment(images, shift, flip, rng):
    """Draw moves and make them."""
    moves = train_classifier.draw_moves(len(images), shift, flip, rng)
    return train_classifier.augment(images, *moves)


def test_augment_without_shift_and_flip_changes_nothing():
    """Nothing asked for, nothing done."""
    images = torch.randint(0, 256, (5, 3, 9, 8), dtype=torch.uint8)
    same = augment(images, 0, False, torch.Generator())
    assert torch.equal(same, images)
    assert same.dtype == torch.uint8


@pytest.mark.parametrize("paper", [0, 200])
def test_augment_shifts_to_every_side_and_fills_with_the_edge(paper):
    """A dot on paper stays one dot on the same paper, within reach, whatever the paper."""
    images = torch.full((400, 1, 9, 9), paper, dtype=torch.uint8)
    images[:, :, 4, 5] = 77
    moved = augment(images, 2, False, torch.Generator().manual_seed(0))
    assert ((moved == 77).sum((1, 2, 3)) == 1).all()
    assert ((moved == paper).sum((1, 2, 3)) == 80).all()
    places = {tuple(place) for place in (moved[:, 0] == 77).nonzero()[:, 1:].tolist()}
    assert places == {(4 + dy, 5 + dx) for dy in range(-2, 3) for dx in range(-2, 3)}


def test_augment_mirrors_half_of_the_images_left_and_right():
    """Each image is itself or its mirror image, about as often."""
    images = torch.randint(0, 256, (400, 3, 6, 7), dtype=torch.uint8)
    drawn = augment(images, 0, True, torch.Generator().manual_seed(0))
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


def test_normalise_survives_blank_images():
    """A channel that is the same everywhere is divided by something."""
    images = torch.full((2, 1, 8, 8), 255, dtype=torch.uint8)
    x = train_classifier.normalise(images, *train_classifier.describe_pixels(images))
    assert x.abs().max() < 1e-3


def test_one_cycle_climbs_and_falls_to_nothing():
    """0 at both ends, the peak after the warm-up, straight lines between."""
    points = {0: 0, 0.1: 1, 0.2: 2, 0.6: 1, 1: 0}
    for done, expected in points.items():
        assert train_classifier.one_cycle(done, 2.0) == pytest.approx(expected)


def test_each_batch_is_augmented_by_a_key_of_its_own(data, tmp_path, monkeypatch):
    """The key is (seed, epoch, rank + 1, step): published numbers depend on it."""
    seeds = []
    draw = train_classifier.draw_moves

    def spy(n, shift, flip, rng):
        seeds.append(rng.initial_seed())
        return draw(n, shift, flip, rng)

    monkeypatch.setattr(train_classifier, "draw_moves", spy)
    run(tmp_path / "run", "--epochs", "2", "--seed", "5", data=data)
    keys = [(5, epoch, 1, step) for epoch in (1, 2) for step in range(4)]
    assert seeds == [train_classifier.make_rng("cpu", *key).initial_seed() for key in keys]


def test_a_step_reads_no_more_than_its_arguments(data, tmp_path, monkeypatch):
    """As a CUDA graph replays it, the weights are the same, bit for bit."""
    run(tmp_path / "plain", "--epochs", "2", data=data)
    monkeypatch.setattr(train_classifier, "captured_step", with_buffers)
    run(tmp_path / "replayed", "--epochs", "2", data=data)
    plain, replayed = (
        learnt(tmp_path / name, "train_classifier") for name in ("plain", "replayed")
    )
    assert_same(plain, replayed)


def test_the_learning_rate_of_a_run_is_one_cycle(data, tmp_path, monkeypatch):
    """Over all epochs, not in each of them."""
    rates = []
    step = torch.optim.SGD.step

    def spy(self, *args, **kwargs):
        rates.extend({group["lr"] for group in self.param_groups})
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    run(tmp_path / "run", "--epochs", "5", "--lr", "2", data=data)
    done = (np.arange(20) + 0.5) / 20
    np.testing.assert_allclose(rates, [train_classifier.one_cycle(d, 2) for d in done])


def test_weight_decay_spares_biases_and_batchnorm():
    """Only what has two dimensions or more is pulled to zero, and every parameter is trained."""
    network = train_classifier.make_network(1, 3, 0.1)
    optimizer = train_classifier.make_optimizer(network, get_args())
    decayed, spared = optimizer.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (5e-4, 0)
    assert all(p.ndim > 1 for p in decayed["params"])
    assert all(p.ndim == 1 for p in spared["params"])
    assert len(decayed["params"]) + len(spared["params"]) == len(list(network.parameters()))


def make_pair(args):
    """Build the network of main and a plain twin, with the same weights."""
    networks = []
    for plain in (False, True):
        torch.manual_seed(0)
        network = train_classifier.make_network(3, 2, args.width)
        if not plain:
            network.to(memory_format=torch.channels_last)
            train_classifier.speed_up_linear(network)
            assert type(network[-1]) is FastLinear
        networks.append(network)
    return networks


def test_train_is_the_straightforward_loop(monkeypatch):
    """One epoch of two batches: the smoothed log loss, and Nesterov's step, by hand, to 1e-5."""
    monkeypatch.setattr(train_classifier, "SHIFT", 0)
    args = get_args("--epochs", "1", "--no-flip", "--lr", "0.05")
    network, plain = make_pair(args)
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (31, 3, 12, 12), dtype=torch.uint8, generator=rng)
    labels = torch.randint(0, 2, (31,), generator=rng)
    pixels = ([0.4, 0.5, 0.6], [0.3, 0.2, 0.1])
    optimizer = train_classifier.make_optimizer(network, args)
    row = train_classifier.train(network, optimizer, images, labels, pixels, args, 1)

    order = torch.randperm(31, generator=train_classifier.make_rng("cpu", 0, 1))
    momentum = [torch.zeros_like(p) for p in plain.parameters()]
    losses = []
    for batch, rate in ((order[:15], 0.05 * 0.75 / 0.8), (order[15:30], 0.05 * 0.25 / 0.8)):
        x = images[batch] / 255
        x = (x - torch.tensor(pixels[0]).view(3, 1, 1)) / torch.tensor(pixels[1]).view(3, 1, 1)
        log_p = plain(x).log_softmax(1)
        target = torch.full((15, 2), 0.05)  # a tenth of the label, spread over two classes
        target[torch.arange(15), labels[batch]] += 0.9
        loss = -(target * log_p).sum(1).mean()
        gradients = torch.autograd.grad(loss, list(plain.parameters()))
        with torch.no_grad():
            for p, gradient, velocity in zip(plain.parameters(), gradients, momentum, strict=True):
                gradient = gradient + (5e-4 * p if p.ndim > 1 else 0)
                velocity.mul_(0.9).add_(gradient)
                p -= rate * (gradient + 0.9 * velocity)
        losses.append(loss.item())
    assert row["train_loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert row["epoch"] == 1
    for (name, value), other in zip(network.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=1e-5, msg=name)


def test_test_is_the_plain_loss_and_accuracy():
    """In eval mode, without smoothing, over all chunks."""
    network, plain = make_pair(get_args())
    images = torch.randint(0, 256, (503, 3, 12, 12), dtype=torch.uint8)
    labels = torch.randint(0, 2, (503,))
    row, logits = train_classifier.test(network, images, labels, ([0.5] * 3, [0.25] * 3), 4)
    expected = plain.eval()((images / 255 - 0.5) / 0.25).detach()
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    loss = -expected.log_softmax(1)[torch.arange(503), labels].mean().item()
    assert row["test_loss"] == pytest.approx(loss, abs=1e-5)
    assert row["test_accuracy"] == (expected.argmax(1) == labels).double().mean().item()
    assert not network.training
    assert row["epoch"] == 4


# ----------------------------------------------------------------------------- what it mistakes


def test_count_mistakes_adds_up():
    """The truth is in the matrix's rows: two of class a taken for c are row 0, column 2."""
    labels, predicted = torch.tensor([0, 0, 0, 1, 2]), torch.tensor([2, 2, 0, 1, 2])
    found = train_classifier.count_mistakes(labels, predicted, ["a", "b", "c", "none"])
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
    found = train_classifier.count_mistakes(labels, predicted, CLASSES)
    assert found["test_accuracy"] == 0.25
    assert found["merged_accuracy"] == 0.75  # A and a don't look alike
    assert found["merged_classes"] == 47


def test_find_mistakes_gives_the_surest_first():
    """Right answers are left out, however unsure."""
    labels = torch.zeros(6).long()
    logits = torch.tensor([[0.1, 0.0]]).repeat(6, 1)
    assert train_classifier.find_mistakes(labels, logits) == []
    logits[3:] = torch.tensor([[0.0, 1.0], [0.0, 3.0], [0.0, 2.0]])
    (i, taken, sure), (j, *_) = train_classifier.find_mistakes(labels, logits, most=2)
    assert (i, taken, j) == (4, 1, 5)
    assert sure == pytest.approx(1 / (1 + np.exp(-3)))


def test_show_mistakes_draws_and_names_them(tmp_path, capsys):
    """Names may hold anything; without a mistake there is no picture of any."""
    images = torch.randint(0, 256, (3, 1, 9, 9), dtype=torch.uint8)
    labels = torch.tensor([0, 0, 1])
    logits = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 3.0]])
    names = ["$x_", "字"]
    train_classifier.show_mistakes(tmp_path, images, labels, logits, names)
    assert "$x_ for 字 (2)" in capsys.readouterr().out
    for name in ("mistakes.png", "confusions.png"):
        assert imageio.imread(tmp_path / name).std() > 5
        (tmp_path / name).unlink()
    right = nn.functional.one_hot(labels, 2).float()
    train_classifier.show_mistakes(tmp_path, images, labels, right, names)
    assert [file.name for file in tmp_path.iterdir()] == ["confusions.png"]


# ----------------------------------------------------------------------------------- the script


def test_a_run_learns_and_leaves_what_it_promises(six_epochs):
    """Pictures, table and metrics.json are there; what can be told apart is told apart."""
    folder, metrics = six_epochs
    saved = read_metrics(folder, metrics)
    assert saved["dataset"] == "folder"
    columns = {"epoch", "train_loss", "test_loss", "test_accuracy", "images_per_second"}
    assert all(set(row) == columns for row in saved["epochs"])
    assert saved["epochs"][-1]["train_loss"] < 0.6 * saved["epochs"][0]["train_loss"]
    assert saved["test_accuracy"] == saved["epochs"][-1]["test_accuracy"] >= 0.95
    matrix = np.array(saved["confusions"])
    assert matrix.sum(1).tolist() == [12, 12]
    assert matrix.trace() / matrix.sum() == pytest.approx(saved["test_accuracy"])
    shares = matrix.diagonal() / matrix.sum(1)
    assert saved["class_accuracy"] == pytest.approx(dict(zip(["blue", "red"], shares, strict=True)))
    with open(folder / "metrics.csv", newline="") as file:
        assert [int(row["epoch"]) for row in csv.DictReader(file)] == [1, 2, 3, 4, 5, 6]
    for name in ("curves.png", "confusions.png"):
        assert imageio.imread(folder / name).std() > 5


def test_the_run_is_a_classifier_that_can_be_explained(six_epochs, data):
    """Loaded from its checkpoint, pixels in [0, 1] in: the same accuracy on the same pictures."""
    classifier = load_classifier(str(six_epochs[0]))
    assert list(classifier.classes) == ["blue", "red"]
    assert (classifier.channels, classifier.size) == (3, 12)
    files = sorted((data / "test").glob("*/*.png"))
    x = np.stack([imageio.imread(file) for file in files]).transpose(0, 3, 1, 2) / 255
    predicted = classifier.network(torch.tensor(x, dtype=torch.float32)).argmax(1)
    names = [classifier.classes[i] for i in predicted]
    right = np.mean([name == file.parent.name for name, file in zip(names, files, strict=True)])
    assert right == pytest.approx(six_epochs[1]["test_accuracy"])


@pytest.mark.parametrize(
    ("dataset", "options", "flip"),
    [("glyphs", [], False), ("folder", [], True), ("folder", ["--no-flip"], False)],
)
def test_characters_are_never_mirrored(dataset, options, flip, data, tmp_path, monkeypatch):
    """A mirrored letter is another one, or none: only photos are mirrored."""
    seen = set()
    draw = train_classifier.draw_moves

    def spy(n, shift, flip, rng):
        seen.add((shift, flip))
        return draw(n, shift, flip, rng)

    monkeypatch.setattr(train_classifier, "draw_moves", spy)
    run(tmp_path / "run", "--dry-run", "--dataset", dataset, *options, data=data)
    assert seen == {(2, flip)}


def test_glyphs_are_counted_with_look_alikes_merged_too(tmp_path, capsys):
    """Both numbers are there, and merging can only help."""
    metrics = run(tmp_path / "run", "--dry-run", "--dataset", "glyphs", data=tmp_path / "data")
    assert metrics["merged_accuracy"] >= metrics["test_accuracy"]
    assert "47 classes" in capsys.readouterr().out


# ------------------------------------------------------------------------------ what is refused


def test_a_finished_run_can_not_be_prolonged(six_epochs):
    """Its learning rate has come to its end."""
    assert "--epochs" in refusal(
        train_classifier.main, ["--resume", str(six_epochs[0]), "--epochs", "7"]
    )


def test_resume_wants_the_same_classes(six_epochs, tmp_path):
    """As many images of the same shape, but of other classes, are other data."""
    other = make_folder(tmp_path, classes=("green", "red"))
    words = ["--resume", str(six_epochs[0]), "--data-dir", str(other)]
    assert str(other) in refusal(train_classifier.main, words)


@pytest.mark.parametrize("words", ["--size 7", "--width 33", "--glyphs 0"])
def test_bad_arguments_are_one_line(words, tmp_path, monkeypatch, refused):
    """A mistake ends in exit code 2 and one line that names it; nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    assert words.split()[0] in refused(train_classifier, *words.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("half", ["train", "test"])
def test_a_class_in_one_half_only_is_named(half, tmp_path):
    """Labels of the two halves would not mean the same."""
    root = make_folder(tmp_path / "data", train=8, test=2, classes=("a", "brown", "c"))
    shutil.rmtree(root / half / "brown")
    assert "brown" in refusal(run, tmp_path / "run", data=root)
    assert not (tmp_path / "run").exists()


def test_one_class_is_nothing_to_tell_apart(tmp_path):
    """A folder of one class is a mistake, not an accuracy of 100 %."""
    root = make_folder(tmp_path / "data", classes=("a",))
    assert "one class" in refusal(run, tmp_path / "run", data=root)


def test_a_folder_without_a_test_half_is_refused(tmp_path):
    """Without pictures kept apart there would be nothing to test on."""
    root = make_folder(tmp_path / "data")
    shutil.rmtree(root / "test")
    assert "test/" in refusal(run, tmp_path / "run", data=root)
