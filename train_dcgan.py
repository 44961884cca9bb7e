"""Train a DCGAN (Radford et al. 2015, arXiv 1511.06434) on handwriting.

Two networks play against each other. The discriminator D learns to tell data x
from samples G(z); the generator G learns to turn noise z into samples that D
takes for data (Goodfellow et al. 2014, arXiv 1406.2661, with the
non-saturating loss of section 3):

    D:  min  -E_x[log D(x)] - E_z[log(1 - D(G(z)))]
    G:  min  -E_z[log D(G(z))]

    python train_dcgan.py --epochs 100 --cuda

With --conditional both are told the class y of an image: G's noise is joined by
a vector for y, and D adds to its logit the inner product of its features with
another (Miyato & Koyama 2018, arXiv 1802.05637). Such a GAN writes:

    python train_dcgan.py --sample pretrained --text "Hello 2026"

Images are 28 x 28 pixels, or --size. On two CPU cores an epoch of MNIST takes
two minutes (AMD) or four (Intel); most digits are legible after three epochs.

Without BatchNorm1d after the linear layers (--no-linear-bn) G never catches
up, and all its samples collapse into one: results/README.md shows samples with
and without it. benchmarks/README.md measures what improves the samples, as
scored by --fid.

Differences from the paper: 28 x 28 pixels, hence two linear layers that lead to
5 x 5 feature maps, and other kernel sizes; sigmoid and [0, 1] in place of tanh
and [-1, 1]; the output bias starts at the data's mean brightness; z is normal,
not uniform; smaller batches; a larger learning rate, that climbs for 300 steps
and of which D takes half; samples come from a moving average of G's weights
(--ema 0 turns it off).
"""

import argparse
import copy
import sys
import textwrap
import time
from pathlib import Path

import common  # isort: skip # noqa: F401 (Ctrl-C while torch is imported: one line)

import numpy as np
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, pad
from tqdm import tqdm

from common.classifiers import find_class, load_classifier
from common.data import EMNIST_SPLITS, NAMES, check_dataset, load_dataset
from common.device import average_gradients, average_over_ranks, is_first, make_rng, ranks, set_up
from common.errors import (
    UserError,
    exit_code,
    interruptible,
    number,
    positive_float,
    positive_int,
    seed_int,
)
from common.fast import captured_step, set_rate, speed_up_linear
from common.fid import SAMPLES, SCORES, Scorer
from common.images import add_caption, open_picture, plot_curves, save_gif, save_png, to_grid
from common.layers import make_layer
from common.run import (
    check_sizes,
    load_checkpoint,
    open_run,
    replacing,
    restore,
    resume_args,
    save_checkpoint,
    saved_args,
    write_csv,
    write_metrics,
)

SCRIPT = Path(__file__).stem
PRETRAINED = Path(__file__).parent / "pretrained/dcgan-emnist"
WARM_UP = 300  # steps until the learning rate is whole
COLUMNS = 8  # samples in a row of a grid
LINE = 30  # characters in a line of --text
HAND = 0.5  # share of the noise's variance that the characters of a text have in common
GIF_PIXELS = 25_000_000  # of all frames together
WIDEST = 31  # classes in a row
SHORT = 1000  # steps, before which there is little to see
PANELS = (("d_loss", "g_loss"), ("d_real", "d_fake"), ("fid",), ("precision", "recall"),
          ("recognised",))  # fmt: skip
CHANGEABLE_ON_RESUME = {
    "epochs", "cuda", "device", "fid", "data_dir", "resume", "tensorboard",
}  # fmt: skip


# ---------------------------------------------------------------------------------------- model


def linear_layer(n_in, n_out, activation, use_batchnorm=True):
    """Build the layers Linear -> BatchNorm1d -> activation, (N, n_in) to (N, n_out)."""
    if not use_batchnorm:
        return [nn.Linear(n_in, n_out), activation]
    # BatchNorm subtracts the mean, and with it any bias.
    return [nn.Linear(n_in, n_out, bias=False), nn.BatchNorm1d(n_out), activation]


