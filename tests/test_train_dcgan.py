"""The first experiment: its networks, its loop, its run folder, and what a user can do wrong."""

import copy
import csv
import shutil

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import logsigmoid

import train_dcgan
from common.classifiers import load_classifier
from common.data import Dataset, load_dataset
from common.fid import SCORES
from common.glyphs import CLASSES
from common.images import CAPTION
from tests.helpers import (
    assert_same,
    learnt,
    read_metrics,
    refusal,
    save_classifier,
    with_buffers,
)
from tests.processes import train_together

# Small and quick: 2 batches of 16 glyphs an epoch, networks of a sixteenth of the width.
# The learning rate is high, so that 6 steps make samples that differ.
TINY = ["--dataset", "glyphs", "--glyphs", "32", "--batch-size", "16", "--width", "0.0625",
        "--lr", "6", "--d-lr", "6"]  # fmt: skip


def run(folder, *options, data):
    """Run the script in this process; return what main returns."""
    return train_dcgan.main([*TINY, "--data-dir", str(data), "--out", str(folder), *options])


def resume(folder, *options):
    """Go on with a run in this process; return what main returns."""
    return train_dcgan.main(["--resume", str(folder), *options])


def get_args(*words):
    """Parse a command line for functions that want arguments."""
    return train_dcgan.get_parser().parse_args([*TINY, *words])


def make_networks(args, channels=1, classes=5):
    """Build G and D as the script does, always with the same weights."""
    torch.manual_seed(0)
    return train_dcgan.make_networks(args, channels, classes)


def read_table(folder):
    """Read metrics.csv."""
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Give the tests of this file one data folder, so that glyphs are drawn once."""
    folder = tmp_path_factory.mktemp("data")
    for train in (True, False):
        load_dataset("glyphs", folder, train, glyphs=32)
    return folder


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """Train three epochs without interruption; no test may change the folder."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, run(folder, "--epochs", "3", data=data)


@pytest.fixture(scope="module", autouse=True)
def few_samples():
    """Score 500 samples in place of 10,000."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_dcgan, "SAMPLES", 500)
        yield


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """Write a classifier of glyphs with random weights."""
    folder = tmp_path_factory.mktemp("classifier")
    save_classifier(folder, CLASSES, [1, 28, 28])
    return str(folder)


@pytest.fixture(scope="module")
def scored(classifier, data, tmp_path_factory):
    """Train as ``whole`` does, and score each epoch."""
    folder = tmp_path_factory.mktemp("runs") / "scored"
    return folder, run(folder, "--epochs", "3", "--fid", classifier, data=data)


# ------------------------------------------------------------------------------------- networks


def shapes_of(network, x):
    """List the shapes, without the batch, that a batch takes on its way, each once."""
    shapes = []
    for layer in network:
        x = layer(x)
        shapes.append(tuple(x.shape[1:]))
    return list(dict.fromkeys(shapes)), x


def test_generator_shapes_at_every_stage():
    """G: linear to 1024 and 256 x 5 x 5, then 7, 14 and 28 pixels, in [0, 1]."""
    shapes, images = shapes_of(train_dcgan.Generator().layers, torch.randn(2, 100))
    assert shapes == [
        (1024,), (6400,), (256, 5, 5), (128, 7, 7), (64, 14, 14), (1, 28, 28)]  # fmt: skip
    assert images.min() >= 0
    assert images.max() <= 1


def test_discriminator_shapes_at_every_stage():
    """D is G's mirror and returns one logit, not a probability."""
    discriminator = train_dcgan.Discriminator()
    images = torch.rand(2, 1, 28, 28)
    assert shapes_of(discriminator.layers, images)[0] == [
        (64, 14, 14), (128, 7, 7), (256, 5, 5), (6400,), (1024,)]  # fmt: skip
    discriminator.last.bias.data.fill_(-7.0)
    assert discriminator(images).shape == (2, 1)
    assert discriminator(images).max() < 0


@pytest.mark.parametrize(("width", "channels"), [(0.02, 1), (0.5, 3), (1.3, 1)])
def test_width_and_channels(width, channels):
    """Every width gives networks that fit together, for grey and for colour."""
    images = train_dcgan.Generator(7, channels, width)(torch.randn(3, 7))
    assert images.shape == (3, channels, 28, 28)
    assert train_dcgan.Discriminator(channels, width)(images).shape == (3, 1)


