"""Train a small convolutional network to tell digits, characters or photos apart.

Three times a wider 3 x 3 convolution, half the side and a residual x + f(x) (He et al. 2015,
arXiv 1512.03385), then the maximum over what is left of the picture and one linear layer. The
loss is the cross-entropy of smoothed labels (Szegedy et al. 2015, arXiv 1512.00567, section 7)

    - sum_k q_k log p_k,    q_k = (1 - s) [k is the class] + s / K,    s = 0.1

minimised by SGD with Nesterov momentum and a learning rate of one cycle (Smith & Topin 2017,
arXiv 1708.07120).

    python train_classifier.py --dataset mnist --epochs 8

Seed 0, one thread of a busy AMD EPYC with two cores, torch 2.15, accuracy on the test half:

    --dataset mnist --epochs 8                                    99.72 %    10 minutes
    --dataset emnist --split mnist --epochs 20                    98.90 %     6 minutes
    --dataset glyphs --epochs 10                                  91.33 %     8 minutes
        with the cases that look alike merged, as EMNIST does     97.25 %
    --dataset folder --width 2 --epochs 24 --amp                  81.05 %    19 minutes

EMNIST are 8,000 digits of it, the folder 12,000 photos of CIFAR-10. Of the glyphs left wrong, most
are O for 0 and I for l. Accuracies are the last epoch's, not the best one's. Not run on a GPU.

Differences from the papers: momentum stays 0.9 over the cycle, whose peak was not searched for.
"""

import sys
import time
from collections import Counter

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from common.charts import plot_matrix, plot_pictures
from common.checkpoint import load_checkpoint, restore, resume_args, save_checkpoint
from common.data import EMNIST_SPLITS, NAMES, load_dataset
from common.device import average_gradients, average_over_ranks, is_first, make_rng, ranks, set_up
from common.errors import Interrupted, UserError, exit_code, make_parser, number
from common.images import plot_curves
from common.layers import Linear, Residual, make_layer, to_plain
from common.run import finish, open_run, watching_signals, write_csv

SCRIPT = "train_classifier"
PHOTOS = ("cifar10", "folder")  # whose mirror image is one of the same class
LOOK_ALIKE = set("CIJKLMOPSUVWXYZ")  # both cases are one class in EMNIST's split "balanced"
# What --resume may change. Not the epochs: the learning rate has come to its end by the last one.
FREE = {"cuda", "compile", "checkpoint_every", "data_dir", "resume", "tensorboard"}
START = {"done": 0, "loss": 0.0}  # of an epoch: batches behind us, sum of their losses


# ---------------------------------------------------------------------------------------- model


def block(n_in, n_out):
    """3 x 3 convolution -> BatchNorm -> LeakyReLU, which keeps the side."""
    return make_layer(n_in, n_out, kernel=3, stride=1, padding=1)


