"""Train a small convolutional network to tell digits, characters or photos apart.

Three times a wider 3 x 3 convolution, half the side and a residual x + f(x)
(He et al. 2015, arXiv 1512.03385), then the maximum over what is left of the
image and one linear layer. The loss is the cross-entropy of smoothed labels
(Szegedy et al. 2015, arXiv 1512.00567, section 7)

    - sum_k q_k log p_k,    q_k = (1 - s) [k is the class] + s / K,    s = 0.1

minimised by SGD with Nesterov momentum and a learning rate of one cycle (Smith
& Topin 2017, arXiv 1708.07120).

    python train_classifier.py --dataset mnist --epochs 8

Seed 0, one thread of a busy AMD EPYC with two cores, torch 2.15, test
accuracy:

    --dataset mnist --epochs 8                              99.72 %   10 minutes
    --dataset emnist --split mnist --epochs 20              98.90 %    6 minutes
    --dataset glyphs --epochs 10                            91.33 %    8 minutes
        with the cases that look alike merged, as in EMNIST 97.25 %
    --dataset folder --width 2 --epochs 24 --amp            81.05 %   19 minutes

EMNIST are 8,000 digits of it, the folder 12,000 photos of CIFAR-10. Of the
glyphs that are mistaken, most are O for 0 and I for l. Accuracies are those of
the last epoch, not of the best one.

Differences from the papers: momentum stays 0.9 over the cycle, whose peak was
not searched for.
"""

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

import common  # isort: skip # noqa: F401 (Ctrl-C while torch is imported: one line)

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

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
from common.images import plot_curves, save_figure, to_line
from common.layers import make_layer
from common.run import (
    check_sizes,
    load_checkpoint,
    open_run,
    restore,
    resume_args,
    save_checkpoint,
    write_csv,
    write_metrics,
)

SCRIPT = Path(__file__).stem
SMOOTHING = 0.1  # share of a label that is spread over all classes
WEIGHT_DECAY = 5e-4
SHIFT = 2  # pixels that an image is moved by at most, each way
PHOTOS = ("cifar10", "folder")  # whose mirror image is one of the same class
LOOK_ALIKE = set("CIJKLMOPSUVWXYZ")  # both cases are one class in EMNIST's split "balanced"
# Not the epochs: the learning rate has come to its end by the last one.
CHANGEABLE_ON_RESUME = {"cuda", "device", "data_dir", "resume", "tensorboard"}


# ---------------------------------------------------------------------------------------- model


class Residual(nn.Sequential):
    """x + f(x), where f is the layers given (He et al. 2015, arXiv 1512.03385)."""

    def forward(self, x):
        """Add to ``x`` what the layers make of it, which must have its shape."""
        return x + super().forward(x)


def block(n_in, n_out):
    """3 x 3 convolution -> BatchNorm -> LeakyReLU, which keeps the side."""
    return make_layer(n_in, n_out, kernel=3, stride=1, padding=1)


def make_network(channels, classes, width=1.0):
    """Build the network: three times a wider convolution, half the side and a residual.

    :param int channels: of the images, (N, channels, H, W), normalised, H and W 8 or more
    :param int classes: how many
    :param float width: scales the channels of every layer
    :return: maps images to logits, (N, classes); the last layer's input are the features
    :rtype: torch.nn.Sequential
    """
    c32, c64, c128 = (max(1, round(width * size)) for size in (32, 64, 128))
    return nn.Sequential(
        block(channels, c32),  # (N, 32, 28, 28)
        block(c32, c32),
        nn.MaxPool2d(2),  # (N, 32, 14, 14)
        Residual(block(c32, c32)),
        block(c32, c64),
        nn.MaxPool2d(2),  # (N, 64, 7, 7)
        Residual(block(c64, c64)),
        block(c64, c128),
        nn.MaxPool2d(2),  # (N, 128, 3, 3)
        Residual(block(c128, c128)),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),  # (N, 128), the features
        nn.Linear(c128, classes),  # (N, classes), logits
    )


# --------------------------------------------------------------------------------------- method


