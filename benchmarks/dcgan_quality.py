"""How good samples are at equal numbers of images seen: four recipes for one pair of networks.

    python benchmarks/dcgan_quality.py --classifier pretrained/classifier-mnist --dataset mnist

A recipe is a command line of train_dcgan.py and, for the first, other initial weights and another
discriminator:

post      the ancestor's: SGD, Nesterov, ReLU in D, PyTorch's initial weights
examples  of pytorch/examples: Adam, N(0, 0.02), LeakyReLU; samples are G's own
ours      the defaults of train_dcgan.py; --changes adds them with other flags
labels    ours, told the classes: --conditional

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
from common.fid import Scorer
from common.images import save_figure
from common.run import replacing

RECIPES = {
    "post": "--optimizer sgd --lr 0.01 --batch-size 64 --ema 0",
    "examples": "--optimizer adam --lr 2e-4 --d-lr 2e-4 --batch-size 64 --ema 0",
    "ours": "",
    "labels": "--conditional",
}
MARKS = (20_000, 60_000, 120_000, 300_000, 600_000)  # images seen when a run is scored
MATTERS = (  # options of train_dcgan.py that change what is trained
    "width", "z_dim", "linear_bn", "size", "conditional", "batch_size", "optimizer", "lr", "ema",
    "seed", "amp",
)  # fmt: skip


def make_networks(recipe, args, data):
    """Build G and D with the initial weights of a recipe."""
    channels = data.images.shape[1]
    if recipe != "post":
        generator, discriminator = train_dcgan.make_networks(args, channels, len(data.classes))
        if recipe != "examples":
            train_dcgan.init_brightness(generator, data.images)
        return generator, discriminator
    generator = train_dcgan.Generator(args.z_dim, channels, args.width)
    discriminator = train_dcgan.Discriminator(channels, args.width)
    for module in discriminator.modules():
        if isinstance(module, nn.LeakyReLU):
            module.negative_slope = 0.0
    for network in (generator, discriminator):
        network.to(memory_format=torch.channels_last)
        speed_up_linear(network)
    return generator, discriminator


def draw_batches(data, args):
    """Yield batches and noise without end, with the random keys of train() in train_dcgan.py.

    :param common.data.Dataset data: images, uint8, (N, C, H, W), and labels, on the device
    :param argparse.Namespace args: seed, batch_size, z_dim
    :return: images in [0, 1], (B, C, H, W), their labels, (B,), and z, (B, z_dim)
    :rtype: Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    """
    device = data.images.device
    for epoch in itertools.count(1):
        order = torch.randperm(len(data.images), generator=make_rng("cpu", args.seed, epoch))
        rng = make_rng(device, args.seed, epoch, 1)
        torch.manual_seed(rng.initial_seed())
        whole = len(order) // args.batch_size * args.batch_size
        for chosen in order[:whole].to(device).split(args.batch_size):
            real = data.images[chosen].float().div_(255)
            yield real, data.labels[chosen], train_dcgan.draw_z(args.batch_size, args, rng)


def measure(recipe, args, data, scorer, marks):
    """Train a recipe, and score it at each mark.

    :param str recipe: its name, for its networks and for the lines that are printed
    :param argparse.Namespace args: of train_dcgan.py
    :param common.data.Dataset data: images, uint8, (N, C, H, W), and labels, on the device
    :param common.fid.Scorer scorer: scores samples
    :param list[int] marks: how many images the run has seen when it is scored
    :return: for each mark "images" seen, "seconds" of training, the means of "d_real" and "d_fake"
        since the last one, and the scores
    :rtype: list[dict]
    """
    device = data.images.device
    torch.manual_seed(args.seed)
    networks = make_networks(recipe, args, data)
    for network in networks:
        network.to(device)
    generator = networks[0]
    ema = copy.deepcopy(generator)
    optimizers = train_dcgan.make_optimizers(networks, args)
    counts = torch.bincount(data.labels, minlength=len(data.classes)).cpu()
    rows = []
    seconds = 0.0
    sums = torch.zeros(4, device=device)
    last = 0
    began = time.perf_counter()
    for step, (real, labels, z) in enumerate(draw_batches(data, args)):
        if recipe not in ("post", "examples"):
            train_dcgan.warm_up(optimizers, step, args)
        sums += train_dcgan.train_step(*networks, optimizers, real, labels, z, args.amp)
        share = 1 - min(args.ema, (1 + step) / (10 + step))
        train_dcgan.update_ema(ema, generator, share)
        seen = (step + 1) * args.batch_size
        if seen < marks[len(rows)]:
            continue
        _, _, d_real, d_fake = (sums / (step + 1 - last)).tolist()  # waits for the GPU
        seconds += time.perf_counter() - began
        found = train_dcgan.score(ema, scorer, counts, args)
        row = {"images": seen, "seconds": round(seconds, 1), "d_real": d_real, "d_fake": d_fake}
        row.update(found)
        print(f"{recipe:12s} seed {args.seed}  {seen:9,}  fid {row['fid']:8.3f}  "
              f"precision {row['precision']:.3f}  recall {row['recall']:.3f}  "
              f"D(x) {d_real:.2f}  D(G(z)) {d_fake:.2f}", flush=True)  # fmt: skip
        rows.append(row)
        if len(rows) == len(marks):
            return rows
        sums.zero_()
        last = step + 1
        began = time.perf_counter()


def measure_once(folder, recipe, flags, data, scorer, marks):
    """Read what :func:`measure` found with the same settings, or call it and keep what it finds."""
    args = train_dcgan.get_parser().parse_args(flags)
    optimizers = train_dcgan.make_optimizers((nn.Linear(1, 1), nn.Linear(1, 1)), args)
    options = {name: getattr(args, name) for name in MATTERS}
    defaults = [optimizer.defaults for optimizer in optimizers]
    settings = {
        "args": options,
        "optimizers": defaults,
        "warm_up": train_dcgan.WARM_UP,
        "marks": marks,
        "floor": scorer.floor,
    }
    settings = json.loads(json.dumps(settings))  # as a file gives it back
    file = folder / f"{recipe.replace(' ', '')}-{args.width:g}-{args.seed}.json"
    if file.is_file():
        saved = json.loads(file.read_text())
        if saved["settings"] == settings:
            return saved["rows"]
    rows = measure(recipe, args, data, scorer, marks)
    with replacing(file) as part:
        part.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
    return rows


def spread(values):
    """Write mean ± standard deviation over the seeds."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def images_to_reach(runs, target):
    """Return how many images there were when the mean FID was at or below a value; None: never."""
    for rows in zip(*runs, strict=True):
        if statistics.mean(row["fid"] for row in rows) <= target:
            return rows[0]["images"]
    return None