def make_network(channels, classes, width=1.0):
    """Build the network: three times a wider convolution, half the side and a residual.

    :param int channels: of the pictures, (N, channels, H, W), normalised, H and W 8 or more
    :param int classes: how many
    :param float width: scales the channels of every layer
    :return: maps pictures to logits, (N, classes); the last layer's input are the features
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
        Linear(c128, classes),  # (N, classes), logits
    )


# --------------------------------------------------------------------------------------- method


def augment(images, shift, flip, rng):
    """Shift each picture by up to ``shift`` pixels both ways, and mirror every other one.

    What comes in from outside repeats the edge, so that paper stays paper and black stays black.

    :param torch.Tensor images: (N, C, H, W), of any type
    :param int shift: pixels; 0 for none
    :param bool flip: mirror left and right, with probability 1/2; not for characters
    :param torch.Generator rng: on the device of the images
    :return: (N, C, H, W), channels last in memory
    :rtype: torch.Tensor
    """
    (n, _, height, width), device = images.shape, images.device
    dy, dx = torch.randint(-shift, shift + 1, (2, n, 1), generator=rng, device=device)
    rows = (torch.arange(height, device=device) + dy).clamp(0, height - 1)  # (N, H)
    columns = (torch.arange(width, device=device) + dx).clamp(0, width - 1)  # (N, W)
    if flip:
        mirrored = torch.rand(n, 1, generator=rng, device=device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    which = torch.arange(n, device=device)[:, None, None]
    return images[which, :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def describe_pixels(images):
    """Give the mean and the standard deviation of each channel of images, uint8, in [0, 1]."""
    # By counting: exact, however many there are, and without a copy of them all in floats.
    levels = torch.arange(256, dtype=torch.float64) / 255
    counts = [torch.bincount(c.flatten(), minlength=256).cpu() for c in images.unbind(1)]
    shares = torch.stack(counts).double() / counts[0].sum()  # (C, 256)
    mean = shares @ levels
    std = (shares @ levels**2 - mean**2).clamp(min=1e-4).sqrt()  # a blank channel has none
    return mean.tolist(), std.tolist()


def normalise(images, mean, std):
    """Turn pixels, uint8, (N, C, H, W), to mean 0 and standard deviation 1 in each channel."""
    mean, std = (torch.tensor(x, device=images.device).view(-1, 1, 1) for x in (mean, std))
    return (images.float() / 255 - mean) / std


def one_cycle(done, peak, warm_up=0.2):
    """Give the learning rate: up to its peak in a straight line, and down to 0.

    Smith & Topin 2017 (arXiv 1708.07120): the short climb lets a large rate in without harm.

    :param float done: share of the training that is behind us, 0 to 1
    :param float peak: the largest learning rate
    :param float warm_up: share of the training that the climb takes
    :rtype: float
    """
    return peak * min(done / warm_up, (1 - done) / (1 - warm_up))


def train(network, optimizer, images, labels, mean, std, args, stop, progress, epoch):
    """Train for one epoch, or for what is left of it.

    All randomness is a function of (seed, epoch, rank, batch), so that a resumed run needs no
    saved state of any generator.

    :param torch.nn.Module network: maps normalised pictures to logits
    :param torch.optim.Optimizer optimizer: of its parameters; its learning rate is set here
    :param torch.Tensor images: uint8, (N, C, H, W), on the device
    :param torch.Tensor labels: int64, (N,), on the device
    :param list[float] mean: of each channel, for :func:`normalise`
    :param list[float] std: of each channel
    :param argparse.Namespace args: seed, batch_size, epochs, lr, label_smoothing, shift, flip,
        amp, dry_run
    :param Callable stop: asked between two batches; true to leave early
    :param dict progress: "done", batches of this epoch that are behind us, and "loss", the sum
        over them, averaged over the processes; updated in place, and "whole" set: whether the
        epoch was finished
    :param int epoch: from 1
    """
    (rank, world), device, batch = ranks(), images.device, args.batch_size
    steps = 1 if args.dry_run else len(images) // (batch * world)
    order = torch.randperm(len(images), generator=make_rng("cpu", args.seed, epoch)).to(device)
    total = torch.tensor(progress["loss"], device=device)  # stays there: reading it would wait
    todo = range(progress["done"], steps)
    network.train()
    for step in tqdm(todo, f"epoch {epoch}", leave=False, disable=rank > 0 or None):
        rng = make_rng(device, args.seed, epoch, rank + 1, step)
        first = (step * world + rank) * batch
        chosen = order[first : first + batch]
        pictures = augment(images[chosen], args.shift, args.flip, rng)
        for group in optimizer.param_groups:
            group["lr"] = one_cycle((epoch - 1 + (step + 0.5) / steps) / args.epochs, args.lr)

        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            logits = network(normalise(pictures, mean, std))
            loss = cross_entropy(logits, labels[chosen], label_smoothing=args.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        average_gradients(network)
        optimizer.step()

        total += loss.detach()
        progress["done"] = step + 1
        if stop():
            break
    average_over_ranks(total)
    progress |= {"loss": total.item(), "whole": progress["done"] == steps}


@torch.no_grad()
def test(network, images, labels, mean, std, epoch):
    """Classify the test images, as they are: no shift, no mirror, no smoothing.

    :param torch.nn.Module network: put into eval mode
    :param torch.Tensor images: uint8, (N, C, H, W), on the device
    :param torch.Tensor labels: int64, (N,), on the device
    :param list[float] mean: of each channel, for :func:`normalise`
    :param list[float] std: of each channel
    :param int epoch: for the table
    :return: a row of the table, epoch, test_loss and test_accuracy; and the logits, (N, classes)
    :rtype: tuple[dict, torch.Tensor]
    """
    network.eval()
    logits = torch.cat([network(normalise(chunk, mean, std)) for chunk in images.split(500)])
    loss, right = cross_entropy(logits, labels), (logits.argmax(1) == labels).double()
    row = {"epoch": epoch, "test_loss": loss.item(), "test_accuracy": right.mean().item()}
    return row, logits


# ------------------------------------------------------------------------------------ the verdict


def merge_look_alikes(names):
    """Name the classes that are left when the cases of a letter that look alike are one.

    :param list[str] names: of the classes
    :return: the name of each one's merged class; of EMNIST's 62 classes 47 are left
    :rtype: list[str]
    """
    return [name.upper() if name.upper() in LOOK_ALIKE else name for name in names]


def judge(labels, predicted, names):
    """Put numbers to what the network takes for what.

    :param torch.Tensor labels: what the pictures are, (N,)
    :param torch.Tensor predicted: what they were taken for, (N,)
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
        found |= {"merged_accuracy": same.mean().item(), "merged_classes": len(set(merged))}
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