def draw_moves(n, shift, flip, rng):
    """Draw how each image of a batch is moved.

    :param int n: images in the batch
    :param int shift: pixels that an image is moved by at most, each way; 0 for none
    :param bool flip: mirror left and right, with probability 1/2; not for characters
    :param torch.Generator rng: on the device of the images
    :return: the shifts down and to the right, int64, (2, N, 1), and which to mirror, bool, (N, 1)
    :rtype: tuple[torch.Tensor, torch.Tensor]
    """
    shifts = torch.randint(-shift, shift + 1, (2, n, 1), generator=rng, device=rng.device)
    if not flip:
        return shifts, torch.zeros(n, 1, dtype=torch.bool, device=rng.device)
    return shifts, torch.rand(n, 1, generator=rng, device=rng.device) < 0.5


def augment(images, shifts, mirrored):
    """Move images as :func:`draw_moves` has drawn.

    What comes in from outside repeats the edge, so that paper stays paper and black stays black.

    :param torch.Tensor images: (N, C, H, W), of any type
    :param torch.Tensor shifts: pixels, int64, (2, N, 1)
    :param torch.Tensor mirrored: bool, (N, 1)
    :return: (N, C, H, W), channels last in memory
    :rtype: torch.Tensor
    """
    n, _, height, width = images.shape
    device = images.device
    dy, dx = shifts
    rows = (torch.arange(height, device=device) + dy).clamp(0, height - 1)  # (N, H)
    columns = (torch.arange(width, device=device) + dx).clamp(0, width - 1)  # (N, W)
    columns = torch.where(mirrored, columns.flip(1), columns)
    which = torch.arange(n, device=device).view(n, 1, 1)
    shifted = images[which, :, rows.view(n, height, 1), columns.view(n, 1, width)]  # (N, H, W, C)
    return shifted.permute(0, 3, 1, 2)


def describe_pixels(images):
    """Return the mean and the standard deviation of each channel of images, uint8, in [0, 1]."""
    # By counting: exact, however many there are, and without a copy of them all in floats.
    levels = torch.arange(256, dtype=torch.float64) / 255
    counts = [torch.bincount(c.flatten(), minlength=256).cpu() for c in images.unbind(1)]
    shares = torch.stack(counts).double() / counts[0].sum()  # (C, 256)
    mean = shares @ levels
    std = (shares @ levels**2 - mean**2).clamp(min=1e-4).sqrt()  # a blank channel has none
    return mean.tolist(), std.tolist()


def normalise(images, mean, std):
    """Turn pixels, uint8, (N, C, H, W), to mean 0 and standard deviation 1 in each channel."""
    mean = torch.as_tensor(mean, device=images.device).view(-1, 1, 1)
    std = torch.as_tensor(std, device=images.device).view(-1, 1, 1)
    return (images.float() / 255 - mean) / std


def one_cycle(done, peak, warm_up=0.2):
    """Return the learning rate: up to its peak in a straight line, and down to 0.

    Smith & Topin 2017 (arXiv 1708.07120): the short climb lets a large rate in without harm.

    :param float done: share of the training that is behind us, 0 to 1
    :param float peak: the largest learning rate
    :param float warm_up: share of the training that the climb takes
    :rtype: float
    """
    return peak * min(done / warm_up, (1 - done) / (1 - warm_up))


