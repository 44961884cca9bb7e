"""Which explanation should one believe? Measure all of them on the same photos.

A map ranks the pixels of a photo x. Take pixels away in that order (deletion), or put them into an
empty picture (insertion), and watch the probability p of the class (RISE, Petsiuk et al. 2018,
arXiv 1806.07421):

    deletion = integral of p(x without the top a) da, insertion = integral of p(only the top a) da

    python compare_explanations.py --image sample:coffee sample:cat

A good map has a low deletion and a high insertion area. Beside them: the smallest part of the photo
whose loss costs 90 % of p (Fong & Vedaldi 2017, arXiv 1704.03296), how much the map changes when
the photo hardly does (max-sensitivity, Yeh et al. 2019, arXiv 1901.09392), whether it does when the
network's weights become random (Adebayo et al. 2018, arXiv 1810.03292) or another class is asked
for, and what it costs. Maps that know nothing of the network come first: without theirs, no number
means anything.

On one CPU core a photo takes a minute; the checks of the first --sanity photos five more.

Differences from the papers: pixels are taken away in 28 steps and replaced by a blur (10 px at 224)
and by the photo's mean colour, both areas averaged; random weights keep each layer's mean and
standard deviation, so that activations stay finite without BatchNorm.
"""

import copy
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import spearmanr
from skimage.metrics import structural_similarity
from torch import nn
from torch.nn import functional as F

import explain_perturb
import smoothgrad
from common.checkpoint import resume_args
from common.classifiers import find_class, load_classifier
from common.deletion import area, blur, make_reference, probability_curve, smallest_area
from common.device import is_first, make_rng, set_up
from common.errors import Interrupted, exit_code, make_parser, number
from common.gallery import explain_photos, load_arguments, report_failures, save_arguments, say
from common.panels import draw_cascade, draw_curves, map_sheet
from common.photos import SAMPLES, find_photos, read_photo
from common.run import finish, open_run, replacing, watching_signals
from common.tables import summarise, write_tables

SCRIPT = "compare_explanations"
CHUNK = 16  # pictures at once; on a CPU 8 take a third more time each
NOISE = 0.15  # sigma of SmoothGrad, in parts of the photo's range
NUDGE = 0.02  # max-sensitivity: how far a pixel may move, of [0, 1]
STAGES = 3  # of the cascade of random weights, from the top layer to all
COLUMNS = {  # of the table, and which end of each is the good one
    "deletion": "low", "insertion": "high", "smallest area": "low", "sensitivity": "low",
    "random weights": "low", "other class": "low", "seconds": "low", "evaluations": "low",
}  # fmt: skip
FREE = {"image", "cuda", "resume"}  # what --resume may change


# ------------------------------------------------------------- maps that don't know the network


def random_map(network, x, target, rng):
    """Rank the pixels at random."""
    return torch.rand(x.shape[-2:], generator=rng, device=x.device)


def centre_map(network, x, target, rng):
    """Rank the pixels by their distance from the centre, where photographers put things."""
    side = torch.linspace(-1, 1, x.shape[-1], device=x.device)
    return torch.exp(-2 * (side[:, None] ** 2 + side**2))