def plan(size, width):
    """Plan the feature maps: halve the side until 10 pixels or fewer are left, double the channels.

    :param int size: side of the images, in pixels
    :param float width: scales the channels
    :return: the sides, from the images' own, 28 -> [28, 14, 7]; the channels at each but the first,
        and of the smallest maps, after an unpadded 3 x 3, [64, 128, 256]
    :rtype: tuple[list[int], list[int]]
    """
    sides = [size]
    while sides[-1] > 10:
        sides.append(sides[-1] // 2)
    return sides, [max(1, round(width * min(64 * 2**i, 256))) for i in range(len(sides))]


def kernel_between(side):
    """Return the kernel that a stride of 2 takes to ``side`` // 2 and back: an odd side takes 5."""
    return 4 + side % 2


class Generator(nn.Module):
    """Turn noise into images. In comments the shapes of 28 x 28 pixels and width 1.

    :param int z_dim: length of the noise z, (N, z_dim)
    :param int channels: of the images, (N, channels, size, size), in [0, 1]
    :param float width: scales the channels of every layer
    :param bool linear_bn: BatchNorm1d after the linear layers
    :param int size: side of the images, in pixels
    :param int classes: how many; G is then told which one to draw. 0 for a GAN without classes
    """

    def __init__(self, z_dim=100, channels=1, width=1.0, linear_bn=True, size=28, classes=0):
        super().__init__()
        sides, maps = plan(size, width)
        core = sides[-1] - 2
        c1024 = max(1, round(width * 1024))
        self.embed = nn.Embedding(classes, z_dim) if classes else None
        n_in = 2 * z_dim if classes else z_dim
        layers = [
            *linear_layer(n_in, c1024, nn.ReLU(inplace=True), linear_bn),  # (N, 1024)
            *linear_layer(c1024, maps[-1] * core**2, nn.ReLU(inplace=True), linear_bn),  # (N, 6400)
            nn.Unflatten(1, (maps[-1], core, core)),  # (N, 256, 5, 5)
            make_layer(maps[-1], maps[-2], kernel=3, stride=1, padding=0, deconv=True),  # 128, 7, 7
        ]
        for i in range(len(maps) - 2, 0, -1):
            kernel = kernel_between(sides[i])
            layers.append(make_layer(maps[i], maps[i - 1], kernel, deconv=True))  # (N, 64, 14, 14)
        kernel = kernel_between(size)
        layers.append(nn.ConvTranspose2d(maps[0], channels, kernel, stride=2, padding=1))
        layers.append(nn.Sigmoid())  # (N, C, 28, 28)
        self.layers = nn.Sequential(*layers)

    def forward(self, z, labels=None):
        """Draw images of the classes asked for, ``labels``, (N,), from noise, (N, z_dim)."""
        if self.embed is not None:
            z = torch.cat([z, self.embed(labels)], 1)
        return self.layers(z)


class Discriminator(nn.Module):
    """Tell data from samples: the generator, mirrored.

    :param int channels: of the images, (N, channels, size, size), in [0, 1]
    :param float width: scales the channels of every layer
    :param bool linear_bn: BatchNorm1d after the linear layer
    :param int size: side of the images, in pixels
    :param int classes: how many; D then also judges whether an image is of its class
    """

    def __init__(self, channels=1, width=1.0, linear_bn=True, size=28, classes=0):
        super().__init__()
        sides, maps = plan(size, width)
        core = sides[-1] - 2
        c1024 = max(1, round(width * 1024))
        # No BatchNorm in the first layer: training would oscillate (section 3 of the paper).
        layers = [make_layer(channels, maps[0], kernel_between(size), use_batchnorm=False)]
        for i in range(1, len(maps) - 1):
            kernel = kernel_between(sides[i])
            layers.append(make_layer(maps[i - 1], maps[i], kernel))  # (N, 128, 7, 7)
        self.layers = nn.Sequential(
            *layers,  # (N, 64, 14, 14), (N, 128, 7, 7)
            make_layer(maps[-2], maps[-1], kernel=3, stride=1, padding=0),  # (N, 256, 5, 5)
            nn.Flatten(),  # (N, 6400)
            *linear_layer(maps[-1] * core**2, c1024, nn.LeakyReLU(0.2, inplace=True), linear_bn),
        )
        self.last = nn.Linear(c1024, 1)  # a logit: the sigmoid is in the loss, where it is stable
        self.embed = nn.Embedding(classes, c1024) if classes else None

    def forward(self, images, labels=None):
        """Return a logit, (N, 1): large for data, of class ``labels``, (N,), if D knows classes."""
        features = self.layers(images)  # (N, 1024)
        logits = self.last(features)
        if self.embed is not None:
            # Does this look like its class? (Miyato & Koyama 2018, arXiv 1802.05637, equation 3)
            logits = logits + (self.embed(labels) * features).sum(1, keepdim=True)
        return logits


def init_weights(module):
    """Draw weights from N(0, 0.02), as section 4 of the paper does; for ``Module.apply``.

    So small, they rely on BatchNorm: a network without it learns better from torch's own.
    """
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        # In G the noise speaks first: else G draws each class one way only.
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        nn.init.normal_(module.weight, 1.0, 0.02)


@torch.no_grad()
def init_brightness(generator, images):
    """Let samples begin as bright as the data, uint8; from mid-grey, some seeds never recover."""
    brightness = images.float().mean() / 255
    last = generator.layers[-2]  # the last convolution, before the sigmoid
    last.bias.fill_(torch.logit(brightness, eps=1e-3))


def make_networks(args, channels, classes):
    """Build G and D with their initial weights, for training and for sampling alike.

    :param argparse.Namespace args: z_dim, width, linear_bn, size, conditional
    :param int channels: of the images
    :param int classes: of the data; only a conditional GAN is told of them
    :rtype: tuple[Generator, Discriminator]
    """
    known = classes if args.conditional else 0
    shape = {"width": args.width, "linear_bn": args.linear_bn, "size": args.size, "classes": known}
    generator = Generator(args.z_dim, channels, **shape)
    discriminator = Discriminator(channels, **shape)
    for network in (generator, discriminator):
        network.apply(init_weights)
        network.to(memory_format=torch.channels_last)  # the layout that is fastest
        speed_up_linear(network)
    return generator, discriminator


# --------------------------------------------------------------------------------------- method


def draw_z(n, args, rng):
    """Draw noise, (n, z_dim), from N(0, 1), on the device of its torch.Generator."""
    return torch.randn(n, args.z_dim, generator=rng, device=rng.device)


def bce(logits, label):
    """Return the mean binary cross-entropy against one label for all: 1 for data, 0 for samples."""
    return binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))