@pytest.mark.parametrize("size", range(16, 132, 4))
def test_every_size_fits(size):
    """G draws any multiple of 4, though halving some gives odd sides; D is its mirror."""
    generator = train_dcgan.Generator(7, 1, 0.02, size=size)
    discriminator = train_dcgan.Discriminator(1, 0.02, size=size)
    noise = torch.randn(3, 7)
    ups, images = shapes_of(generator.layers[-(len(generator.layers) - 7) :],
                            generator.layers[:7](noise))  # fmt: skip
    assert images.shape == (3, 1, size, size)
    downs, _ = shapes_of(discriminator.layers, images)
    sides = [shape[-1] for shape in downs if len(shape) == 3]
    assert [shape[-1] for shape in ups] == [*sides[-2::-1], size]
    assert 3 <= sides[-1] <= 8


def test_a_conditional_gan_is_told_the_class():
    """G draws another image for another class; D's logit gains the inner product, equation 3."""
    generator, discriminator = make_networks(get_args("--conditional"))
    z = torch.randn(1, 100).expand(5, -1)
    images = generator(z, torch.arange(5)).detach()
    assert len({image.sum().item() for image in images}) == 5
    discriminator.eval()
    labels = torch.tensor([0, 1, 2, 4, 4])
    features = discriminator.layers(images)
    told = torch.einsum("nf,nf->n", features, discriminator.embed.weight[labels])
    expected = discriminator.last(features) + told.view(5, 1)
    torch.testing.assert_close(discriminator(images, labels), expected)


@pytest.mark.parametrize(
    ("network", "count"), [(train_dcgan.Generator, 2), (train_dcgan.Discriminator, 1)]
)
def test_no_linear_bn_removes_exactly_the_linear_batchnorms(network, count):
    """All other layers stay, and the linear ones get their biases back."""
    kinds = [type(module) for module in network().modules()]
    without = list(network(linear_bn=False).modules())
    assert kinds.count(nn.BatchNorm1d) == count
    assert [type(module) for module in without] == [k for k in kinds if k != nn.BatchNorm1d]
    assert all(module.bias is not None for module in without if isinstance(module, nn.Linear))


def test_init_weights_is_the_papers():
    """Weights come from N(0, 0.02), BatchNorm's from N(1, 0.02), biases are zero."""
    torch.manual_seed(0)
    network = train_dcgan.Discriminator().apply(train_dcgan.init_weights)
    assert network.layers[1][0].weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert network.layers[2][1].weight.mean().item() == pytest.approx(1.0, abs=0.01)
    assert network.layers[2][1].weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert network.layers[0][0].bias.abs().max() == 0


@pytest.mark.parametrize("level", [0, 26, 204, 255])
def test_samples_begin_as_bright_as_the_data(level):
    """The bias of G's last layer is the logit of the mean pixel; black data are no infinity."""
    generator, _ = make_networks(get_args("--width", "0.25"), channels=3)
    images = torch.full((9, 3, 28, 28), level, dtype=torch.uint8)
    train_dcgan.init_brightness(generator, images)
    mean = generator(torch.randn(32, 100)).mean().item()
    assert mean == pytest.approx(level / 255, abs=0.01)
    assert torch.isfinite(generator.layers[-2].bias).all()


# --------------------------------------------------------------------------------------- method


def test_bce_is_the_log_loss():
    """Equal to -log sigmoid(logit) for data, -log(1 - sigmoid(logit)) for samples."""
    logits = torch.tensor([[0.3], [-2.0], [90.0]])
    data_loss = train_dcgan.bce(logits, 1.0)
    sample_loss = train_dcgan.bce(logits, 0.0)
    torch.testing.assert_close(data_loss, -logsigmoid(logits).mean())
    torch.testing.assert_close(sample_loss, -logsigmoid(-logits).mean())
    p = logits[:2].sigmoid()
    torch.testing.assert_close(train_dcgan.bce(logits[:2], 0.0), -(1 - p).log().mean())


def test_draw_z_is_normal_and_the_rngs_own():
    """Mean 0, variance 1, and a function of the generator alone."""
    args = get_args("--z-dim", "10")
    first = train_dcgan.draw_z(4000, args, torch.Generator().manual_seed(0))
    again = train_dcgan.draw_z(4000, args, torch.Generator().manual_seed(0))
    assert first.shape == (4000, 10)
    assert first.mean().item() == pytest.approx(0, abs=0.02)
    assert first.var().item() == pytest.approx(1, rel=0.05)
    assert torch.equal(first, again)


def test_interpolate_goes_from_end_to_end():
    """The walk holds both ends, in steps of one angle, at lengths between theirs."""
    a, b = torch.randn(2, 100, generator=torch.Generator().manual_seed(0))
    walk = train_dcgan.interpolate(a, b, 8)
    torch.testing.assert_close(walk[0], a)
    torch.testing.assert_close(walk[-1], b)
    assert walk.norm(dim=1).min() > 0.95 * min(a.norm(), b.norm())
    # Of two vectors of one length, the walk keeps to the sphere and turns evenly.
    walk = train_dcgan.interpolate(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0]), 4)
    angles = torch.linspace(0, np.pi / 2, 4)
    torch.testing.assert_close(walk, 2 * torch.stack([angles.cos(), angles.sin()], 1))


