"""How good samples are at equal numbers of images seen: three recipes for one pair of networks.

    python benchmarks/dcgan_quality.py --classifier runs/classifier-mnist

A recipe is a command line of train_dcgan.py and, for the first, other initial weights and another
discriminator:

post      the ancestor's: SGD, Nesterov, ReLU in D, PyTorch's initial weights
examples  of pytorch/examples: Adam, N(0, 0.02), LeakyReLU; samples are G's own
ours      the defaults of train_dcgan.py; --changes adds them with other flags

All have BatchNorm after the linear layers, without which the samples collapse. They are scored as
--fid does (common/fid.py), on the same noise each time. Each run leaves a JSON file in --out, so
that a benchmark that was interrupted goes on where it was.
"""

import argparse
import copy
import itertools
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_dcgan
from common.classifiers import load_classifier
from common.data import load_dataset
from common.device import make_rng, set_up
from common.fast import speed_up_linear
from common.fid import SCORES, Scorer
from common.images import save_figure
from common.run import replacing

RECIPES = {
    "post": "--optimizer sgd --lr 0.01 --batch-size 64 --ema 0",
    "examples": "--optimizer adam --lr 2e-4 --batch-size 64 --ema 0",
    "ours": "",
}
POINTS = 8  # how often a run is scored
MATTERS = (  # options of train_dcgan.py that change what is trained
    "width", "z_dim", "linear_bn", "batch_size", "optimizer", "lr", "ema", "seed", "amp",
)  # fmt: skip


def make_networks(recipe, args, images):
    """Build G and D with the initial weights of a recipe, for images, uint8, (N, C, 28, 28)."""
    channels = images.shape[1]
    if recipe != "post":
        generator, discriminator = train_dcgan.make_networks(args, channels)
        if recipe != "examples":
            train_dcgan.init_brightness(generator, images)
        return generator, discriminator
    generator = train_dcgan.Generator(args.z_dim, channels, args.width, args.linear_bn)
    discriminator = train_dcgan.Discriminator(channels, args.width, args.linear_bn)
    for module in discriminator.modules():
        if isinstance(module, nn.LeakyReLU):
            module.negative_slope = 0.0
    for network in (generator, discriminator):
        network.to(memory_format=torch.channels_last)
        speed_up_linear(network)
    return generator, discriminator


def draw_batches(images, args):
    """Yield batches and noise without end, with the random keys of train() in train_dcgan.py.

    :param torch.Tensor images: uint8, (N, C, 28, 28), on the device
    :param argparse.Namespace args: seed, batch_size, z_dim
    :return: images in [0, 1], (B, C, 28, 28), and z, (B, z_dim)
    :rtype: Iterator[tuple[torch.Tensor, torch.Tensor]]
    """
    for epoch in itertools.count(1):
        order = torch.randperm(len(images), generator=make_rng("cpu", args.seed, epoch))
        rng = make_rng(images.device, args.seed, epoch, 1)
        whole = len(images) // args.batch_size * args.batch_size
        for chosen in order[:whole].to(images.device).split(args.batch_size):
            real = images[chosen].float().div_(255)
            yield real, train_dcgan.draw_z(args.batch_size, args, rng)


def measure(recipe, args, images, scorer, device, total):
    """Train a recipe, and score it POINTS times.

    :param str recipe: its name, for its networks and for the lines that are printed
    :param argparse.Namespace args: of train_dcgan.py
    :param torch.Tensor images: the data, uint8, (N, C, 28, 28)
    :param common.fid.Scorer scorer: scores samples
    :param torch.device device: where to train
    :param int total: how many images the run sees
    :return: a row for each time: "images" that it has seen, "seconds" of training, and its scores
    :rtype: list[dict]
    """
    torch.manual_seed(args.seed)
    generator, discriminator = make_networks(recipe, args, images)
    generator.to(device)
    discriminator.to(device)
    ema = copy.deepcopy(generator)
    g_optimizer = train_dcgan.make_optimizer(generator, args)
    d_optimizer = train_dcgan.make_optimizer(discriminator, args)
    rows = []
    seconds = 0.0
    began = time.perf_counter()
    for step, (real, z) in enumerate(draw_batches(images.to(device), args)):
        losses = train_dcgan.train_step(
            generator, discriminator, g_optimizer, d_optimizer, real, z, args.amp
        )
        train_dcgan.update_ema(ema, generator, min(args.ema, (1 + step) / (10 + step)))
        seen = (step + 1) * args.batch_size
        if seen < total * (len(rows) + 1) / POINTS:
            continue
        losses.tolist()  # waits for the GPU
        seconds += time.perf_counter() - began
        found = train_dcgan.score(ema, scorer, args)
        row = {"images": seen, "seconds": round(seconds, 1), **found}
        print(f"{recipe:12s} seed {args.seed}  {row['images']:9,}  fid {row['fid']:8.3f}  "
              f"precision {row['precision']:.3f}  recall {row['recall']:.3f}  "
              f"largest class {row['largest_class']:.2f}", flush=True)  # fmt: skip
        rows.append(row)
        if len(rows) == POINTS:
            return rows
        began = time.perf_counter()