# ------------------------------------------------------------------------------------ the script


# fmt: off
def get_parser():
    """Build the command line."""
    parser = make_parser(SCRIPT, __doc__)
    some, positive, seed = number(int, 1), number(float, 1e-12), number(int, 0, 2**32 - 1)

    group = parser.add_argument_group("data")
    group.add_argument("--dataset", default="auto", choices=NAMES, help=(
        "what to tell apart; auto: EMNIST from --data-dir, else downloaded, else the built-in "
        "glyphs; folder: your own pictures, in --data-dir one folder per class in train/ and in "
        "test/"))
    group.add_argument("--data-dir", default="data", help="where datasets are, or go to")
    group.add_argument("--split", default="balanced", choices=EMNIST_SPLITS, help="EMNIST's split")
    group.add_argument("--glyphs", type=some, default=20_000,
                       help="how many glyphs to make; for the test a fifth of that")
    group.add_argument("--size", type=number(int, 8), help=(
        "side in pixels to resize to (default: as stored; 32 for a folder)"))
    group.add_argument("--shift", type=number(int, 0), default=2,
                       help="augmentation: move each picture by up to so many pixels")
    group.add_argument("--no-flip", dest="flip", action="store_false", help=(
        "augmentation: don't mirror; cifar10 and folder are mirrored else, characters never are"))
    group = parser.add_argument_group("model")
    group.add_argument("--width", type=number(float, 0.02, 32), default=1.0,
                       help="scale of all channels; 2 suits photos")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=some, default=10, help="passes over the data")
    group.add_argument("--batch-size", type=number(int, 2), default=128, help="of each process")
    group.add_argument("--lr", type=positive, default=0.1, help="peak of the learning rate")
    group.add_argument("--weight-decay", type=number(float, 0), default=5e-4,
                       help="pull of the weights to zero; biases and BatchNorm are left alone")
    group.add_argument("--label-smoothing", type=number(float, 0, 0.99), default=0.1,
                       help="share of the label that is spread over all classes")
    group.add_argument("--seed", type=seed, default=0, help="same seed, same machine, same result")
    group.add_argument("--cuda", action="store_true", help="use the GPU, if there is one")
    group.add_argument("--amp", action="store_true", help="mixed precision, bfloat16")
    group.add_argument("--compile", action="store_true", help="torch.compile the network")
    group = parser.add_argument_group("output")
    group.add_argument("--out", help=f"new run folder (default: runs/{SCRIPT}/DATE-TIME)")
    group.add_argument("--resume", metavar="RUN", help="go on from a run's last checkpoint")
    group.add_argument("--checkpoint-every", type=some, default=1, help="epochs per checkpoint")
    group.add_argument("--tensorboard", action="store_true", help="show it while it goes on")
    group.add_argument("--dry-run", action="store_true", help="one batch, to see if all works")
    return parser
# fmt: on