def test_interpolate_between_parallel_ends_is_finite():
    """They have no angle between them, and rounding makes their cosine exceed 1."""
    for z in torch.randn(200, 100, generator=torch.Generator().manual_seed(1)):
        for end in (z, 2 * z, -z):
            assert torch.isfinite(train_dcgan.interpolate(z, end, 3)).all()


def reference_step(generator, discriminator, optimizers, real, labels, z):
    """Do what the paper's algorithm says, with nothing clever."""
    g_optimizer, d_optimizer = optimizers
    fake = generator(z, labels)
    d_real = discriminator(real, labels).sigmoid()
    d_fake = discriminator(fake.detach(), labels).sigmoid()
    d_loss = -d_real.log().mean() - (1 - d_fake).log().mean()
    d_optimizer.zero_grad()
    d_loss.backward()
    d_optimizer.step()

    g_loss = -discriminator(fake, labels).sigmoid().log().mean()
    g_optimizer.zero_grad()
    d_optimizer.zero_grad()
    g_loss.backward()
    g_optimizer.step()
    return torch.stack([d_loss, g_loss, d_real.mean(), d_fake.mean()]).detach()


# Adam divides a gradient by its own size: what rounding leaves of a zero would become a whole
# step. In float64 that is below its epsilon; in float32 SGD shows how far gradients are off.
@pytest.mark.parametrize(("name", "dtype"), [("adam", torch.float64), ("sgd", torch.float32)])
@pytest.mark.parametrize("option", ["--linear-bn", "--no-linear-bn", "--conditional"])
def test_train_step_is_the_straightforward_one(name, dtype, option):
    """Two steps move both networks as plain layers and plain optimizers do, to 1e-5."""
    args = get_args("--width", "0.25", "--lr", "1e-3", "--optimizer", name, option)
    networks = make_networks(args)
    plain = []
    plain_optimizers = []
    args.d_lr = args.lr
    for network in networks:
        network.to(dtype)
        twin = copy.deepcopy(network).to(memory_format=torch.contiguous_format)
        for module in twin.modules():
            if isinstance(module, nn.Linear):
                module.__class__ = nn.Linear
        plain.append(twin)
        if name == "adam":
            optimizer = torch.optim.Adam(twin.parameters(), 1e-3, (0.5, 0.999), fused=False)
        else:
            optimizer = torch.optim.SGD(twin.parameters(), 1e-3, momentum=0.9, nesterov=True)
        plain_optimizers.append(optimizer)
    before = [copy.deepcopy(network) for network in networks]
    optimizers = train_dcgan.make_optimizers(networks, args)

    rng = torch.Generator().manual_seed(0)
    for _ in range(2):
        real = torch.rand(16, 1, 28, 28, generator=rng).to(dtype)
        labels = torch.arange(16) % 5
        z = torch.randn(16, 100, generator=rng).to(dtype)
        found = train_dcgan.train_step(*networks, optimizers, real, labels, z)
        expected = reference_step(*plain, plain_optimizers, real, labels, z)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    for old, network, twin in zip(before, networks, plain, strict=True):
        for (key, value), other in zip(network.state_dict().items(), twin.state_dict().values(),
                                       strict=True):  # fmt: skip
            torch.testing.assert_close(value, other, rtol=0, atol=1e-5, msg=key)
        for p, q in zip(old.parameters(), network.parameters(), strict=True):
            assert not torch.equal(p, q)


def test_discriminator_is_frozen_while_the_generator_learns(monkeypatch):
    """D's gradients are those of its own loss, and it can learn again afterwards."""
    args = get_args()
    generator, discriminator = make_networks(args)
    optimizers = train_dcgan.make_optimizers((generator, discriminator), args)
    seen = []

    def spy(model):
        frozen = [not p.requires_grad for p in discriminator.parameters()]
        seen.append((model, frozen, [p.grad.clone() for p in discriminator.parameters()]))

    monkeypatch.setattr(train_dcgan, "average_gradients", spy)
    real = torch.rand(16, 1, 28, 28)
    labels = torch.zeros(16, dtype=torch.int64)
    z = torch.randn(16, 100)
    train_dcgan.train_step(generator, discriminator, optimizers, real, labels, z)
    (first, d_frozen, kept), (second, g_frozen, still) = seen
    assert first is discriminator
    assert second is generator
    assert not any(d_frozen)
    assert all(g_frozen)
    assert_same(kept, still)
    assert_same(kept, [p.grad for p in discriminator.parameters()])
    assert all(p.requires_grad for p in discriminator.parameters())