def measure_once(folder, recipe, flags, images, scorer, device, total):
    """Read what :func:`measure` found with the same settings, or call it and keep what it finds."""
    args = train_dcgan.get_parser().parse_args(flags)
    optimizer = train_dcgan.make_optimizer(nn.Linear(1, 1), args).defaults
    options = {name: getattr(args, name) for name in MATTERS}
    options["lr"] = optimizer["lr"]
    settings = {"args": options, "optimizer": optimizer, "images": total, "floor": scorer.floor}
    settings = json.loads(json.dumps(settings))  # as a file gives it back
    file = folder / f"{recipe.replace(' ', '')}-{args.seed}.json"
    if file.is_file():
        saved = json.loads(file.read_text())
        if saved["settings"] == settings:
            return saved["rows"]
    rows = measure(recipe, args, images, scorer, device, total)
    with replacing(file) as part:
        part.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
    return rows


def spread(values):
    """Write mean ± standard deviation over the seeds."""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


def images_to_reach(rows, target):
    """Share of all images after which the mean FID is at or below a value; None for never."""
    for point in range(POINTS):
        if statistics.mean(run[point]["fid"] for run in rows) <= target:
            return (point + 1) / POINTS
    return None


def plot(path, found, floor):
    """Draw FID against the images seen: the mean of the seeds, and from the best to the worst."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for recipe, runs in found.items():
        seen = [row["images"] for row in runs[0]]
        fids = [[run[point]["fid"] for run in runs] for point in range(POINTS)]
        (line,) = axes.plot(seen, [statistics.mean(f) for f in fids], marker=".", label=recipe)
        low = [min(f) for f in fids]
        high = [max(f) for f in fids]
        axes.fill_between(seen, low, high, alpha=0.2, color=line.get_color())
    axes.axhline(floor, linestyle="--", color="grey", label="floor: training images")
    axes.set(xlabel="images seen", ylabel="classifier-FID", yscale="log")
    axes.legend()
    save_figure(path, figure, dpi=120)


def get_parser():
    """Build the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--classifier", required=True, help="a run of train_classifier.py")
    parser.add_argument("--dataset", default="mnist", help="what to draw")
    parser.add_argument("--data-dir", default="data", help="where it is")
    parser.add_argument("--split", default="mnist", help="of EMNIST")
    parser.add_argument("--width", type=float, default=0.5, help="of both networks")
    parser.add_argument("--images", type=int, default=180_000, help="that each run sees")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each recipe")
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES), choices=RECIPES,
                        metavar="NAME", help="some of them")  # fmt: skip
    parser.add_argument("--changes", nargs="*", metavar="FLAGS",
                        help='ours with other flags, for example " --lr 2e-4"')  # fmt: skip
    parser.add_argument("--cuda", action="store_true", help="on the GPU")
    parser.add_argument("--out", default="runs/dcgan_quality", help="where each run's scores go")
    return parser


def report(found, floor):
    """Print the table and the RESULT line.

    :param dict found: by recipe, the rows of each seed
    :param float floor: the FID of training images
    """
    marks = [POINTS // 8, POINTS // 4, POINTS // 2, POINTS]
    columns = "".join(f"{f'{mark}/{POINTS}':>18s}" for mark in marks)
    print(f"{'FID after':28s}{columns}{'precision':>18s}{'recall':>18s}{'images/s':>10s}")
    result = {"fid_floor": round(floor, 4)}
    for name, runs in found.items():
        cells = [spread([run[mark - 1]["fid"] for run in runs]) for mark in marks]
        cells += [spread([run[-1][column] for run in runs]) for column in SCORES[1:3]]
        speed = statistics.mean(run[-1]["images"] / run[-1]["seconds"] for run in runs)
        print(f"{name:28s}" + "".join(f"{cell:>18s}" for cell in cells) + f"{speed:10,.0f}")
        result[f"fid_{name}"] = round(statistics.mean(run[-1]["fid"] for run in runs), 4)
    if {"ours", "examples"} <= found.keys():
        ours = found["ours"]
        finals = [run[-1]["fid"] for run in found["examples"]]
        mean = statistics.mean(finals)
        result["images_to_reach_examples_final"] = images_to_reach(ours, mean)
        result["images_to_reach_examples_best_seed"] = images_to_reach(ours, min(finals))
    print("RESULT", json.dumps(result))


def main():
    """Train and score every recipe; print a table and a RESULT line, and draw the curves."""
    args = get_parser().parse_args()
    device = set_up(args.cuda, seed=0)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    train_half, test_half = (
        load_dataset(args.dataset, args.data_dir, train, args.split, train_dcgan.SIDE)
        for train in (True, False)
    )
    scorer = Scorer(load_classifier(args.classifier, device), train_half, test_half)
    recipes = {name: RECIPES[name] for name in args.recipes}
    recipes.update({f"ours {flags.strip()}": flags for flags in args.changes or ()})
    found = {name: [] for name in recipes}
    for seed in range(args.seeds):
        for name, flags in recipes.items():
            flags = [*flags.split(), "--width", str(args.width), "--seed", str(seed)]
            rows = measure_once(out, name, flags, train_half.images, scorer, device, args.images)
            found[name].append(rows)

    floor = scorer.floor["fid"]
    print(f"\n{args.images:,} images, width {args.width}, {args.seeds} seeds, "
          f"{scorer.samples:,} samples; floor {floor:.3f}")  # fmt: skip
    plot(out / "dcgan_quality.png", found, floor)
    print(f"curves   {out / 'dcgan_quality.png'}")
    report(found, floor)


if __name__ == "__main__":
    main()