def train_step(generator, discriminator, optimizers, real, labels, z, amp=False):
    """Improve D, then G, on one batch.

    :param torch.nn.Module generator: G
    :param torch.nn.Module discriminator: D
    :param tuple optimizers: of G's parameters, and of D's
    :param torch.Tensor real: images, (N, C, H, W), in [0, 1]
    :param torch.Tensor labels: their classes, int64, (N,); a conditional G draws the same ones
    :param torch.Tensor z: noise, (N, z_dim)
    :param bool amp: mixed precision, bfloat16
    :return: D's loss, G's loss, and the means of D(x) and D(G(z)), (4,), on the device
    :rtype: torch.Tensor
    """
    g_optimizer, d_optimizer = optimizers
    with torch.autocast(real.device.type, torch.bfloat16, enabled=amp):
        # --------------------------------------------------------------------------------- (1) D
        # Data is 1, samples are 0. They go through D separately, or BatchNorm would mix their
        # statistics.
        fake = generator(z, labels)
        real_logits = discriminator(real, labels)
        fake_logits = discriminator(fake.detach(), labels)
        d_loss = bce(real_logits, 1.0) + bce(fake_logits, 0.0)
    d_optimizer.zero_grad()
    d_loss.backward()
    average_gradients(discriminator)
    d_optimizer.step()

    # ------------------------------------------------------------------------------------- (2) G
    # The same samples should now fool the D just updated. D's own gradients would be discarded:
    # while it is frozen, they aren't computed.
    discriminator.requires_grad_(False)
    with torch.autocast(real.device.type, torch.bfloat16, enabled=amp):
        g_loss = bce(discriminator(fake, labels), 1.0)
    g_optimizer.zero_grad()
    g_loss.backward()
    average_gradients(generator)
    g_optimizer.step()
    discriminator.requires_grad_(True)

    d_real = real_logits.float().sigmoid().mean()
    d_fake = fake_logits.float().sigmoid().mean()
    return torch.stack([d_loss, g_loss, d_real, d_fake]).detach()


@torch.no_grad()
def update_ema(ema, generator, share):
    """Move the averaged generator towards the current one: ema <- (1 - share) ema + share G."""
    for mean, value in zip(ema.state_dict().values(), generator.state_dict().values(), strict=True):
        if mean.is_floating_point():  # all but BatchNorm's counter of batches, which nothing reads
            mean.lerp_(value, share)


def warm_up(optimizers, seen, args):
    """Set the learning rate of a step: in a straight line up to its whole, after WARM_UP steps.

    BatchNorm makes a layer's output independent of the size of its weights, which begin small: at
    the whole rate the first steps would turn them about, and a run may never recover.

    :param tuple optimizers: of G's parameters, and of D's
    :param int seen: how many steps there were before
    :param argparse.Namespace args: lr, d_lr, width, optimizer
    """
    for optimizer, rate in zip(optimizers, learning_rates(args), strict=True):
        set_rate(optimizer, rate * min(1, (seen + 1) / WARM_UP))