def test_update_ema_is_a_moving_average_of_weights_and_statistics():
    """Parameters and BatchNorm's running statistics are averaged."""
    generator = train_dcgan.Generator(width=0.05)
    ema = copy.deepcopy(generator)
    with torch.no_grad():
        for tensor in generator.state_dict().values():
            tensor.add_(1)
    before = copy.deepcopy(ema.state_dict())
    train_dcgan.update_ema(ema, generator, torch.tensor(0.1))
    for name, tensor in ema.state_dict().items():
        expected = before[name] + (0.1 if tensor.is_floating_point() else 0)
        torch.testing.assert_close(tensor, expected)


def train_some(images, epochs, *words):
    """Call train() as main does; return G, D, G's average and the rows."""
    args = get_args(*words)
    generator, discriminator = make_networks(args)
    ema = copy.deepcopy(generator)
    optimizers = train_dcgan.make_optimizers((generator, discriminator), args)
    labels = torch.arange(len(images)) % 5
    data = Dataset("noise", images, labels, list("abcde"))
    rows = [
        train_dcgan.train(generator, discriminator, ema, optimizers, data, args, epoch)
        for epoch in range(1, epochs + 1)
    ]
    return generator, discriminator, ema, rows


def noise_images(n):
    """Draw n images of noise."""
    rng = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 1, 28, 28), dtype=torch.uint8, generator=rng)


def test_the_average_remembers_no_longer_than_the_run(monkeypatch):
    """Its decay climbs with the steps, (1 + t) / (10 + t), up to --ema; 0 is G itself."""
    shares = []
    update = train_dcgan.update_ema

    def spy(ema, generator, share):
        shares.append(share.item())
        update(ema, generator, share)

    monkeypatch.setattr(train_dcgan, "update_ema", spy)
    train_some(noise_images(40), 3, "--ema", "0.3")
    assert shares == pytest.approx([9 / 10, 9 / 11, 9 / 12, 0.7, 0.7, 0.7])
    generator, _, ema, _ = train_some(noise_images(40), 1, "--ema", "0")
    for ours, value in zip(ema.parameters(), generator.parameters(), strict=True):
        torch.testing.assert_close(ours, value)


def test_train_shows_each_image_once_and_averages_what_the_steps_return(monkeypatch):
    """An epoch is a permutation, cut into batches; another epoch is another one."""
    images = torch.arange(35, dtype=torch.uint8).view(35, 1, 1, 1).expand(35, 1, 28, 28)
    shown = []
    noise = []

    def step(generator, discriminator, optimizers, real, labels, z, amp):
        assert torch.equal(labels, (real[:, 0, 0, 0] * 255).round().long() % 5)
        shown.append((real[:, 0, 0, 0] * 255).round().int().tolist())
        noise.append(z)
        return torch.tensor([4.0, 3.0, 2.0, 1.0]) * len(shown)

    monkeypatch.setattr(train_dcgan, "train_step", step)
    rows = train_some(images, 2)[-1]
    first, second, *_ = shown
    assert len(set(first + second)) == 32
    assert max(map(max, shown)) < 35
    assert shown[:2] != shown[2:]
    # The keys (seed, epoch, rank + 1): published numbers depend on them.
    for epoch, pair in ((1, noise[:2]), (2, noise[2:])):
        rng = train_dcgan.make_rng("cpu", 0, epoch, 1)
        for z in pair:
            assert torch.equal(z, torch.randn(16, 100, generator=rng))
    names = ("epoch", "d_loss", "g_loss", "d_real", "d_fake")
    assert [tuple(row[name] for name in names) for row in rows] == [
        (1, 6.0, 4.5, 3.0, 1.5), (2, 14.0, 10.5, 7.0, 3.5)]  # fmt: skip


@pytest.mark.parametrize("options", [(), ("--conditional", "--amp")])
def test_a_step_reads_no_more_than_its_arguments(options, monkeypatch):
    """As a CUDA graph replays it: with every step's tensors copied over those of the first."""
    plain = train_some(noise_images(80), 2, *options)

    monkeypatch.setattr(train_dcgan, "captured_step", with_buffers)
    replayed = train_some(noise_images(80), 2, *options)
    for one, other in zip(plain[:3], replayed[:3], strict=True):
        assert_same(one.state_dict(), other.state_dict())
    assert [row["d_loss"] for row in plain[3]] == [row["d_loss"] for row in replayed[3]]


def test_discriminator_learns_to_tell_64_images_apart(data, monkeypatch):
    """Overfit: on 64 images D's loss leaves chance, 2 log 2, although G learns as fast."""
    images = load_dataset("glyphs", data, glyphs=64).images
    monkeypatch.setattr(train_dcgan, "WARM_UP", 1)
    rows = train_some(images, 25, "--width", "0.125", "--lr", "1e-3", "--d-lr", "1e-3")[-1]
    d_loss = np.array([row["d_loss"] for row in rows])
    told_apart = np.array([row["d_real"] - row["d_fake"] for row in rows])
    assert d_loss[0] == pytest.approx(2 * np.log(2), abs=0.05)
    assert d_loss[-5:].mean() < 0.9 * d_loss[0]
    assert told_apart[-5:].mean() > 0.1