def edge_map(network, x, target, rng):
    """Rank the pixels by the length of the brightness's gradient (Sobel's filter)."""
    sobel = torch.tensor([[1.0, 2, 1], [0, 0, 0], [-1, -2, -1]], device=x.device)
    grey = F.pad(x.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    return F.conv2d(grey, torch.stack([sobel, sobel.T])[:, None]).norm(dim=1)[0]


def brightness_map(network, x, target, rng):
    """Rank the pixels by how bright they are."""
    return x.mean((0, 1))


# -------------------------------------------------------------------- maps of other publications


def grad_cam(network, x, target, rng):
    """Weight the last feature maps by their mean gradients (Selvaraju 2017, arXiv 1610.02391)."""
    last = {}

    def note(module, inputs, output):
        if isinstance(output, torch.Tensor) and output.ndim == 4 and output.shape[-1] > 1:
            last["maps"] = output

    hooks = [module.register_forward_hook(note) for module in network.modules()]
    try:
        with torch.enable_grad():
            score = network(x.detach().requires_grad_())[0, target[0]]
            (gradient,) = torch.autograd.grad(score, last["maps"])
    finally:
        for hook in hooks:
            hook.remove()
    cam = (gradient.mean((2, 3), keepdim=True) * last["maps"].detach()).sum(1, keepdim=True)
    return F.interpolate(cam.relu(), x.shape[-2:], mode="bilinear")[0, 0]


@torch.no_grad()
def rise(network, x, target, rng, count=500, cells=7):
    """Average random masks, weighted by the probability that they leave (RISE, arXiv 1806.07421).

    Masks are cells x cells coins, enlarged and shifted by up to a cell; what is masked becomes the
    mean colour. The paper takes 4,000 masks and more, and divides by how often a pixel is kept on
    average; of 500 masks such a map shows mostly the masks, so divide by how often it was.
    """
    side = x.shape[-1]
    cell = -(-side // cells)
    total, kept = torch.zeros(2, side, side, device=x.device)
    empty = x.mean((2, 3), keepdim=True)
    for some in torch.arange(count).split(CHUNK):
        coins = torch.rand((len(some), 1, cells + 1, cells + 1), generator=rng, device=x.device)
        large = F.interpolate((coins < 0.5).float(), ((cells + 1) * cell,) * 2, mode="bilinear")
        corners = torch.randint(cell, (len(some), 2), generator=rng, device=x.device).tolist()
        pairs = zip(large, corners, strict=True)
        masks = torch.stack([m[:, i : i + side, j : j + side] for m, (i, j) in pairs])
        left = network(empty + masks * (x - empty)).softmax(1)[:, target[0]]
        total += (left.view(-1, 1, 1) * masks[:, 0]).sum(0)
        kept += masks.sum((0, 1))
    return total / kept


# --------------------------------------------------------------------- this repository's own maps


def plain(explain):
    """Turn a signed map of smoothgrad.py into a ranking of pixels."""

    def rank(network, x, target, rng):
        gradient = partial(smoothgrad.input_gradient, network)
        return smoothgrad.over_channels(explain(gradient, x, target))[0]

    return rank


class Smooth(NamedTuple):
    """A ranking of pixels by the mean of a map over noisy copies; methods may share the mean."""

    mean: Callable  # from network, photo, target and generator to Maps
    reduce: str = "signed"

    def __call__(self, network, x, target, rng):
        return self.read(self.mean(network, x, target, rng))

    def read(self, maps):
        """Rank the pixels by the mean of the map, of its absolute value or of its square."""
        return smoothgrad.over_channels(maps.get(self.reduce))[0].float()


def noisy(explain, samples=50):
    """Average a map of smoothgrad.py over noisy copies."""

    def mean(network, x, target, rng):
        one = partial(explain, partial(smoothgrad.input_gradient, network))
        *_, maps = smoothgrad.smoothgrad(one, x, target, NOISE, samples, CHUNK, rng)
        return maps

    return mean


def call(gradient, x, target):
    """Give the gradient itself."""
    return gradient(x, target)


def times_input(gradient, x, target):
    """Multiply the gradient by the pixels."""
    return gradient(x, target) * x


def integrated(gradient, x, target, steps=64):
    """Integrate the gradient, from black."""
    black = torch.zeros_like(x[:1])
    return smoothgrad.integrated_gradients(gradient, black, steps, CHUNK, x, target)


def perturbation(*flags):
    """Learn masks with explain_perturb.py, and rank the pixels by how soon they are deleted."""
    args = explain_perturb.get_parser().parse_args(flags)

    def rank(network, x, target, rng):
        reference = make_reference(args.reference, x, args.blur * x.shape[-1] / 224, rng)
        game = explain_perturb.Game(network, x, reference, target, args)
        theta = game.start()
        for _ in explain_perturb.optimise(game, theta, args, rng):
            pass
        return explain_perturb.find_answer(game, 0, theta, before=1.0)[1]

    return rank


gradients = noisy(call)
METHODS = {
    "random": random_map,
    "centre": centre_map,
    "edges": edge_map,
    "brightness": brightness_map,
    "gradient": plain(call),
    "gradient x input": plain(times_input),
    "SmoothGrad signed": Smooth(gradients),
    "SmoothGrad abs": Smooth(gradients, "abs"),
    "SmoothGrad squared": Smooth(gradients, "squared"),
    "gradient x input, smooth": Smooth(noisy(times_input)),
    "Integrated Gradients": plain(integrated),
    "Integrated Gradients, smooth": Smooth(noisy(partial(integrated, steps=8), samples=16)),
    "Guided Backpropagation": plain(smoothgrad.guided_backprop),
    "Guided Backpropagation, smooth": Smooth(noisy(smoothgrad.guided_backprop)),
    "perturbation, deletion": perturbation("--regularizer", "tv", "--game", "deletion"),
    "perturbation, areas": perturbation("--regularizer", "area", "--game", "deletion"),
    "perturbation, nested": perturbation(),
    "Grad-CAM": grad_cam,
    "RISE": rise,
}
BLIND = ("random", "centre", "edges", "brightness")


# ------------------------------------------------------------------------------------ the metrics


def nudge(x, rng):
    """Move each value of a photo by up to 0.02."""
    return x + NUDGE * (2 * torch.rand(x.shape, generator=rng, device=x.device) - 1)


def max_sensitivity(heat, moved):
    """Find how far a map moves when the photo is nudged: max |M(x + d) - M(x)| / |M(x)|.

    Yeh et al. 2019 (arXiv 1901.09392), definition 2, with d uniform in +-0.02.

    :param torch.Tensor heat: the photo's map
    :param list[torch.Tensor] moved: the maps of nudged photos
    :return: at least 0; 1 means that the map moves by its own length
    :rtype: float
    """
    return float(max((m - heat).norm() for m in moved) / heat.norm().clamp_min(1e-30))


def randomise(network, stage, rng):
    """Draw the weights of the top layers anew, and leave the caller's network alone.

    Adebayo et al. 2018 (arXiv 1810.03292), section 4.1: cascading randomisation.

    :param int stage: from 1, the last layer only, to STAGES, all of them
    :return: a copy, part of whose layers have random weights of the same mean and deviation
    :rtype: torch.nn.Module
    """
    network = copy.deepcopy(network)
    layers = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    count = 1 + round((len(layers) - 1) * (stage - 1) / (STAGES - 1))
    for layer in layers[-count:]:
        for p in layer.parameters(recurse=False):
            drawn = torch.randn(p.shape, generator=rng).to(p) * p.std(correction=0) + p.mean()
            p.data.copy_(drawn)
    return network


def similarity(a, b):
    """Compare two maps: Spearman's rank correlation and the structural similarity (SSIM).

    :return: each at most 1; the SSIM is that of maps scaled to [0, 1] by their 99th percentile
    :rtype: tuple[float, float]
    """
    a, b = (m.double().cpu().numpy() for m in (a, b))
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0, 0.0  # a map of one value ranks nothing
    rank = float(spearmanr(a.ravel(), b.ravel()).statistic)
    a, b = (np.clip((m - m.min()) / (np.percentile(m, 99) - m.min() + 1e-30), 0, 1) for m in (a, b))
    return rank, float(structural_similarity(a, b, data_range=1.0))


# ------------------------------------------------------------------------------- photo by photo


def rank_pixels(args, folder, stop, network, x, target):
    """Make the maps of all methods; where some share a mean, each counts as if it were alone.

    :param Stop stop: its ``signum`` is the signal that came, if one did
    :return: by method the map, (H, W), the seconds, and the pictures evaluated
    :rtype: dict[str, tuple[torch.Tensor, float, int]]
    :raises Interrupted: if a signal came
    """
    found, shared, evaluations = {}, {}, []
    counter = network.register_forward_pre_hook(lambda _, x: evaluations.append(len(x[0])))
    try:
        for name in args.methods:
            if stop.signum:
                command = f"python {SCRIPT}.py --resume {folder}"
                raise Interrupted(f"stopped; go on: {command}", stop.signum)
            method = METHODS[name]
            compute = method.mean if isinstance(method, Smooth) else method
            if compute not in shared:
                evaluations.clear()
                began, rng = time.time(), make_rng(x.device, args.seed, 0)
                made = compute(network, x, target, rng)
                shared[compute] = made, time.time() - began, sum(evaluations)
            made, *cost = shared[compute]
            found[name] = (method.read(made) if isinstance(method, Smooth) else made, *cost)
    finally:
        counter.remove()
    return found


def explain_photo(classifier, args, folder, stop, sanity, photo, stem):
    """Measure every method on one photo.

    :param bool sanity: whether to make the costly checks as well
    :param str stem: what the file of this photo's maps is called
    :return: its record in metrics.json
    :raises Interrupted: if a signal came
    """
    network, started, device = classifier.network, time.time(), classifier.device
    x = read_photo(photo, classifier.resize, classifier.size, classifier.channels).to(device)
    with torch.no_grad():
        probabilities = network(x).softmax(1)[0]
    rank = probabilities.argsort(descending=True).tolist()
    label = rank[0] if args.target is None else find_class(classifier.classes, args.target)
    second = rank[1] if rank[0] == label else rank[0]
    target, other = (torch.tensor([index], device=device) for index in (label, second))
    fills = {"blur": blur(x), "mean": x.mean((2, 3), keepdim=True).expand_as(x)}
    explain = partial(rank_pixels, args, folder, stop)
    rows, heats = {}, {"photo": x[0].cpu().numpy()}
    found = explain(network, x, target)
    for name, (heat, seconds, evaluations) in found.items():
        rows[name] = row = {"seconds": seconds, "evaluations": evaluations}
        for game in ("deletion", "insertion"):
            for fill, picture in fills.items():
                curve = probability_curve(network, x, target, heat, picture, game == "insertion")
                row[f"{game} curve, {fill}"] = [round(float(p), 5) for p in curve]
                row[f"{game}, {fill}"] = area(curve)
            row[game] = (row[f"{game}, blur"] + row[f"{game}, mean"]) / 2
        row["smallest area"] = smallest_area(np.array(row["deletion curve, blur"]))
        heats[name] = heat.cpu().numpy().astype(np.float32)
    if sanity:
        rng = make_rng(device, args.seed, 1)
        moved = [explain(network, nudge(x, rng), target) for _ in range(2)]
        others = explain(network, x, other)
        cascade = [explain(randomise(network, stage, make_rng("cpu", args.seed)), x, target)
                   for stage in range(1, STAGES + 1)]  # fmt: skip
        for name, row in rows.items():
            heat = found[name][0]
            row["sensitivity"] = max_sensitivity(heat, [maps[name][0] for maps in moved])
            row["other class"] = similarity(heat, others[name][0])[0]
            pairs = [similarity(heat, maps[name][0]) for maps in cascade]
            row["random weights, rank"] = [rank for rank, _ in pairs]
            row["random weights, SSIM"] = [ssim for _, ssim in pairs]
            row["random weights"] = pairs[-1][0]
    with replacing(folder / "maps" / f"{stem}.npz") as part:
        np.savez_compressed(part, **heats)
    say(f"{photo}: {classifier.classes[label]} {probabilities[label]:.1%}")
    return {"path": photo, "target": label, "class_name": classifier.classes[label],
            "probability": float(probabilities[label]), "seconds": time.time() - started,
            "evaluations": sum(row["evaluations"] for row in rows.values()),
            "maps": f"maps/{stem}.npz", "methods": rows}  # fmt: skip


# ------------------------------------------------------------------------------------ the script


# fmt: off
def get_parser():
    """Build the command line."""
    parser = make_parser(SCRIPT, __doc__)

    group = parser.add_argument_group("data")
    group.add_argument("--image", nargs="+", metavar="PATH", help=(
        "pictures, or folders of them; sample:coffee and the like need no file"),
        default=[f"sample:{name}" for name in SAMPLES])
    group = parser.add_argument_group("model")
    group.add_argument("--model", default="efficientnet_lite0", help=(
        "this one needs no download; a name of torchvision.models, timm/NAME, or a run of "
        "train_classifier.py"))
    group.add_argument("--target", help="class to explain, index or name; by default the top one")
    group = parser.add_argument_group("method")
    group.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS),
                       metavar="NAME", help=f"(default: all) {'; '.join(METHODS)}")
    group.add_argument("--sanity", type=number(int, 0), default=4, metavar="N", help=(
        "photos, from the first one on, on which the checks are made that need many maps: "
        "sensitivity, random weights, another class"))
    group.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0,
                       help="same seed, same machine, same result")
    group.add_argument("--cuda", action="store_true", help="use the GPU, if there is one")
    group = parser.add_argument_group("output")
    group.add_argument("--out", help=f"new run folder (default: runs/{SCRIPT}/DATE-TIME)")
    group.add_argument("--resume", metavar="RUN", help="go on with the photos that a run lacks")
    group.add_argument("--dry-run", action="store_true", help="one photo, the cheap methods only")
    return parser