def train(generator, discriminator, ema, optimizers, data, args, epoch):
    """Train for one epoch.

    All randomness is a function of (seed, epoch, rank), so that a resumed run needs no saved
    random state, and looking at samples can't change the weights.

    :param torch.nn.Module generator: G
    :param torch.nn.Module discriminator: D
    :param torch.nn.Module ema: moving average of G, updated in place
    :param tuple optimizers: of G's parameters, and of D's
    :param common.data.Dataset data: images, uint8, (N, C, H, W), and labels, (N,), on the device
    :param argparse.Namespace args: seed, batch_size, z_dim, ema, amp, dry_run
    :param int epoch: from 1
    :return: a row of metrics.csv: epoch, the means over the epoch and over all processes of d_loss,
        g_loss, d_real (D(x)) and d_fake (D(G(z))), and images_per_second
    :rtype: dict[str, float]
    """
    began = time.perf_counter()
    rank, world = ranks()
    device = data.images.device
    steps = count_steps(data, args)
    order = torch.randperm(len(data.images), generator=make_rng("cpu", args.seed, epoch)).to(device)
    rng = make_rng(device, args.seed, epoch, rank + 1)
    torch.manual_seed(rng.initial_seed())  # for what takes no generator, such as dropout in a copy
    # With a fixed decay, the random initial weights would dominate a short run's average.
    seen = range((epoch - 1) * steps, epoch * steps)
    decays = [min(args.ema, (1 + step) / (10 + step)) for step in seen]
    shares = torch.tensor([1 - decay for decay in decays], device=device)
    # The sums stay on the device: reading a number per batch would stall the GPU.
    totals = torch.zeros(4, device=device)

    def step(chosen, z, share):
        real = data.images[chosen].float().div_(255)
        labels = data.labels[chosen]
        totals.add_(train_step(generator, discriminator, optimizers, real, labels, z, args.amp))
        update_ema(ema, generator, share)

    step = captured_step(step, device, optimizers)
    for i in tqdm(range(steps), f"epoch {epoch}", leave=False, disable=rank > 0 or None):
        warm_up(optimizers, seen[i], args)
        first = (i * world + rank) * args.batch_size
        z = draw_z(args.batch_size, args, rng)
        step(order[first : first + args.batch_size], z, shares[i])
    average_over_ranks(totals)
    d_loss, g_loss, d_real, d_fake = (total / steps for total in totals.tolist())
    speed = steps * args.batch_size * world / max(time.perf_counter() - began, 1e-6)
    return {"epoch": epoch, "d_loss": d_loss, "g_loss": g_loss, "d_real": d_real, "d_fake": d_fake,
            "images_per_second": round(speed, 1)}  # fmt: skip


def count_steps(data, args):
    """Count the steps of an epoch; what fills no batch is left out, other images each epoch."""
    return 1 if args.dry_run else len(data.images) // (args.batch_size * ranks()[1])


@torch.no_grad()
def generate(ema, z, labels=None):
    """Draw images, 500 at a time.

    :param torch.nn.Module ema: the generator
    :param torch.Tensor z: noise, (N, z_dim)
    :param torch.Tensor labels: the classes to draw, (N,), which a conditional GAN needs
    :return: (n, C, H, W), in [0, 1]
    :rtype: Iterator[torch.Tensor]
    """
    ema.eval()  # in train mode BatchNorm would make each sample depend on the others
    device = next(ema.parameters()).device
    if labels is None:
        labels = torch.zeros(len(z), dtype=torch.int64)
    for chunk, kinds in zip(z.split(500), labels.split(500), strict=True):
        yield ema(chunk.to(device), kinds.to(device))


def draw_labels(n, counts, rng):
    """Draw n classes, (n,), as often as the data have them, counts, (K,)."""
    shares = torch.as_tensor(counts, dtype=torch.float64)
    return torch.multinomial(shares, n, replacement=True, generator=rng)


def interpolate(a, b, n):
    """Walk from one noise vector to another, both ends included.

    Normal noise lies near a sphere, so its walk follows the sphere; a straight line would lead
    through norms that the generator has never seen (White 2016, arXiv 1609.04468).

    :param torch.Tensor a: (z_dim,)
    :param torch.Tensor b: (z_dim,)
    :param int n: number of points
    :return: (n, z_dim)
    :rtype: torch.Tensor
    """
    t = torch.linspace(0, 1, n, device=a.device)[:, None]
    angle = torch.acos((a @ b / (a.norm() * b.norm())).clamp(-1, 1))
    if angle.sin() < 1e-3:
        return (1 - t) * a + t * b
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