def test_samples_do_not_depend_on_their_batch():
    """Samples are drawn in eval mode: with BatchNorm in train mode they would differ."""
    ema, _ = make_networks(get_args("--width", "0.1"))
    ema(torch.randn(64, 100))  # moves the running statistics
    z = torch.randn(64, 100)
    first = train_dcgan.test(ema, z, 5, get_args(), 1)
    z[8:] = torch.randn(56, 100)  # other neighbours, below the first row
    second = train_dcgan.test(ema, z, 5, get_args(), 1)
    assert np.array_equal(first[:60], second[:60])
    assert not np.array_equal(first[60:480], second[60:480])


def test_generate_leaves_no_sample_out():
    """Chunks are put together in order, whatever the number."""
    ema, _ = make_networks(get_args())
    z = torch.randn(1003, 100)
    chunks = list(train_dcgan.generate(ema, z, torch.arange(1003) % 5))
    assert [len(chunk) for chunk in chunks] == [500, 500, 3]
    torch.testing.assert_close(chunks[-1], ema(z[1000:]))


@pytest.mark.parametrize(("classes", "columns", "rows"), [(5, 5, 8), (47, 24, 8), (62, 31, 8)])
def test_a_conditional_grid_has_one_class_a_column(classes, columns, rows):
    """And one noise vector a row, or every two rows where there are many classes."""
    args = get_args("--conditional", "--width", "0.02")
    ema, _ = make_networks(args, classes=classes)
    for weights in ema.parameters():  # samples would all be grey
        nn.init.normal_(weights)
    z = torch.randn(64, 100)
    picture = train_dcgan.test(ema, z, classes, args, 1)[:-CAPTION, :, 0]
    lines = -(-classes // columns)
    assert picture.shape[1] == 2 * (columns * 30 + 2)
    assert picture.shape[0] == rows // lines * 2 * (lines * 30 + 2)
    chosen = classes - 2
    image = ema(z[:1], torch.tensor([chosen]))[0, 0]
    top = 4 + 60 * (chosen // columns)
    left = 4 + 60 * (chosen % columns)
    cell = picture[top : top + 56 : 2, left : left + 56 : 2]
    assert np.abs(cell - 255 * image.detach().numpy()).max() <= 1
    assert np.ptp(cell) > 100


def test_labels_come_as_often_as_in_the_data():
    """Classes that the data lack are never drawn."""
    labels = train_dcgan.draw_labels(8000, [3, 0, 1], torch.Generator().manual_seed(0))
    shares = labels.bincount(minlength=3) / 8000
    torch.testing.assert_close(shares, torch.tensor([0.75, 0.0, 0.25]), atol=0.02, rtol=0)


def test_a_text_is_written_letter_by_letter():
    """Each drawn anew, in the other case where the data have only that one; spaces are empty."""
    args = get_args("--conditional")
    classes = ["A", "b", "c", "B", "1"]
    asked = []

    def draw(z, labels):
        asked.extend(labels.tolist())
        images = torch.zeros(len(z), 1, 28, 28)
        images[..., 10:14] = 1
        return images

    generator = nn.Linear(1, 1)
    generator.forward = draw
    rng = torch.Generator().manual_seed(0)
    hand = torch.zeros(1, 100)
    picture = train_dcgan.write_text(generator, "ab  B 1", hand, classes, args, rng)
    assert asked == [0, 1, 3, 4]
    assert picture.shape == (1, 28, 4 * 6 + 2 * 9)  # four pixels of ink and a margin of one
    assert "é" in refusal(train_dcgan.write_text, generator, "é", hand, classes, args, rng)
    assert train_dcgan.trim(torch.zeros(1, 28, 28)).shape == (1, 28, 28)
    lines = train_dcgan.stack([torch.ones(1, 28, 5), torch.ones(1, 28, 9)])
    assert lines.shape == (1, 56, 9)
    assert lines.sum() == 28 * 14


@pytest.mark.parametrize(
    ("epochs", "pixels", "expected"),
    [(3, 100, [0, 1, 2, 3]), (100, 100, [*range(0, 101, 2)]), (7, 10**8, [0, 7])],
)
def test_the_gif_has_few_frames(epochs, pixels, expected):
    """At most 51, and fewer of large pictures; the first and the last are among them."""
    assert train_dcgan.choose_frames(epochs, pixels) == expected


# ----------------------------------------------------------------------------------- the script


def test_a_run_leaves_what_it_promises(whole):
    """Pictures, GIF, curves, table and metrics.json are there, readable and not blank."""
    folder, metrics = whole
    grids = [imageio.imread(folder / "samples" / f"epoch_{e:03d}.png") for e in range(4)]
    assert {g.shape for g in grids} == {grids[0].shape}
    assert all(g.std() > 5 for g in grids)
    assert not np.array_equal(grids[0], grids[-1])
    gif = imageio.imread(folder / "epochs.gif", index=None)
    assert len(gif) == 4
    assert gif.shape[1:3] == grids[0].shape[:2]
    for name in ("losses.png", "data.png"):
        assert imageio.imread(folder / name).std() > 5

    names = {"epoch", "d_loss", "g_loss", "d_real", "d_fake", "images_per_second"}
    assert all(set(row) == names for row in metrics["epochs"])
    assert all(0 < row["d_real"] < 1 for row in metrics["epochs"])


def test_two_epochs_more_are_three_at_once(whole, data, tmp_path):
    """--epochs may grow: every tensor and picture is that of a run that began with as many."""
    run(tmp_path, "--epochs", "1", data=data)
    resume(tmp_path, "--epochs", "3")
    assert_same(learnt(tmp_path, "train_dcgan"), learnt(whole[0], "train_dcgan"))
    for name in [f"samples/epoch_{epoch:03d}.png" for epoch in range(4)] + ["epochs.gif"]:
        assert (tmp_path / name).read_bytes() == (whole[0] / name).read_bytes()


def test_looking_changes_no_weight(whole, data, tmp_path, monkeypatch):
    """A second run is equal bit for bit, although it draws samples far more often."""
    look = train_dcgan.test

    def look_often(*arguments):
        for _ in range(3):
            picture = look(*arguments)
        return picture

    monkeypatch.setattr(train_dcgan, "test", look_often)
    run(tmp_path, "--epochs", "3", data=data)
    assert_same(learnt(tmp_path, "train_dcgan"), learnt(whole[0], "train_dcgan"))


@pytest.mark.parametrize(
    "options",
    [["--no-linear-bn"], ["--ema", "0"], ["--optimizer", "sgd"], ["--amp"], ["--z-dim", "1"]],
    ids=lambda options: options[0],
)
def test_variants_run(options, data, tmp_path):
    """Every variant trains one batch to finite losses."""
    metrics = run(tmp_path / "run", "--dry-run", *options, data=data)
    (row,) = metrics["epochs"]
    assert all(np.isfinite(value) for value in row.values())
    assert metrics["args"]["epochs"] == 1


def test_default_learning_rates():
    """Adam's is 5e-4 / width and half of it, with the paper's momentum 0.5; SGD's is 0.01."""
    parser = train_dcgan.get_parser()
    layers = nn.Linear(1, 1), nn.Linear(1, 1)
    for words, *rates in (
        ("", 5e-4, 2.5e-4),
        ("--width 0.25", 2e-3, 1e-3),
        ("--optimizer sgd", 0.01, 0.01),
        ("--lr 0.3", 0.3, 0.15),
        ("--lr 0.3 --d-lr 0.2", 0.3, 0.2),
    ):
        optimizers = train_dcgan.make_optimizers(layers, parser.parse_args(words.split()))
        assert [optimizer.defaults["lr"] for optimizer in optimizers] == rates
        assert all(o.defaults.get("betas", (0.5, 0.999)) == (0.5, 0.999) for o in optimizers)


def test_the_learning_rate_climbs():
    """In a straight line, over 300 steps, for both networks; then it stays."""
    args = get_args("--lr", "0.3", "--d-lr", "0.1")
    optimizers = train_dcgan.make_optimizers((nn.Linear(1, 1), nn.Linear(1, 1)), args)
    for seen, share in ((0, 1 / 300), (149, 0.5), (299, 1), (5000, 1)):
        train_dcgan.warm_up(optimizers, seen, args)
        rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
        assert rates == pytest.approx([0.3 * share, 0.1 * share])


def test_warns_when_the_discriminator_has_won(capsys):
    """A generator that is no match for D is said to be none."""
    row = {"epoch": 1, "d_loss": 0.3, "g_loss": 9.0, "d_real": 0.94, "d_fake": 0.06,
           "images_per_second": 1.0}  # fmt: skip
    train_dcgan.print_row(row)
    assert capsys.readouterr().err.count("\n") == 1
    train_dcgan.print_row({**row, "d_fake": 0.2})
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------ samples and FID


def test_sample_draws_from_a_finished_run(whole, tmp_path):
    """--sample needs no training and no data; seed 0 begins with the run's own grid."""
    folder = whole[0]
    drawn = []
    for seed in ("0", "1"):
        out = tmp_path / seed
        words = ["--sample", str(folder), "-n", "70", "--seed", seed, "--out", str(out)]
        metrics = train_dcgan.main(words)
        read_metrics(out, metrics)
        drawn.append(np.load(out / "samples.npz")["images"])
        assert imageio.imread(out / "samples.png").std() > 5
    images, other = drawn
    assert images.shape == (70, 1, 28, 28)
    assert images.dtype == np.uint8
    assert not np.array_equal(images[0], images[1])
    assert not np.array_equal(images, other)
    grid = imageio.imread(folder / "samples" / "epoch_003.png")
    first = grid[4:60:2, 4:60:2, 0].astype(int)  # scaled by 2, behind a gap of 2 pixels
    assert np.abs(first - images[0, 0]).max() <= 1


def test_the_generator_alone_is_enough_to_sample(whole, tmp_path):
    """generator.pt draws what the run draws, to one grey level, and can't be resumed."""
    drawn = []
    for name in ("checkpoint.pt", "generator.pt"):
        out = tmp_path / name
        train_dcgan.main(["--sample", str(whole[0] / name), "--pngs", "--out", str(out)])
        drawn.append(np.load(out / "samples.npz")["images"].astype(int))
    assert np.abs(drawn[0] - drawn[1]).max() <= 1
    assert len(list((out / "samples").iterdir())) == 64
    png = imageio.imread(out / "samples/000063.png")
    assert np.array_equal(png[..., 0], drawn[1][63, 0])
    refusal(resume, whole[0] / "generator.pt", "--epochs", "4")


def test_a_conditional_run_from_training_to_text(classifier, data, tmp_path):
    """It is scored by what is recognised, resumes bit for bit, draws one class and writes."""
    words = ["--conditional", "--fid", classifier]
    whole = run(tmp_path / "whole", "--epochs", "2", *words, data=data)
    run(tmp_path / "part", "--epochs", "1", *words, data=data)
    resume(tmp_path / "part", "--epochs", "2")
    assert_same(learnt(tmp_path / "part", "train_dcgan"), learnt(tmp_path / "whole", "train_dcgan"))
    assert 0 <= whole["epochs"][-1]["recognised"] <= 1

    model = str(tmp_path / "whole")
    train_dcgan.main(["--sample", model, "--class", "g", "--out", str(tmp_path / "g")])
    found = np.load(tmp_path / "g/samples.npz")
    assert set(found["labels"]) == {CLASSES.index("g")}
    assert not np.array_equal(found["images"][0], found["images"][1])
    train_dcgan.main(["--sample", model, "--text", "Hello 2026", "--out", str(tmp_path / "text")])
    picture = imageio.imread(tmp_path / "text/text.png")
    assert picture.shape[0] == 4 * 28
    assert picture.shape[1] > 4 * 9 * 3
    assert "ß" in refusal(train_dcgan.main, ["--sample", model, "--text", "Straße"])
    refusal(train_dcgan.main, ["--sample", model, "--text", " "])


def test_what_comes_with_the_repository_writes_and_reads(tmp_path):
    """The generator writes a digit that the classifier beside it reads."""
    words = ["--sample", "pretrained", "--class", "7", "-n", "32", "--out", str(tmp_path)]
    train_dcgan.main(words)
    images = torch.from_numpy(np.load(tmp_path / "samples.npz")["images"])
    folder = train_dcgan.PRETRAINED.parent / "classifier-emnist"
    classifier = load_classifier(str(folder), torch.device("cpu"))
    with torch.no_grad():
        read = classifier.network(images / 255).argmax(1)
    assert (read == classifier.classes.index("7")).double().mean() > 0.9


def test_colour_at_another_size(tmp_path):
    """Pictures of a folder are resized to --size, and samples have that size, too."""
    for i in range(16):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 50, 3), np.uint8)
        (tmp_path / "photos").mkdir(exist_ok=True)
        imageio.imwrite(tmp_path / f"photos/{i}.png", pixels)
    words = ["--dataset", "folder", "--data-dir", str(tmp_path / "photos"), "--size", "44",
             "--width", "0.02", "--dry-run", "--out", str(tmp_path / "run")]  # fmt: skip
    train_dcgan.main(words)
    train_dcgan.main(["--sample", str(tmp_path / "run"), "--out", str(tmp_path / "drawn")])
    assert np.load(tmp_path / "drawn/samples.npz")["images"].shape == (64, 3, 44, 44)
    assert "one class" in refusal(train_dcgan.main, [*words[:-1], "elsewhere", "--conditional"])