def plot(path, found, floor):
    """Draw FID against the images seen: the mean of the seeds, and from the best to the worst."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for recipe, runs in found.items():
        seen = [row["images"] for row in runs[0]]
        fids = [[row["fid"] for row in rows] for rows in zip(*runs, strict=True)]
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
    parser.add_argument("--width", type=float, default=1.0, help="of both networks")
    parser.add_argument("--images", type=int, default=300_000, choices=MARKS,
                        help="that each run sees (default: %(default)s)")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=3, help="runs of each recipe")
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES), choices=RECIPES,
                        metavar="NAME", help="some of them")  # fmt: skip
    parser.add_argument("--changes", nargs="*", metavar="FLAGS",
                        help='ours with other flags, for example " --lr 2e-4"')  # fmt: skip
    parser.add_argument("--cuda", action="store_true", help="on the GPU")
    parser.add_argument("--out", default="runs/dcgan_quality", help="where each run's scores go")
    return parser


def report(found, floor):
    """Print the table, the seeds one by one, and the RESULT line.

    :param dict found: by recipe, the rows of each seed
    :param float floor: the FID of training images
    """
    marks = [row["images"] for row in next(iter(found.values()))[0]]
    columns = [f"FID, {mark:,}" for mark in marks] + ["precision", "recall", "D(x)", "D(G(z))"]
    print(f"{'':28s}" + "".join(f"{column:>16s}" for column in columns))
    result = {"fid_floor": round(floor, 4)}
    for name, runs in found.items():
        cells = [spread([row["fid"] for row in rows]) for rows in zip(*runs, strict=True)]
        for column in ("precision", "recall", "d_real", "d_fake"):
            cells.append(spread([run[-1][column] for run in runs]))
        print(f"{name:28s}" + "".join(f"{cell:>16s}" for cell in cells))
        result[f"fid_{name}"] = round(statistics.mean(run[-1]["fid"] for run in runs), 4)
    for name, runs in found.items():
        finals = ", ".join(f"{run[-1]['fid']:.2f}" for run in runs)
        print(f"{name}: the seeds end at {finals}")
    if {"ours", "examples"} <= found.keys():
        best = min(row["fid"] for run in found["examples"] for row in run)
        result["images_to_reach_examples_best"] = images_to_reach(found["ours"], best)
    print("RESULT", json.dumps(result))


def main():
    """Train and score every recipe; print a table and a RESULT line, and draw the curves."""
    args = get_parser().parse_args()
    device = set_up(args.cuda, seed=0)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    train_half, test_half = (
        load_dataset(args.dataset, args.data_dir, train, args.split, size=28)
        for train in (True, False)
    )
    marks = [mark for mark in MARKS if mark <= args.images]
    scorer = Scorer(load_classifier(args.classifier, device), train_half, test_half)
    recipes = {name: RECIPES[name] for name in args.recipes}
    recipes.update({f"ours {flags.strip()}": flags for flags in args.changes or ()})
    data = train_half._replace(
        images=train_half.images.to(device), labels=train_half.labels.to(device)
    )
    found = {name: [] for name in recipes}
    for seed in range(args.seeds):
        for name, flags in recipes.items():
            flags = [*flags.split(), "--width", str(args.width), "--seed", str(seed)]
            found[name].append(measure_once(out, name, flags, data, scorer, marks))

    floor = scorer.floor["fid"]
    print(f"\n{args.images:,} images, width {args.width}, {args.seeds} seeds, "
          f"{scorer.samples:,} samples; floor {floor:.3f}")  # fmt: skip
    plot(out / "dcgan_quality.png", found, floor)
    print(f"curves   {out / 'dcgan_quality.png'}")
    report(found, floor)


if __name__ == "__main__":
    main()