# fmt: on


def main(argv=None):
    """Measure every method on every photo.

    :param list[str] argv: the command line; None for sys.argv
    :return: what metrics.json holds
    :rtype: dict
    :raises UserError: for a mistake in the arguments, or photos that can't be read
    """
    parser, started = get_parser(), time.time()
    args = parser.parse_args(argv)
    if args.resume:
        args = resume_args(parser, argv, load_arguments(args.resume, SCRIPT), FREE)
    elif args.dry_run:
        args.image, args.sanity = args.image[:1], 1
        args.methods = ["random", "gradient", "Grad-CAM"]
    photos = find_photos(args.image)
    device = set_up(args.cuda, args.seed)
    classifier = load_classifier(args.model, device)
    if args.target is not None:
        find_class(classifier.classes, args.target)  # a mistake in it is no single photo's fault
    folder = open_run(SCRIPT, args.out, args.resume)
    save_arguments(folder, SCRIPT, args)
    costly = set(photos[: args.sanity])

    def explain(pairs):
        ((photo, stem),) = pairs
        return [explain_photo(classifier, args, folder, stop, photo in costly, photo, stem)]

    with watching_signals() as stop:
        images, failed = explain_photos(photos, folder, explain)
    if not is_first():
        return {}
    found = {"images": images, "failed": failed}
    if images:
        found["table"] = summarise(images, COLUMNS)
        write_tables(folder, found["table"], COLUMNS, BLIND)
        draw_curves(folder / "curves.png", images)
        draw_cascade(folder / "random_weights.png", images)
        shown = {folder / image["maps"]: image["class_name"] for image in images[:8]}
        map_sheet(folder / "contact_sheet.png", shown)
    found = finish(folder, SCRIPT, args, argv, f"{len(images)} photos", device, started, **found)
    report_failures(failed, len(photos))
    return found


if __name__ == "__main__":
    sys.exit(exit_code(main))