def test_a_short_run_says_so(capsys):
    """24 steps give grey squares: steps count, not epochs."""
    train_dcgan.tell_steps(4, get_args("--epochs", "6"))
    said = capsys.readouterr()
    assert "4 an epoch, 24 in all" in said.out
    assert said.err.count("\n") == 1
    train_dcgan.tell_steps(500, get_args("--epochs", "2"))
    assert capsys.readouterr().err == ""


PLAIN = [name for name in SCORES if name != "recognised"]  # of a GAN that knows no classes


def test_scoring_changes_no_weight(scored, whole):
    """With --fid every tensor of a run is the same, bit for bit."""
    plain = learnt(whole[0], "train_dcgan")
    assert_same(learnt(scored[0], "train_dcgan", SCORES), plain)


def test_scores_are_recorded(scored):
    """Each epoch's, the last one's in full, the untrained generator's, the training images'."""
    folder, metrics = scored
    fid = metrics["fid"]
    assert fid["floor"]["fid"] < min(fid["final"]["fid"], fid["ceiling"]["fid"])
    assert fid["final"]["fid"] != fid["ceiling"]["fid"]
    assert fid["samples"] == sum(fid["final"]["classes"].values()) == 500
    last = {name: fid["final"][name] for name in PLAIN}
    assert last.items() <= metrics["epochs"][-1].items()
    assert [float(row["fid"]) for row in read_table(folder)] == [
        row["fid"] for row in metrics["epochs"]]  # fmt: skip