def test(ema, z, classes, args, epoch):
    """Draw from the same noise every epoch.

    Without classes 64 samples, and a walk from the first to the last; else each class from the
    same few noise vectors.

    :param torch.nn.Module ema: the generator to look at
    :param torch.Tensor z: the fixed noise, (64, z_dim)
    :param int classes: of the data
    :param argparse.Namespace args: conditional
    :param int epoch: for the caption
    :return: the picture, uint8, (H, W, 3)
    :rtype: numpy.ndarray
    """
    if not args.conditional:
        walk = interpolate(z[0], z[-1], COLUMNS)
        samples = torch.cat(list(generate(ema, torch.cat([z, walk]))))
        text = f"epoch {epoch}      last row: a walk from the first sample to the last"
        return add_caption(to_grid(samples, COLUMNS), text)
    lines = -(-classes // WIDEST)  # a row for each noise vector; more than one, where it is long
    columns = -(-classes // lines)
    labels = torch.arange(classes)
    rows = []
    for noise in z[: COLUMNS // lines]:
        samples = torch.cat(list(generate(ema, noise.expand(classes, -1), labels)))
        rows.append(to_grid(samples, columns))
    return add_caption(np.concatenate(rows), f"epoch {epoch}      one class a column, one z a row")


def score(ema, scorer, counts, args):
    """Score a generator, always on the same noise and classes, which nothing else uses."""
    rng = make_rng("cpu", args.seed, 0)  # training's keys start at epoch 1
    z = draw_z(scorer.samples, args, rng)
    labels = draw_labels(scorer.samples, counts, rng)
    return scorer.score(generate(ema, z, labels), labels if args.conditional else None)


def write_text(ema, text, hand, classes, args, rng):
    """Write a text, each character drawn anew, but all in one hand.

    What slant and pen belong to is the noise, whatever the class: so the characters share a part
    of it.

    :param torch.nn.Module ema: a conditional generator
    :param str text: characters that the data have, and spaces
    :param torch.Tensor hand: the part that they share, noise, (1, z_dim)
    :param list[str] classes: names of the classes
    :param argparse.Namespace args: z_dim
    :param torch.Generator rng: where the noise comes from
    :return: the picture, (C, H, W'), in [0, 1]
    :rtype: torch.Tensor
    :raises UserError: if the data lack a character
    """
    letters = "".join(text.split())
    labels = torch.tensor([find_letter(classes, letter) for letter in letters])
    z = HAND**0.5 * hand + (1 - HAND) ** 0.5 * draw_z(len(letters), args, rng)
    images = torch.cat(list(generate(ema, z, labels))).cpu()
    space = torch.zeros_like(images[0, :, :, : args.size // 3])
    parts = []
    drawn = iter(images)
    for letter in " ".join(text.split()):
        parts.append(space if letter == " " else trim(next(drawn)))
    return torch.cat(parts, 2)


def find_letter(classes, letter):
    """Return the class of a character, in the other case if the data know only that one."""
    for name in (letter, letter.upper(), letter.lower()):
        if name in classes:
            return classes.index(name)
    raise UserError(f"the data have no {letter}, only {' '.join(classes)[:80]}: leave it out")


def trim(image):
    """Cut the empty columns off the sides of a character, (C, H, W), but for a narrow margin."""
    ink = (image.amax((0, 1)) > 0.3).nonzero().flatten()
    if len(ink) == 0:
        return image
    first = max(ink[0].item() - 1, 0)
    return image[:, :, first : ink[-1].item() + 2]


# ------------------------------------------------------------------------------------ the script


# fmt: off
def get_parser():
    """Build the command line."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,  # so that an error is one line
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", default="auto", choices=NAMES,
                       help="auto: EMNIST, from disk or downloaded, else the built-in glyphs; "
                            "folder: your own, in class folders (default: %(default)s)")
    group.add_argument("--data-dir", default="data",
                       help="where datasets are, or are downloaded to (default: %(default)s)")
    group.add_argument("--split", default="balanced", choices=EMNIST_SPLITS,
                       help="EMNIST's split (default: %(default)s)")
    group.add_argument("--glyphs", type=positive_int, default=20_000,
                       help="how many glyphs to draw (default: %(default)s)")

    group.add_argument("--size", type=int, default=28, choices=range(16, 132, 4), metavar="SIDE",
                       help="side that images are resized to, in pixels, a multiple of 4 from 16 "
                            "to 128 (default: %(default)s)")

    group = parser.add_argument_group("model")
    group.add_argument("--conditional", action="store_true",
                       help="tell both networks the classes, so that any can be asked for")
    group.add_argument("--width", type=number(float, 0.02, 16), default=1.0,
                       help="scales all channels; 0.5 suits a small CPU (default: %(default)s)")
    group.add_argument("--z-dim", type=positive_int, default=100,
                       help="length of the noise z (default: %(default)s)")
    group.add_argument("--linear-bn", action=argparse.BooleanOptionalAction, default=True,
                       help="BatchNorm after the linear layers; without it G collapses")

    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=positive_int, default=20,
                       help="passes over the data (default: %(default)s)")
    group.add_argument("--batch-size", type=number(int, 2), default=64,
                       help="images per batch and process (default: %(default)s)")
    group.add_argument("--optimizer", default="adam", choices=("adam", "sgd"),
                       help="adam, or SGD with Nesterov momentum 0.9 (default: %(default)s)")
    group.add_argument("--lr", type=positive_float,
                       help="learning rate of G (default: 5e-4 / width for adam, 0.01 for sgd)")
    group.add_argument("--d-lr", type=positive_float,
                       help="learning rate of D (default: half of --lr for adam, --lr for sgd)")
    group.add_argument("--ema", type=number(float, 0, 0.99999), default=0.999,
                       help="decay of the moving average of G that is sampled; 0 for G itself "
                            "(default: %(default)s)")
    group.add_argument("--seed", type=seed_int, default=0,
                       help="same seed, same machine, same result (default: %(default)s)")
    group.add_argument("--cuda", action="store_true", help="use the GPU, if there is one")
    group.add_argument("--device", metavar="NAME", help="any other device: mps, xpu, cuda:1")
    group.add_argument("--amp", action="store_true", help="mixed precision, bfloat16")

    group = parser.add_argument_group("output")
    group.add_argument("--out", help=f"new run folder (default: runs/{SCRIPT}/DATE-TIME)")
    either = group.add_mutually_exclusive_group()
    either.add_argument("--resume", metavar="RUN",
                        help="continue a run after its last complete epoch")
    either.add_argument("--sample", metavar="RUN",
                        help="draw samples from a run, or its generator.pt, without training; "
                             "pretrained: EMNIST's letters and digits")
    group.add_argument("-n", type=number(int, 1, 1_000_000), default=64,
                       help="how many samples --sample draws; the grid shows 1,024 at most "
                            "(default: %(default)s)")
    group.add_argument("--class", dest="only", metavar="NAME",
                       help="with --sample, of a conditional run: draw this class only")
    group.add_argument("--text",
                       help="with --sample, of a conditional run: write this text")
    group.add_argument("--pngs", action="store_true",
                       help="with --sample: also write each sample as a PNG of its own")
    group.add_argument("--fid", metavar="CLASSIFIER",
                       help="score 10,000 samples after each epoch, or with --sample; a run of "
                            "train_classifier.py")
    group.add_argument("--tensorboard", action="store_true",
                       help="also write TensorBoard's event files")
    group.add_argument("--dry-run", action="store_true",
                       help="one batch, to check that everything works")
    return parser
# fmt: on


def learning_rates(args):
    """Return the learning rates of G and of D.

    Adam moves each weight by the same step, and a unit's output by the steps of all its inputs: the
    wider a network is, the smaller they must be. D learns at half of G's rate (two time scales,
    Heusel et al. 2017, arXiv 1706.08500, there the other way round): told the classes, it would win
    while G still draws each in one way (benchmarks/README.md).
    """
    if args.optimizer == "sgd":
        rate = args.lr or 0.01
        return rate, args.d_lr or rate
    rate = args.lr or 5e-4 / args.width
    return rate, args.d_lr or rate / 2


def make_optimizers(networks, args):
    """Make the optimizers of G and D: Adam with the paper's momentum, or SGD."""
    optimizers = []
    for network, rate in zip(networks, learning_rates(args), strict=True):
        weights = network.parameters()
        # Fused: one pass over the weights instead of a dozen, on a CPU too.
        if args.optimizer == "sgd":
            optimizer = torch.optim.SGD(weights, rate, momentum=0.9, nesterov=True, fused=True)
        else:
            optimizer = torch.optim.Adam(weights, rate, betas=(0.5, 0.999), fused=True)
        optimizers.append(optimizer)
    return tuple(optimizers)


def load_data(args, train=True):
    """Load the training or the test half of the data."""
    options = {"size": args.size, "glyphs": args.glyphs, "download": not args.resume}
    return load_dataset(args.dataset, args.data_dir, train, args.split, **options)


def load_scorer(args, device):
    """Load the classifier that --fid names, to score samples with; nothing without --fid.

    Only the first process scores. But loading data is something that all processes do together.
    """
    if not args.fid:
        return None
    train_half = load_data(args)
    test_half = load_data(args, train=False)
    if not is_first():
        return None
    samples = 64 if args.dry_run else SAMPLES
    return Scorer(load_classifier(args.fid, device), train_half, test_half, samples)


def tell_steps(steps, args):
    """Print how many steps the run has, and a warning if those are few."""
    if not is_first():
        return
    print(f"steps    {steps:,} an epoch, {steps * args.epochs:,} in all")
    if steps * args.epochs < SHORT and not args.dry_run:
        print(f"warning: samples are grey at first: below {SHORT:,} steps expect little; raise "
              "--epochs, or lower --batch-size", file=sys.stderr)  # fmt: skip


def print_row(row):
    """Print one line for an epoch, and warn if D has won."""
    line = (f"epoch {row['epoch']:3d}   D loss {row['d_loss']:.3f}   G loss {row['g_loss']:.3f}   "
            f"D(x) {row['d_real']:.2f}   D(G(z)) {row['d_fake']:.2f}   "
            f"{row['images_per_second']:,.0f} images/s")  # fmt: skip
    if "fid" in row:
        line += f"   FID {row['fid']:.3f}"
    if "recognised" in row:
        line += f"   recognised {100 * row['recognised']:.1f} %"
    print(line, flush=True)
    if row["d_real"] > 0.9 and row["d_fake"] < 0.1:
        print(
            "warning: the discriminator has won: try a smaller --lr, or more data", file=sys.stderr
        )


def sample(args, argv):
    """Draw samples from a finished run, without training."""
    started = time.time()
    state = load_checkpoint(PRETRAINED if args.sample == "pretrained" else args.sample, SCRIPT)
    run_args = saved_args(get_parser(), state["args"])  # the networks and the data are its own
    vars(run_args).update(fid=args.fid, data_dir=args.data_dir, seed=args.seed)
    if (args.only or args.text is not None) and not run_args.conditional:
        raise UserError(f"{args.sample} was told of no classes: train with --conditional")
    device = set_up(args.cuda, args.seed, args.device)
    counts = state["class_counts"]
    classes = list(counts)
    with torch.device("meta"):  # the memory is that of the checkpoint's tensors
        ema, _ = make_networks(run_args, state["shape"][1], len(classes))
    restore({"ema": ema}, state)
    ema.to(device, torch.float32)  # a generator.pt holds half the digits
    rng = make_rng("cpu", args.seed)
    if args.text is not None:
        lines = textwrap.wrap(args.text, LINE)
        if not lines:
            raise UserError("there is nothing to write: give --text some letters")
        hand = draw_z(1, run_args, rng)
        text = stack([write_text(ema, line, hand, classes, run_args, rng) for line in lines])
    scorer = load_scorer(run_args, device)
    folder = open_run(SCRIPT, args.out)
    if not is_first():
        return {}

    epochs = len(state["history"])
    if args.text is not None:
        save_png(folder / "text.png", to_grid(text[None], 1, scale=4))
        print(f"{args.text!r} after {epochs} epochs: {folder}/text.png")
    else:
        z = draw_z(args.n, run_args, rng)
        labels = draw_labels(args.n, list(counts.values()), rng)
        if args.only:
            labels.fill_(find_class(classes, args.only))
        images = torch.cat([chunk.cpu() for chunk in generate(ema, z, labels)])
        columns = COLUMNS if args.n <= 64 else 32
        save_png(folder / "samples.png", to_grid(images[:1024], columns))
        with replacing(folder / "samples.npz") as part:
            pixels = (images * 255).round().byte().numpy()
            told = {"labels": labels.numpy()} if run_args.conditional else {}
            np.savez_compressed(part, images=pixels, **told)
        if args.pngs:
            (folder / "samples").mkdir(exist_ok=True)
            for i, image in enumerate(images):
                picture = to_grid(image[None], 1, scale=1, gap=0)
                save_png(folder / f"samples/{i:06d}.png", picture)
        print(f"{args.n} samples after {epochs} epochs: {folder}/samples.png, .npz")
    fid = scorer.report(score(ema, scorer, list(counts.values()), run_args)) if scorer else None
    return write_metrics(folder, args, argv, started, device, script=SCRIPT,
                         dataset=run_args.dataset, fid=fid)  # fmt: skip


def stack(lines):
    """Put lines of text, (C, H, W) of any widths, below each other."""
    widest = max(line.shape[2] for line in lines)
    return torch.cat([pad(line, (0, widest - line.shape[2])) for line in lines], 1)


def save_generator(path, ema, state):
    """Write what --sample needs, and no more: of the weights half the digits, a few MB."""
    weights = {}
    for name, value in ema.state_dict().items():
        weights[name] = value.half() if value.ndim > 1 else value
    kept = {key: state[key] for key in ("script", "args", "shape", "class_counts", "history")}
    save_checkpoint(path, {**kept, "ema": weights})


def choose_frames(epochs, pixels):
    """Choose the epochs that the GIF shows, so that it keeps below some 10 MB.

    :param int epochs: the last one
    :param int pixels: of one frame
    :return: from 0 to the last, in equal steps but the last one
    :rtype: list[int]
    """
    most = min(50, GIF_PIXELS // pixels)
    every = max(1, -(-epochs // max(1, most)))
    return sorted({*range(0, epochs, every), epochs})


def main(argv=None):
    """Train, and save samples, numbers and a checkpoint after each epoch.

    :param list[str] argv: the command line; None for sys.argv
    :return: what metrics.json holds
    :rtype: dict
    :raises UserError: for a mistake in the arguments or the data
    """
    started = time.time()
    parser = get_parser()
    args = parser.parse_args(argv)
    if args.sample:
        return sample(args, argv)
    if args.only or args.text is not None or args.pngs:
        raise UserError("--class, --text and --pngs draw from a finished run: add --sample RUN")
    state = None
    if args.resume:
        state = load_checkpoint(args.resume, SCRIPT)
        args = resume_args(parser, argv, state["args"], CHANGEABLE_ON_RESUME)
        networks = ("generator", "discriminator")
        sizes = (args, state["shape"][1], len(state["class_counts"]))
        check_sizes(state, networks, lambda: make_networks(*sizes))
    elif args.dry_run:
        args.epochs = 1
        args.batch_size = min(args.batch_size, 16)
        args.glyphs = 64
        args.dataset = "glyphs" if args.dataset == "auto" else args.dataset

    device = set_up(args.cuda, args.seed, args.device)
    data = check_dataset(load_data(args), args.size)
    args.dataset = data.name  # "auto" is decided once: a resumed run must find the same data
    data = data._replace(images=data.images.to(device), labels=data.labels.to(device))
    images = data.images
    if len(images) < args.batch_size * ranks()[1]:
        raise UserError(f"{len(images)} images don't fill one batch: lower --batch-size")
    if args.conditional and len(data.classes) < 2:
        raise UserError(f"{args.data_dir} has one class only: leave out --conditional")
    counts = torch.bincount(data.labels, minlength=len(data.classes)).tolist()

    generator, discriminator = make_networks(args, images.shape[1], len(data.classes))
    for network in (generator, discriminator):
        network.to(device)
        if device.type == "cuda" and not args.amp:  # in float32 cuDNN is faster with channels first
            network.to(memory_format=torch.contiguous_format)
    init_brightness(generator, images)
    ema = copy.deepcopy(generator)
    optimizers = make_optimizers((generator, discriminator), args)
    fixed_z = draw_z(64, args, make_rng("cpu", args.seed)).to(device)
    parts = {"generator": generator, "discriminator": discriminator, "ema": ema,
             "g_optimizer": optimizers[0], "d_optimizer": optimizers[1]}  # fmt: skip

    scorer = load_scorer(args, device)
    # What the untrained generator scores, and what training images would.
    ceiling = score(ema, scorer, counts, args) if scorer else None
    floor = scorer.floor["fid"] if scorer else None

    history = []
    first = 0  # epoch 0 looks at the untrained networks
    if state:
        if state["shape"] != list(images.shape):
            raise UserError(f"{args.data_dir} isn't the data of this run: give another --data-dir")
        if floor and state["floor"] and abs(floor / state["floor"] - 1) > 0.01:
            raise UserError(f"{args.fid} isn't the classifier that scored this run: give that one")
        restore(parts, state)
        floor = floor or state["floor"]
        history = state["history"]
        first = len(history) + 1
        started -= state["seconds"]
        if first > args.epochs + 1:
            raise UserError(f"{args.resume} has {first - 1} epochs: ask for more --epochs")

    tell_steps(count_steps(data, args), args)
    folder = open_run(SCRIPT, args.out, args.resume)
    if is_first():
        (folder / "samples").mkdir(exist_ok=True)
    if is_first() and args.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(folder / "tensorboard", purge_step=first)

    with interruptible(SCRIPT, folder):
        for epoch in range(first, args.epochs + 1):
            if epoch > 0:
                row = train(generator, discriminator, ema, optimizers, data, args, epoch)
                if not np.isfinite(list(row.values())).all():
                    raise UserError(
                        f"no finite loss in epoch {epoch}: start again with a smaller --lr"
                    )
            if not is_first():
                continue
            picture = test(ema, fixed_z, len(data.classes), args, epoch)
            save_png(folder / f"samples/epoch_{epoch:03d}.png", picture)
            if epoch > 0:
                if scorer:
                    scores = score(ema, scorer, counts, args)
                    row.update({name: scores[name] for name in SCORES if name in scores})
                history.append(row)
                print_row(row)
                write_csv(folder / "metrics.csv", history)
            if epoch > 0 and args.tensorboard:
                for name, value in row.items():
                    writer.add_scalar(name, value, epoch)
                writer.add_image("samples", picture, epoch, dataformats="HWC")
            state = {
                "script": SCRIPT,
                "args": vars(args),
                "shape": list(images.shape),
                "class_counts": dict(zip(data.classes, counts, strict=True)),
                "history": history,
                "seconds": time.time() - started,
                "floor": floor,
                **{name: part.state_dict() for name, part in parts.items()},
            }
            save_checkpoint(folder / "checkpoint.pt", state)
    if not is_first():
        return {}

    save_generator(folder / "generator.pt", ema, state)
    some = images[:: len(images) // 64 or 1][:64]
    save_png(folder / "data.png", to_grid(some / 255, COLUMNS))
    plot_curves(folder / "losses.png", history, PANELS, {"fid": floor} if floor else None)
    picture = test(ema, fixed_z, len(data.classes), args, args.epochs)
    save_png(folder / f"samples/epoch_{args.epochs:03d}.png", picture)  # should it be lost
    shown = choose_frames(args.epochs, picture.shape[0] * picture.shape[1])
    files = [folder / f"samples/epoch_{epoch:03d}.png" for epoch in shown]
    save_gif(folder / "epochs.gif", [np.asarray(open_picture(f)) for f in files if f.is_file()])
    print(f"look at  {folder}/epochs.gif, losses.png and samples/epoch_{args.epochs:03d}.png")
    fid = scorer.report(score(ema, scorer, counts, args), ceiling) if scorer else None
    return write_metrics(folder, args, argv, started, device, script=SCRIPT, dataset=data.name,
                         epochs=history, fid=fid)  # fmt: skip


if __name__ == "__main__":
    sys.exit(exit_code(main))