def train(network, optimizer, images, labels, pixels, args, epoch):
    """Train for one epoch.

    All randomness is a function of (seed, epoch, rank, batch), so that a resumed run needs no
    saved state of any generator.

    :param torch.nn.Module network: maps normalised images to logits
    :param torch.optim.Optimizer optimizer: of its parameters; its learning rate is set here
    :param torch.Tensor images: uint8, (N, C, H, W), on the device
    :param torch.Tensor labels: int64, (N,), on the device
    :param tuple pixels: mean and standard deviation of each channel, for :func:`normalise`
    :param argparse.Namespace args: seed, batch_size, epochs, lr, dataset, flip, amp, dry_run
    :param int epoch: from 1
    :return: a row of metrics.csv: epoch, train_loss, the mean over the epoch and over all
        processes, and images_per_second
    :rtype: dict[str, float]
    """
    began = time.perf_counter()
    rank, world = ranks()
    device = images.device
    steps = 1 if args.dry_run else len(images) // (args.batch_size * world)
    order = torch.randperm(len(images), generator=make_rng("cpu", args.seed, epoch)).to(device)
    total = torch.zeros((), device=device)  # it stays there: reading it would wait for the GPU
    flip = args.flip and args.dataset in PHOTOS
    mean, std = (torch.tensor(values, device=device) for values in pixels)
    network.train()

    def step(chosen, shifts, mirrored):
        batch = augment(images[chosen], shifts, mirrored)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            logits = network(normalise(batch, mean, std))
            loss = cross_entropy(logits, labels[chosen], label_smoothing=SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        average_gradients(network)
        optimizer.step()
        total.add_(loss.detach())

    step = captured_step(step, device, [optimizer])
    for i in tqdm(range(steps), f"epoch {epoch}", leave=False, disable=rank > 0 or None):
        rng = make_rng(device, args.seed, epoch, rank + 1, i)
        first = (i * world + rank) * args.batch_size
        moves = draw_moves(args.batch_size, SHIFT, flip, rng)
        set_rate(optimizer, one_cycle((epoch - 1 + (i + 0.5) / steps) / args.epochs, args.lr))
        step(order[first : first + args.batch_size], *moves)
    average_over_ranks(total)
    speed = steps * args.batch_size * world / max(time.perf_counter() - began, 1e-6)
    return {"epoch": epoch, "train_loss": total.item() / steps,
            "images_per_second": round(speed, 1)}  # fmt: skip


@torch.no_grad()
def test(network, images, labels, pixels, epoch):
    """Classify the test images as they are: no shift, no mirror, no smoothing.

    :param torch.nn.Module network: put into eval mode
    :param torch.Tensor images: uint8, (N, C, H, W), on the device
    :param torch.Tensor labels: int64, (N,), on the device
    :param tuple pixels: mean and standard deviation of each channel, for :func:`normalise`
    :param int epoch: from 1
    :return: columns of metrics.csv, epoch, test_loss and test_accuracy; the logits, (N, classes)
    :rtype: tuple[dict, torch.Tensor]
    """
    network.eval()
    logits = torch.cat([network(normalise(chunk, *pixels)) for chunk in images.split(500)])
    loss = cross_entropy(logits, labels)
    right = (logits.argmax(1) == labels).double()
    row = {"epoch": epoch, "test_loss": loss.item(), "test_accuracy": right.mean().item()}
    return row, logits


# ----------------------------------------------------------------------------- what it mistakes


def merge_look_alikes(names):
    """Name the classes that are left when the cases of a letter that look alike are one.

    :param list[str] names: of the classes
    :return: the name of each one's merged class; of EMNIST's 62 classes 47 are left
    :rtype: list[str]
    """
    return [name.upper() if name.upper() in LOOK_ALIKE else name for name in names]


def count_mistakes(labels, predicted, names):
    """Count what the network takes for what.

    :param torch.Tensor labels: the true classes, (N,)
    :param torch.Tensor predicted: the predicted ones, (N,)
    :param list[str] names: of the classes
    :return: test_accuracy, class_accuracy by name, and confusions: row by row how many of a class
        were taken for which; where cases are to merge, also merged_accuracy, and merged_classes,
        their number
    :rtype: dict
    """
    n = len(names)
    matrix = torch.bincount(labels * n + predicted, minlength=n * n).view(n, n).double()
    shares = (matrix.diag() / matrix.sum(1).clamp(min=1)).tolist()
    found = {"test_accuracy": (matrix.trace() / matrix.sum()).item(),
             "class_accuracy": dict(zip(names, shares, strict=True)),
             "confusions": matrix.long().tolist()}  # fmt: skip
    merged = np.array(merge_look_alikes(names))
    if len(set(merged)) < n:
        same = merged[labels.numpy()] == merged[predicted.numpy()]
        found["merged_accuracy"] = same.mean().item()
        found["merged_classes"] = len(set(merged))
    return found


def find_mistakes(labels, logits, most=40):
    """Find the mistakes that the network was surest of.

    :param torch.Tensor labels: (N,)
    :param torch.Tensor logits: (N, classes)
    :param int most: how many to find
    :return: index of the picture, class that it was taken for, and its probability; surest first
    :rtype: list[tuple[int, int, float]]
    """
    sure, predicted = logits.float().softmax(1).max(1)
    wrong = (predicted != labels).nonzero().flatten()
    worst = wrong[sure[wrong].argsort(descending=True, stable=True)][:most]
    return [(i, predicted[i].item(), sure[i].item()) for i in worst.tolist()]


def plot_matrix(path, matrix, names):
    """Draw a confusion matrix, with each class's accuracy beside its name; atomically.

    :param pathlib.Path path: the PNG file
    :param numpy.ndarray matrix: counts, (K, K), in row i what class i was taken for
    :param list[str] names: of the K classes
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    share = matrix / matrix.sum(1, keepdims=True).clip(1)
    names = [to_line(name, 30) for name in names]
    n = len(names)
    few = n <= 20
    side = min(16, 3 + (0.5 if few else 0.2) * n)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    # One mistake in a hundred should be seen beside the diagonal: hence the power.
    axes.imshow(share, cmap="Blues", norm=PowerNorm(0.4, 0, 1))
    rows = [f"{name}   {100 * share[i, i]:.1f} %" for i, name in enumerate(names)]
    axes.set_yticks(range(n), rows, fontsize=9 if few else 7)
    upright = max(map(len, names)) <= 2
    axes.set_xticks(range(n), names, fontsize=9 if few else 7, rotation=0 if upright else 90)
    axes.set(xlabel="predicted class", ylabel="true class (accuracy)")
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        label.set_parse_math(False)  # a $ is a $
    for i, j in zip(*matrix.nonzero(), strict=True):
        color = "white" if share[i, j] > 0.3 else "black"
        size = 8 if few else 5
        axes.text(j, i, matrix[i, j], ha="center", va="center", color=color, fontsize=size)
    save_figure(path, figure, dpi=100)


def plot_images(path, images, titles, columns=8):
    """Draw images with a title each; atomically. Without an image nothing is written.

    :param pathlib.Path path: the PNG file
    :param torch.Tensor images: uint8, (N, C, H, W), C 1 or 3
    :param list[str] titles: one for each
    :param int columns: images in a row
    """
    from matplotlib.figure import Figure

    if not titles:
        return
    rows = -(-len(titles) // columns)
    figure = Figure(figsize=(1.4 * columns, 1.85 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, image, title in zip(grid.flat, images, titles, strict=False):
        axes.imshow(image.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=255)
        axes.set_title(title, fontsize=8, parse_math=False)
    save_figure(path, figure, dpi=100)


def show_mistakes(folder, images, labels, logits, names):
    """Print and draw what the network mistakes for what.

    :param pathlib.Path folder: the run folder
    :param torch.Tensor images: uint8, (N, C, H, W)
    :param torch.Tensor labels: (N,)
    :param torch.Tensor logits: (N, classes)
    :param list[str] names: of the classes
    :return: as :func:`count_mistakes`
    :rtype: dict
    """
    predicted = logits.argmax(1)
    found = count_mistakes(labels, predicted, names)
    if "merged_accuracy" in found:
        share = 100 * found["merged_accuracy"]
        print(f"test accuracy {share:.2f} % on {found['merged_classes']} classes, with the cases "
              "that look alike merged as EMNIST's balanced does")  # fmt: skip
    pairs = zip(labels.tolist(), predicted.tolist(), strict=True)
    confused = Counter((names[i], names[k]) for i, k in pairs if i != k).most_common(5)
    worst = [f"{name} for {other} ({n})" for (name, other), n in confused]
    print(f"mistaken most often: {', '.join(worst) or 'none'}")

    mistakes = find_mistakes(labels, logits)
    short = [to_line(name, 12) for name in names]
    titles = [f"{short[labels[i]]}\n→ {short[k]}, {100 * sure:.0f} %" for i, k, sure in mistakes]
    plot_images(folder / "mistakes.png", images[[i for i, _, _ in mistakes]], titles)
    plot_matrix(folder / "confusions.png", np.array(found["confusions"]), names)
    return found


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
                            "folder: your own, in --data-dir one folder per class in train/ and "
                            "in test/ (default: %(default)s)")
    group.add_argument("--data-dir", default="data",
                       help="where datasets are, or are downloaded to (default: %(default)s)")
    group.add_argument("--split", default="balanced", choices=EMNIST_SPLITS,
                       help="EMNIST's split (default: %(default)s)")
    group.add_argument("--glyphs", type=positive_int, default=20_000,
                       help="how many glyphs to draw; for the test a fifth of that "
                            "(default: %(default)s)")
    group.add_argument("--size", type=number(int, 8, 512),
                       help="side in pixels to resize to (default: as stored; 32 for a folder)")
    group.add_argument("--no-flip", dest="flip", action="store_false",
                       help="don't mirror; cifar10 and folder are mirrored at random otherwise, "
                            "characters never are")

    group = parser.add_argument_group("model")
    group.add_argument("--width", type=number(float, 0.02, 32), default=1.0,
                       help="scales all channels; 2 suits photos (default: %(default)s)")

    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=positive_int, default=10,
                       help="passes over the data (default: %(default)s)")
    group.add_argument("--batch-size", type=number(int, 2), default=128,
                       help="images in a batch of each process (default: %(default)s)")
    group.add_argument("--lr", type=positive_float, default=0.1,
                       help="peak of the learning rate (default: %(default)s)")
    group.add_argument("--seed", type=seed_int, default=0,
                       help="same seed, same machine, same result (default: %(default)s)")
    group.add_argument("--cuda", action="store_true", help="use the GPU, if there is one")
    group.add_argument("--device", metavar="NAME", help="any other device: mps, xpu, cuda:1")
    group.add_argument("--amp", action="store_true", help="mixed precision, bfloat16")

    group = parser.add_argument_group("output")
    group.add_argument("--out", help=f"new run folder (default: runs/{SCRIPT}/DATE-TIME)")
    group.add_argument("--resume", metavar="RUN", help="go on after a run's last whole epoch")
    group.add_argument("--tensorboard", action="store_true", help="write TensorBoard's events too")
    group.add_argument("--dry-run", action="store_true", help="one batch, to see that all works")
    return parser
# fmt: on


def load_halves(args):
    """Load the training and the test half of a dataset, which must have the same classes."""
    options = {"split": args.split, "size": args.size, "download": not args.resume}
    fifth = max(1, args.glyphs // 5)
    train_half = load_dataset(args.dataset, args.data_dir, True, glyphs=args.glyphs, **options)
    test_half = load_dataset(train_half.name, args.data_dir, False, glyphs=fifth, **options)
    train_half = check_dataset(train_half)
    test_half = check_dataset(test_half, train_half.images.shape[3])
    odd = sorted(set(train_half.classes) ^ set(test_half.classes))
    if odd:
        raise UserError(f"{odd[0]} is in one of train/ and test/ only: both need every class")
    if len(train_half.classes) < 2:
        raise UserError(f"{args.data_dir} has one class only, nothing to tell it from: add another")
    return train_half, test_half


def make_optimizer(network, args):
    """Make SGD with Nesterov momentum; a pull to zero suits weights, not biases and BatchNorm."""
    weights = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{"params": weights, "weight_decay": WEIGHT_DECAY}, {"params": others}]
    return torch.optim.SGD(groups, args.lr, momentum=0.9, nesterov=True, fused=True)


def main(argv=None):
    """Train, test, and look at the mistakes.

    :param list[str] argv: the command line; None for sys.argv
    :return: what metrics.json holds
    :rtype: dict
    :raises UserError: for a mistake in the arguments or the data
    """
    started = time.time()
    parser = get_parser()
    args = parser.parse_args(argv)
    state = None
    if args.resume:
        state = load_checkpoint(args.resume, SCRIPT)
        args = resume_args(parser, argv, state["args"], CHANGEABLE_ON_RESUME)
        sizes = (state["shape"][0], len(state["classes"]), args.width)
        check_sizes(state, ("network",), lambda: (make_network(*sizes),))
    elif args.dry_run:
        args.epochs = 1
        args.batch_size = min(args.batch_size, 16)
        args.glyphs = 310
        args.dataset = "glyphs" if args.dataset == "auto" else args.dataset

    device = set_up(args.cuda, args.seed, args.device)
    train_half, test_half = load_halves(args)
    args.dataset = train_half.name  # "auto" is decided once
    if args.dry_run:
        test_half = test_half._replace(images=test_half.images[:64], labels=test_half.labels[:64])
    names = train_half.classes
    images = train_half.images.to(device)
    labels = train_half.labels.to(device)
    test_images = test_half.images.to(device)
    test_labels = test_half.labels.to(device)
    if len(images) < args.batch_size * ranks()[1]:
        raise UserError(f"{len(images)} images don't fill one batch: lower --batch-size")

    network = make_network(images.shape[1], len(names), args.width)
    network.to(device, memory_format=torch.channels_last)  # in which convolutions are fastest
    speed_up_linear(network)
    optimizer = make_optimizer(network, args)
    pixels = describe_pixels(images)
    history = []
    if state:
        data = {"images": len(images), "shape": list(images.shape[1:]), "classes": names}
        if any(state[key] != value for key, value in data.items()):
            raise UserError(f"{args.data_dir} isn't the data of this run: give another --data-dir")
        restore({"network": network, "optimizer": optimizer}, state)
        pixels = (state["mean"], state["std"])
        history = state["history"]
        started -= state["seconds"]

    folder = open_run(SCRIPT, args.out, args.resume)
    if is_first() and args.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(folder / "tensorboard", purge_step=len(history) + 1)

    def save():
        """Write what --resume, and whoever explains the network, needs."""
        state = {
            "script": SCRIPT,
            "args": vars(args),
            "images": len(images),
            "shape": list(images.shape[1:]),
            "classes": names,
            "mean": pixels[0],
            "std": pixels[1],
            "history": history,
            "seconds": time.time() - started,
            "network": network.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        save_checkpoint(folder / "checkpoint.pt", state)

    if is_first():
        save()  # from here on a run that is killed can be resumed
    with interruptible(SCRIPT, folder):
        for epoch in range(len(history) + 1, args.epochs + 1):
            row = train(network, optimizer, images, labels, pixels, args, epoch)
            if not np.isfinite(row["train_loss"]):
                raise UserError(f"no finite loss in epoch {epoch}: start again, smaller --lr")
            if not is_first():
                continue
            row.update(test(network, test_images, test_labels, pixels, epoch)[0])
            history.append(row)
            print(f"epoch {epoch:3d}   train loss {row['train_loss']:.3f}   "
                  f"test loss {row['test_loss']:.3f}   "
                  f"test accuracy {100 * row['test_accuracy']:.2f} %   "
                  f"{row['images_per_second']:,.0f} images/s", flush=True)  # fmt: skip
            write_csv(folder / "metrics.csv", history)
            if args.tensorboard:
                for name, value in row.items():
                    writer.add_scalar(name, value, epoch)
            save()
    if not is_first():
        return {}

    _, logits = test(network, test_images, test_labels, pixels, args.epochs)
    found = show_mistakes(folder, test_half.images, test_half.labels, logits.cpu(), names)
    plot_curves(folder / "curves.png", history, [("train_loss", "test_loss"), ("test_accuracy",)])
    print(f"look at  {folder}/confusions.png and curves.png")
    return write_metrics(folder, args, argv, started, device, script=SCRIPT, dataset=args.dataset,
                         epochs=history, **found)  # fmt: skip


if __name__ == "__main__":
    sys.exit(exit_code(main))