def test_a_run_can_be_scored_at_any_time(scored, whole, classifier, data, tmp_path):
    """--sample RUN --fid gives the numbers of the training itself, to the last bit."""
    words = ["--sample", str(whole[0]), "--fid", classifier]
    metrics = train_dcgan.main([*words, "--data-dir", str(data), "--out", str(tmp_path)])
    assert metrics["fid"]["final"] == scored[1]["fid"]["final"]
    assert metrics["fid"]["floor"] == scored[1]["fid"]["floor"]


def test_resume_goes_on_scoring(scored, classifier, data, tmp_path):
    """A resumed run keeps its --fid, and its scores are those of an uninterrupted one."""
    folder = tmp_path / "run"
    run(folder, "--epochs", "2", "--fid", classifier, data=data)
    metrics = resume(folder, "--epochs", "3")
    assert_same(learnt(folder, "train_dcgan"), learnt(scored[0], "train_dcgan"))
    assert metrics["fid"] == scored[1]["fid"]


def test_resume_can_begin_to_score(scored, whole, classifier, tmp_path):
    """A run that had no --fid gets columns that begin with empty cells."""
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    resume(folder, "--epochs", "4", "--fid", classifier)
    rows = read_table(folder)
    assert [row["fid"] == "" for row in rows] == [True, True, True, False]
    assert set(rows[0]) > set(PLAIN)


