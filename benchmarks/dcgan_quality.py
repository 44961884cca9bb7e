"""How good drawings are at equal numbers of images seen: three recipes for one pair of networks.

    python benchmarks/dcgan_quality.py --classifier runs/classifier-mnist

A recipe is a command line of train_dcgan.py and, for the first, another discriminator:

post      the ancestor's: SGD, Nesterov, ReLU in D, PyTorch's initial weights
examples  of pytorch/examples: Adam, N(0, 0.02), LeakyReLU; samples are G's own
ours      the defaults of train_dcgan.py; --changes adds them with other flags

All have BatchNorm after the linear layers, without which the drawings collapse. Samples are scored
as --fid does (common/fid.py), on the same noise each time. Each run leaves a JSON file in --out, so
that a benchmark that was interrupted goes on where it was.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_dcgan
from common.data import load_dataset
from common.device import set_up
from common.errors import HelpFormatter
from common.fid import SCORES, make_judge
from common.run import replacing

RECIPES = {
    "post": "--optimizer sgd --lr 0.01 --batch-size 64 --ema 0",
    "examples": "--optimizer adam --lr 2e-4 --beta1 0.5 --batch-size 64 --ema 0",
    "ours": "",
}
POINTS = 8  # how often a run is scored
MATTERS = (  # options of train_dcgan.py that change what is trained
    "width", "z_dim", "latent", "linear_bn", "batch_size", "optimizer", "lr", "beta1", "ema",
    "seed", "amp",
)  # fmt: skip


def make_networks(recipe, width, images):
    """Build G and D with the initial weights of a recipe, for images, uint8, (N, C, 28, 28)."""
    channels = images.shape[1]
    generator = train_dcgan.Generator(channels=channels, width=width)
    discriminator = train_dcgan.Discriminator(channels, width)
    if recipe == "post":
        for module in discriminator.modules():
            if isinstance(module, nn.LeakyReLU):
                module.negative_slope = 0.0
    else:
        generator.apply(train_dcgan.init_weights)
        discriminator.apply(train_dcgan.init_weights)
    if recipe not in ("post", "examples"):
        train_dcgan.init_output(generator, images)
    return (n.to(memory_format=torch.channels_last) for n in (generator, discriminator))


def measure(recipe, args, data, judge, device, images):
    """Train a recipe, and score it POINTS times.

    :param str recipe: its name, for its networks and for the lines that are printed
    :param argparse.Namespace args: of train_dcgan.py
    :return: a row for each time: "images" that it has seen, "seconds" of training, and its scores
    :rtype: list[dict]
    """
    torch.manual_seed(args.seed)
    generator, discriminator = (
        n.to(device) for n in make_networks(recipe, args.width, data.images)
    )
    ema = copy.deepcopy(generator)
    optimizers = [train_dcgan.make_optimizer(n, args) for n in (generator, discriminator)]
    pictures, rows, epoch, seen, seconds = data.images.to(device), [], 0, 0, 0.0
    while len(rows) < POINTS:
        epoch, progress = epoch + 1, {"done": 0, "totals": [0.0] * 4, "whole": False}
        while not progress["whole"] and len(rows) < POINTS:
            before, began = progress["done"], time.perf_counter()
            until = -(-images * (len(rows) + 1) // (POINTS * args.batch_size)) - seen
            train_dcgan.train(
                generator, discriminator, ema, *optimizers, pictures, args,
                lambda end=before + until, so_far=progress: so_far["done"] >= end, progress, epoch,
            )  # fmt: skip
            seconds += time.perf_counter() - began
            seen += progress["done"] - before
            if seen * args.batch_size >= images * (len(rows) + 1) / POINTS:
                found = train_dcgan.score(ema, judge, args)
                row = {"images": seen * args.batch_size, "seconds": round(seconds, 1), **found}
                print(f"{recipe:12s} seed {args.seed}  {row['images']:9,}  fid {row['fid']:8.3f}  "
                      f"precision {row['precision']:.3f}  recall {row['recall']:.3f}  "
                      f"largest class {row['largest_class']:.2f}", flush=True)  # fmt: skip
                rows.append(row)
    return rows


def measure_once(folder, recipe, flags, data, judge, device, images):
    """Read what :func:`measure` found with the same settings, or call it and keep what it finds."""
    args = train_dcgan.get_parser().parse_args(flags)
    optimizer = train_dcgan.make_optimizer(nn.Linear(1, 1), args).defaults
    options = {name: getattr(args, name) for name in MATTERS} | {"lr": optimizer["lr"]}
    settings = {"args": options, "optimizer": optimizer, "images": images, "floor": judge.floor}
    settings = json.loads(json.dumps(settings))  # as a file gives it back
    file = folder / f"{recipe.replace(' ', '')}-{args.seed}.json"
    if file.is_file():
        saved = json.loads(file.read_text())
        if saved["settings"] == settings:
            return saved["rows"]
    rows = measure(recipe, args, data, judge, device, images)
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
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for recipe, runs in found.items():
        seen = [row["images"] for row in runs[0]]
        fids = [[run[point]["fid"] for run in runs] for point in range(POINTS)]
        (line,) = axes.plot(seen, [statistics.mean(f) for f in fids], marker=".", label=recipe)
        low, high = [min(f) for f in fids], [max(f) for f in fids]
        axes.fill_between(seen, low, high, alpha=0.2, color=line.get_color())
    axes.axhline(floor, linestyle="--", color="grey", label="floor: training images")
    axes.set(xlabel="images seen", ylabel="classifier-FID", yscale="log")
    axes.legend()
    with replacing(path) as part:
        figure.savefig(part, dpi=120)


def get_parser():
    """Build the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--classifier", required=True, help="a checkpoint of train_classifier.py")
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