def load_halves(args):
    """Load the training and the test half of a dataset, which must have the same classes."""
    rest = {"split": args.split, "size": args.size}
    train_half = load_dataset(args.dataset, args.data_dir, True, **rest, glyphs=args.glyphs)
    fifth = max(1, args.glyphs // 5)
    test_half = load_dataset(train_half.name, args.data_dir, False, **rest, glyphs=fifth)
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
    groups = [{"params": weights, "weight_decay": args.weight_decay}, {"params": others}]
    return torch.optim.SGD(groups, args.lr, momentum=0.9, nesterov=True, fused=True)


def main(argv=None):
    """Train, test, and look at the mistakes.

    :param list[str] argv: the command line; None for sys.argv
    :return: what metrics.json holds
    :rtype: dict
    :raises UserError: for a mistake in the arguments or the data
    """
    parser = get_parser()
    args = parser.parse_args(argv)
    state = load_checkpoint(args.resume, SCRIPT) if args.resume else None
    if state:
        args = resume_args(parser, argv, state["args"], FREE)
    elif args.dry_run:
        args.epochs, args.batch_size, args.glyphs = 1, min(args.batch_size, 16), 310
        args.dataset = "glyphs" if args.dataset == "auto" else args.dataset

    device, world = set_up(args.cuda, args.seed), ranks()[1]
    train_half, test_half = load_halves(args)
    args.dataset, names = train_half.name, train_half.classes
    args.flip = args.flip and args.dataset in PHOTOS
    if args.dry_run:
        test_half = test_half._replace(images=test_half.images[:64], labels=test_half.labels[:64])
    images, labels = train_half.images.to(device), train_half.labels.to(device)
    test_data = test_half.images.to(device), test_half.labels.to(device)
    if len(images) < args.batch_size * world:
        raise UserError(f"{len(images)} images don't fill one batch: lower --batch-size")
    mean, std = describe_pixels(images)

    folder = open_run(SCRIPT, args.out, args.resume, args.tensorboard)
    network = make_network(images.shape[1], len(names), args.width)
    # Channels last: the layout in which convolutions and BatchNorm are fastest.
    network.to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(network, args)
    data = {"images": len(images), "shape": list(images.shape[1:]), "classes": names}
    epoch, history, progress, started = 1, [], dict(START), time.time()
    if state:
        if any(state[key] != value for key, value in data.items()):
            raise UserError(f"{args.data_dir} isn't the data of this run: give another --data-dir")
        restore({"network": network, "optimizer": optimizer}, state)
        epoch, history, progress = state["epoch"], state["history"], state["progress"]
        mean, std, started = state["mean"], state["std"], started - state["seconds"]
        if progress["done"] and state["world"] != world:
            progress = dict(START)
            if is_first():
                print(f"another number of processes: epoch {epoch} begins anew")
    fast = torch.compile(network) if args.compile else network

    def save():
        if is_first():
            state = {"script": SCRIPT, "layers": to_plain(network), "network": network.state_dict()}
            state |= {"optimizer": optimizer.state_dict(), "args": vars(args), "world": world}
            state |= {"mean": mean, "std": std, "epoch": epoch, "history": history, **data}
            state |= {"progress": progress, "seconds": time.time() - started}
            write_csv(folder / "metrics.csv", history)
            save_checkpoint(folder / "checkpoint.pt", state)

    with watching_signals() as stop:
        if not state:
            save()  # from here on a run that is killed can be resumed
        while epoch <= args.epochs and not stop():
            before, began = progress["done"], time.time()
            train(fast, optimizer, images, labels, mean, std, args, stop, progress, epoch)
            steps = progress["done"]
            if not np.isfinite(progress["loss"]):
                raise UserError(f"no finite loss in epoch {epoch}: start again, smaller --lr")
            if not progress["whole"]:
                break  # a signal came
            speed = (steps - before) * args.batch_size * world / (time.time() - began)
            row = {"epoch": epoch, "train_loss": progress["loss"] / steps}
            if is_first():
                row |= test(fast, *test_data, mean, std, epoch)[0]
                print(f"epoch {epoch:3d}   train loss {row['train_loss']:.3f}   "
                      f"test loss {row['test_loss']:.3f}   "
                      f"test accuracy {100 * row['test_accuracy']:.2f} %   {speed:,.0f} images/s",
                      flush=True)  # fmt: skip
            history.append(row | {"images_per_second": round(speed, 1)})
            epoch, progress = epoch + 1, dict(START)
            if epoch > args.epochs or (epoch - 1) % args.checkpoint_every == 0:
                save()
        if stop.signum:
            save()
            raise Interrupted(f"stopped in epoch {epoch} and saved; go on with: python {SCRIPT}.py "
                              f"--resume {folder}", stop.signum)  # fmt: skip
    if not is_first():
        return {}
    logits = test(fast, *test_data, mean, std, args.epochs)[1].cpu()
    labels, predicted = test_half.labels, logits.argmax(1)
    found = judge(labels, predicted, names)
    if "merged_accuracy" in found:
        print(f"test accuracy {100 * found['merged_accuracy']:.2f} % on "
              f"{found['merged_classes']} classes, with the cases that look alike merged as "
              "EMNIST's balanced does")  # fmt: skip
    both = zip(labels.tolist(), predicted.tolist(), strict=True)
    confused = Counter((names[i], names[k]) for i, k in both if i != k)
    pairs = [f"{name} for {other} ({n})" for (name, other), n in confused.most_common(5)]
    print(f"mistaken most often: {', '.join(pairs) or 'none'}")
    mistakes = find_mistakes(labels, logits)
    titles = [f"{names[labels[i]]}\n→ {names[k]}, {100 * sure:.0f} %" for i, k, sure in mistakes]
    plot_pictures(folder / "mistakes.png", test_half.images[[i for i, *_ in mistakes]], titles)
    plot_matrix(folder / "confusions.png", np.array(found["confusions"]), names)
    plot_curves(folder / "curves.png", history, [("train_loss", "test_loss"), ("test_accuracy",)])
    return finish(folder, SCRIPT, args, argv, args.dataset, device, started, epochs=history,
                  **found)  # fmt: skip


if __name__ == "__main__":
    sys.exit(exit_code(main))