def test_the_first_of_two_processes_scores(classifier, data, tmp_path, monkeypatch):
    """Once; both train the same weights."""
    words = ["--batch-size", "8", "--epochs", "2", "--fid", classifier]
    said = train_together(
        train_dcgan, lambda: run(tmp_path / "run", *words, data=data), tmp_path, monkeypatch
    )
    assert said.count("fid      floor") == 1
    assert all(float(row["fid"]) > 0 for row in read_table(tmp_path / "run"))


def test_resume_refuses_another_classifier(scored, tmp_path):
    """Scores of two classifiers don't compare, so they don't go into one curve."""
    save_classifier(tmp_path, CLASSES, [1, 28, 28], seed=1)
    before = (scored[0] / "checkpoint.pt").read_bytes()
    refusal(resume, scored[0], "--epochs", "4", "--fid", str(tmp_path))
    assert (scored[0] / "checkpoint.pt").read_bytes() == before


def test_an_unfit_classifier_is_refused_before_anything_is_written(data, tmp_path):
    """One of colour images, and one that isn't there."""
    save_classifier(tmp_path, CLASSES, [3, 28, 28])
    for name in (str(tmp_path), "nowhere"):
        refusal(run, tmp_path / "run", "--fid", name, data=data)
        assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "words",
    [
        "--ema 1",
        "--sample nowhere",
        "--z-dim 0",
        "-n 0",
        "--sample a --resume b",
        "--size 30",
        "--text hi",
    ],
)
def test_bad_arguments_are_one_line(words, tmp_path, monkeypatch, refused):
    """A mistake ends in exit code 2 and one line that names it; nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    error = refused(train_dcgan, *words.split())
    assert words.split()[0] in error or "nowhere" in error
    assert not (tmp_path / "runs").exists()


def test_only_a_run_of_this_script_can_be_sampled(classifier, tmp_path, monkeypatch, refused):
    """A classifier draws nothing."""
    monkeypatch.chdir(tmp_path)
    assert "train_classifier" in refused(train_dcgan, "--sample", classifier)
    assert not (tmp_path / "runs").exists()