def main():
    """Train and score every recipe; print a table and a RESULT line, and draw the curves."""
    args = get_parser().parse_args()
    device, out = set_up(args.cuda, seed=0), Path(args.out)
    data, test = (
        load_dataset(args.dataset, args.data_dir, half, args.split, train_dcgan.SIDE)
        for half in (True, False)
    )
    judge = make_judge(args.classifier, data, test, device)
    recipes = {name: RECIPES[name] for name in args.recipes}
    recipes |= {f"ours {flags.strip()}": flags for flags in args.changes or ()}
    found = {name: [] for name in recipes}
    for seed in range(args.seeds):
        for name, flags in recipes.items():
            flags = [*flags.split(), "--width", str(args.width), "--seed", str(seed)]
            found[name].append(measure_once(out, name, flags, data, judge, device, args.images))

    print(f"\n{args.images:,} images, width {args.width}, {args.seeds} seeds, "
          f"{judge.samples:,} samples; floor {judge.floor['fid']:.3f}")  # fmt: skip
    marks = [POINTS // 8, POINTS // 4, POINTS // 2, POINTS]
    print(f"{'FID after':28s}" + "".join(f"{f'{m}/{POINTS}':>18s}" for m in marks)
          + f"{'precision':>18s}{'recall':>18s}{'images/s':>10s}")  # fmt: skip
    result = {"fid_floor": round(judge.floor["fid"], 4)}
    for name, runs in found.items():
        cells = [spread([run[mark - 1]["fid"] for run in runs]) for mark in marks]
        cells += [spread([run[-1][column] for run in runs]) for column in SCORES[1:3]]
        speed = statistics.mean(run[-1]["images"] / run[-1]["seconds"] for run in runs)
        print(f"{name:28s}" + "".join(f"{cell:>18s}" for cell in cells) + f"{speed:10,.0f}")
        result[f"fid_{name}"] = round(statistics.mean(run[-1]["fid"] for run in runs), 4)
    if {"ours", "examples"} <= found.keys():
        finals = [run[-1]["fid"] for run in found["examples"]]
        result["images_to_reach_examples_final"] = images_to_reach(
            found["ours"], statistics.mean(finals)
        )
        result["images_to_reach_examples_best_seed"] = images_to_reach(found["ours"], min(finals))
    plot(out / "dcgan_quality.png", found, judge.floor["fid"])
    print(f"wrote    {out / 'dcgan_quality.png'}")
    print("RESULT", json.dumps(result))


if __name__ == "__main__":
    main()
