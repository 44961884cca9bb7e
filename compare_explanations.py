"""Which explanation should one believe? Measure all of them on the same photos.

A map ranks the pixels of a photo x. Take pixels away in that order (deletion),
or put them into an empty image (insertion), and watch the probability p of the
class (RISE, Petsiuk et al. 2018, arXiv 1806.07421):

    deletion = integral of p(x without the top a) da
    insertion = integral of p(only the top a) da

    python compare_explanations.py --image sample:coffee sample:cat

A good map has a low deletion and a high insertion area. Beside them: the
smallest fraction of the photo whose loss costs 90 % of p (Fong & Vedaldi 2017,
arXiv 1704.03296), how much the map changes when the photo hardly does
(max-sensitivity, Yeh et al. 2019, arXiv 1901.09392), whether it does when the
network's weights become random (Adebayo et al. 2018, arXiv 1810.03292) or
another class is asked for, and what it costs. Maps that know nothing of the
network come first: without theirs, no number means anything.

On one CPU core a photo takes a minute; the checks of the first --sanity photos
take five more.

Differences from the papers: pixels are taken away in 28 steps and replaced by
a blur (10 px at 224) and by the photo's mean colour, both areas averaged;
random weights keep each layer's mean and standard deviation, so that
activations stay finite without BatchNorm.
"""

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import common  # isort: skip # noqa: F401 (Ctrl-C while torch is imported: one line)

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import explain_perturb
import smoothgrad
from common.classifiers import find_class, load_classifier
from common.device import is_first, make_rng, set_up, wait_for
from common.errors import UserError, exit_code, interruptible, number, seed_int
from common.images import save_figure, to_line
from common.networks import check_classifier, eval_mode, load_weights
from common.photos import (
    SAMPLES,
    explain_photos,
    find_photos,
    load_arguments,
    predict,
    read_photo,
    report_failures,
    save_arguments,
    say,
)
from common.run import (
    open_run,
    read_arrays,
    replacing,
    resume_args,
    write_csv,
    write_metrics,
)

SCRIPT = Path(__file__).stem
CHUNK = 16  # images computed at once; on a CPU 8 take a third more time each
GPU_CHUNK = 64  # the same on a GPU, where fewer leave it waiting for its launches
NOISE = 0.15  # sigma of SmoothGrad, as a fraction of the photo's range
NUDGE = 0.02  # max-sensitivity: how far a pixel may move, of [0, 1]
STAGES = 3  # of the cascade of random weights, from the top layer to all
GAMES = ("deletion", "insertion")
FILLS = ("blur", "mean")  # what takes the place of the photo
KINDS = ("rank", "SSIM")  # of similarity
STEPS = 28  # of the deletion and insertion curves
LEFT = 0.1  # fraction of the probability at which the class counts as suppressed
COLUMNS = {  # of the table, and which end of each is the good one
    "deletion": "low", "insertion": "high", "smallest area": "low", "sensitivity": "low",
    "random weights": "low", "other class": "low", "seconds": "low", "evaluations": "low",
}  # fmt: skip
CHANGEABLE_ON_RESUME = {"image", "cuda", "device", "resume"}


# ------------------------------------------------------------- maps that don't know the network


def random_map(network, x, target, rng):
    """Rank the pixels at random."""
    return torch.rand(x.shape[-2:], generator=rng, device=x.device)


def centre_map(network, x, target, rng):
    """Rank the pixels by their distance from the centre, where photographers put things."""
    side = torch.linspace(-1, 1, x.shape[-1], device=x.device)
    return torch.exp(-2 * (side.view(-1, 1) ** 2 + side.view(1, -1) ** 2))


def edge_map(network, x, target, rng):
    """Rank the pixels by the length of the brightness's gradient (Sobel's filter)."""
    sobel = torch.tensor([[1.0, 2, 1], [0, 0, 0], [-1, -2, -1]], device=x.device)
    grey = F.pad(x.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    across_and_down = torch.stack([sobel, sobel.T]).unsqueeze(1)  # (2, 1, 3, 3)
    return F.conv2d(grey, across_and_down).norm(dim=1)[0]


def brightness_map(network, x, target, rng):
    """Rank the pixels by how bright they are."""
    return x.mean((0, 1))


# -------------------------------------------------------------------- maps of other publications


def grad_cam(network, x, target, rng=None):
    """Weight the last feature maps by their mean gradients (Selvaraju 2017, arXiv 1610.02391).

    The last feature maps are the last grid that all evidence flows through and whose cells still
    count: of a CNN the last convolutional stage; of a ViT with a class token, which reads the
    patches in the last block, the tokens that enter this block.

    :raises UserError: if the network has no such grid
    """
    grids = []
    evened = {}  # outputs of LayerNorm, which evens out what cells differ in, by their memory
    learned = False  # has a layer with weights been passed? what comes before is still the photo

    def note(module, inputs, output):
        nonlocal learned
        learned = learned or any(True for _ in module.parameters(recurse=False))
        if not (learned and torch.is_tensor(output) and output.requires_grad):
            return
        if isinstance(module, nn.LayerNorm):
            evened[output.data_ptr()] = output
        elif output.data_ptr() not in evened and to_grid(output) is not None:
            grids.append(output)

    hooks = [module.register_forward_hook(note) for module in network.modules()]
    try:
        with torch.enable_grad(), eval_mode(network):
            start = x.detach().requires_grad_() * 1
            score = network(start)[0, target[0]]
    finally:
        for hook in hooks:
            hook.remove()
    nodes = bottlenecks(score.grad_fn, start.grad_fn)
    grids = [grid for grid in grids if grid.grad_fn in nodes]
    gradients = torch.autograd.grad(score, grids) if grids else []
    for grid, gradient in reversed(list(zip(grids, gradients, strict=True))):
        maps = to_grid(grid.detach())
        slopes = to_grid(gradient)
        if slopes.any():
            cam = (slopes.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True)
            return F.interpolate(cam.relu(), x.shape[-2:], mode="bilinear")[0, 0]
    raise UserError("Grad-CAM needs a grid of features, and this network has none")


def to_grid(values):
    """Lay features out as (N, C, H, W).

    :param torch.Tensor values: (N, C, H, W); channels last, (N, H, W, C); or tokens, (N, T, C), of
        which up to eight may be class and register tokens, which come first and are left out
    :return: None if they are no square grid
    :rtype: torch.Tensor
    """
    if values.ndim == 4 and values.shape[2] == values.shape[3] > 1:
        return values
    if values.ndim == 4 and values.shape[1] == values.shape[2] > 1:
        return values.permute(0, 3, 1, 2)
    if values.ndim == 3 and values.shape[1] >= 4:
        side = math.isqrt(values.shape[1])
        extra = values.shape[1] - side**2
        if extra <= 8:
            return values[:, extra:].transpose(1, 2).unflatten(2, (side, side))
    return None


def bottlenecks(end, start):
    """Find the nodes of autograd's graph that every path from end to start leads through.

    An attention matrix, or one of two branches, is no bottleneck: some evidence flows past it.

    :param torch.autograd.graph.Node end: of the score
    :param torch.autograd.graph.Node start: of the photo
    :rtype: set
    """
    behind = {}
    before = {end: []}
    stack = [end]
    while stack:
        node = stack.pop()
        if node in behind:
            continue
        behind[node] = [other for other, _ in node.next_functions if other is not None]
        for other in behind[node]:
            before.setdefault(other, []).append(node)
        stack += behind[node]
    relevant = set()  # what lies between the two
    stack = [start]
    while stack:
        node = stack.pop()
        if node not in relevant:
            relevant.add(node)
            stack += before[node]

    # Walk from end to start, a node after all that lie before it. Where no edge but its own is
    # open, all paths meet.
    arriving = {node: sum(other in relevant for other in before[node]) for node in relevant}
    waiting = dict(arriving)
    found = set()
    open_edges = 0
    ready = [end]
    while ready:
        node = ready.pop()
        open_edges -= arriving[node]
        if open_edges == 0:
            found.add(node)
        for other in behind[node]:
            if other in relevant:
                open_edges += 1
                waiting[other] -= 1
                if waiting[other] == 0:
                    ready.append(other)
    return found


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
        with eval_mode(network):
            left = network(empty + masks * (x - empty)).softmax(1).index_select(1, target)
        total += (left.view(-1, 1, 1) * masks[:, 0]).sum(0)
        kept += masks.sum((0, 1))
    return total / kept


# --------------------------------------------------------------------- this repository's own maps


def plain(explain):
    """Turn a signed map of smoothgrad.py into a ranking of pixels."""

    def rank(network, x, target, rng):
        return smoothgrad.over_channels(explain(network, x, target))[0]

    return rank


class Smooth(NamedTuple):
    """A ranking of pixels by the mean of a map of smoothgrad.py over noisy copies.

    Methods that differ in ``reduce`` only share their noisy copies.
    """

    explain: Callable
    samples: int = 50
    reduce: str = "signed"

    def average(self, network, x, target, rng):
        """Compute the means over noisy copies."""
        chunk = chunk_size(x)
        return smoothgrad.average_maps(
            network, x, target, NOISE, self.samples, self.explain, chunk, rng
        )

    def rank(self, means):
        """Rank the pixels by the mean of the map, of its absolute value or of its square."""
        return smoothgrad.over_channels(means.get(self.reduce))[0].float()


def perturbation(**settings):
    """Learn masks with explain_perturb.py, and rank the pixels by how soon they are deleted."""
    settings = explain_perturb.Settings(**settings)

    def rank(network, x, target, rng):
        game = explain_perturb.Game(network, x, target, settings, rng)
        evaluations = 0
        for step, values in explain_perturb.minimise(game):
            maps = step
            evaluations += len(values) * game.pictures
        answer = explain_perturb.find_answer(game, 0, maps, before=1.0)
        return Counted(answer.ranking, evaluations + len(answer.facts["curve"]))

    return rank


class Counted(NamedTuple):
    """A ranking that counts its own evaluations: of a graph the network sees none."""

    heat: torch.Tensor
    evaluations: int


def chunk_size(x):
    """Return how many images to compute at once, where they are."""
    return CHUNK if x.device.type == "cpu" else GPU_CHUNK


def integrated(network, x, target, steps=64):
    """Compute Integrated Gradients from black."""
    chunk = chunk_size(x)
    return smoothgrad.integrated_gradients(network, x, target, steps=steps, chunk=chunk)


METHODS = {
    "random": random_map,
    "centre": centre_map,
    "edges": edge_map,
    "brightness": brightness_map,
    "gradient": plain(smoothgrad.gradient),
    "gradient x input": plain(smoothgrad.gradient_x_input),
    "SmoothGrad signed": Smooth(smoothgrad.gradient),
    "SmoothGrad abs": Smooth(smoothgrad.gradient, reduce="abs"),
    "SmoothGrad squared": Smooth(smoothgrad.gradient, reduce="squared"),
    "gradient x input, smooth": Smooth(smoothgrad.gradient_x_input),
    "Integrated Gradients": plain(integrated),
    "Integrated Gradients, smooth": Smooth(partial(integrated, steps=8), samples=16),
    "Guided Backpropagation": plain(smoothgrad.guided_backprop),
    "Guided Backpropagation, smooth": Smooth(smoothgrad.guided_backprop),
    "perturbation, deletion": perturbation(regularizer="tv", game="deletion"),
    "perturbation, areas": perturbation(regularizer="area", game="deletion"),
    "perturbation, nested": perturbation(),
    "Grad-CAM": grad_cam,
    "RISE": rise,
}
BLIND = ("random", "centre", "edges", "brightness")
NEEDS = {  # maps that not every network can have, by the function that says why
    "Guided Backpropagation": smoothgrad.guided_backprop,
    "Guided Backpropagation, smooth": smoothgrad.guided_backprop,
    "Grad-CAM": grad_cam,
}


# ------------------------------------------------------------------------------- curves and areas


@torch.no_grad()
def probability_curve(network, x, target, heat, fill, insertion=False):
    """Take pixels away in the order of a map, or put them back, and watch the probability.

    :param torch.nn.Module network: from pixels in [0, 1] to logits
    :param torch.Tensor x: the photo, (1, C, H, W)
    :param torch.Tensor target: the class, (1,)
    :param torch.Tensor heat: the map, (H, W); the largest value goes first, ties in reading order
    :param torch.Tensor fill: what is there without the photo, (1, C, H, W)
    :param bool insertion: begin with ``fill`` and put the photo's pixels in
    :return: the probability after 0, 1/28, ... 28/28 of the pixels
    :rtype: numpy.ndarray
    """
    order = heat.flatten().argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=x.device)
    counts = torch.linspace(0, len(order), STEPS + 1, device=x.device).round()
    changed = (rank < counts.view(-1, 1)).view(-1, 1, *heat.shape)  # (29, 1, H, W)
    images = torch.where(changed, x, fill) if insertion else torch.where(changed, fill, x)
    with eval_mode(network):
        return network(images).softmax(1).index_select(1, target)[:, 0].cpu().numpy()


def area(curve):
    """Integrate a curve over the fraction of the pixels, from 0 to 1, by the trapezoidal rule."""
    return float((curve[1:] + curve[:-1]).mean() / 2)


def smallest_area(curve):
    """Find the fraction of the pixels after whose loss 10 % of the probability are left.

    :param numpy.ndarray curve: of a deletion
    :return: from 0 to 1, interpolated; 1 if it never falls so low
    :rtype: float
    """
    low = np.flatnonzero(curve <= LEFT * curve[0])
    if not len(low) or curve[0] == 0:  # what isn't there can't be lost
        return 1.0
    i = low[0]
    fraction = (curve[i - 1] - LEFT * curve[0]) / (curve[i - 1] - curve[i])
    return float((i - 1 + fraction) / (len(curve) - 1))


def measure_curves(network, x, target, heat, fills):
    """Measure how well a map ranks the pixels.

    :param torch.Tensor heat: the map, (H, W)
    :param dict fills: by name, what takes the photo's place, (1, C, H, W) each
    :return: deletion and insertion, their curves, and the smallest area
    :rtype: dict
    """
    row = {}
    for game in GAMES:
        areas = []
        for name, fill in fills.items():
            curve = probability_curve(network, x, target, heat, fill, game == "insertion")
            row[f"{game} curve, {name}"] = [round(float(p), 5) for p in curve]
            row[f"{game}, {name}"] = area(curve)
            areas.append(area(curve))
        row[game] = sum(areas) / len(areas)
    row["smallest area"] = smallest_area(np.array(row["deletion curve, blur"]))
    return row


# ---------------------------------------------------------------------------------- sanity checks


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
    from scipy.stats import spearmanr
    from skimage.metrics import structural_similarity

    a = a.double().cpu().numpy()
    b = b.double().cpu().numpy()
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0, 0.0  # a map of one value ranks nothing
    rank = float(spearmanr(a.ravel(), b.ravel()).statistic)
    return rank, float(structural_similarity(to_unit(a), to_unit(b), data_range=1.0))


def to_unit(heat):
    """Scale a map, an array, to [0, 1], from its smallest value to its 99th percentile."""
    low = heat.min()
    high = np.percentile(heat, 99)
    return np.clip((heat - low) / (high - low + 1e-30), 0, 1)


# -------------------------------------------------------------------------------- photo by photo


def leave_out(methods, network, x):
    """Leave out, with a line for each, the methods that a network can't have.

    :param list[str] methods: names in METHODS
    :param torch.Tensor x: any image, (1, C, H, W)
    :return: the others
    :rtype: list[str]
    :raises UserError: if there are none
    """
    target = torch.tensor([0], device=x.device)
    left = []
    for name in methods:
        try:
            if name in NEEDS:
                NEEDS[name](network, x, target)
            left.append(name)
        except UserError as error:
            why = error
            if is_first():
                print(f"without  {name}: {error}")
    if not left:
        raise UserError(str(why))
    return left


def rank_pixels(args, network, x, target):
    """Make the maps of all methods; where some share a mean, each counts as if it were alone.

    :return: by method the map, (H, W), the seconds, and the images evaluated
    :rtype: dict[str, tuple[torch.Tensor, float, int]]
    """
    found = {}
    shared = {}  # means over noisy copies, and what they cost
    evaluations = []
    counter = network.register_forward_pre_hook(lambda _, x: evaluations.append(len(x[0])))
    try:
        for name in args.methods:
            method = METHODS[name]
            smooth = isinstance(method, Smooth)
            key = (method.explain, method.samples) if smooth else name
            if key not in shared:
                evaluations.clear()
                began = time.time()
                compute = method.average if smooth else method
                made = compute(network, x, target, make_rng(x.device, args.seed, 0))
                wait_for(x.device)
                count = sum(evaluations)
                if isinstance(made, Counted):
                    made, count = made
                shared[key] = (made, time.time() - began, count)
            made, seconds, count = shared[key]
            found[name] = (method.rank(made) if smooth else made, seconds, count)
    finally:
        counter.remove()
    return found


def check_sanity(args, network, x, target, other, found):
    """Make the checks that need many maps.

    :param torch.Tensor other: another class, (1,)
    :param dict found: as from :func:`rank_pixels`
    :return: by method, columns of the table
    :rtype: dict[str, dict]
    """
    rng = make_rng(x.device, args.seed, 1)
    moved = [rank_pixels(args, network, nudge(x, rng), target) for _ in range(2)]
    others = rank_pixels(args, network, x, other)
    cascade = []
    for stage in range(1, STAGES + 1):
        randomised = randomise(network, stage, make_rng("cpu", args.seed))
        cascade.append(rank_pixels(args, randomised, x, target))
    rows = {}
    for name, (heat, _, _) in found.items():
        pairs = [similarity(heat, maps[name][0]) for maps in cascade]
        rows[name] = {
            "sensitivity": max_sensitivity(heat, [maps[name][0] for maps in moved]),
            "other class": similarity(heat, others[name][0])[0],
            "random weights, rank": [rank for rank, _ in pairs],
            "random weights, SSIM": [ssim for _, ssim in pairs],
            "random weights": pairs[-1][0],
        }
    return rows


def explain_photo(classifier, args, folder, sanity, photo, stem):
    """Measure every method on one photo.

    :param bool sanity: whether to make the costly checks as well
    :param str photo: a file or ``sample:NAME``
    :param str stem: what the file of this photo's maps is called
    :return: its record in metrics.json
    :rtype: dict
    """
    started = time.time()
    network = classifier.network
    x = read_photo(photo, classifier).to(classifier.device)
    probabilities = predict(classifier, x, [photo])[0]
    ranked = probabilities.argsort(descending=True).tolist()
    label = ranked[0] if args.target is None else find_class(classifier.classes, args.target)
    target = torch.tensor([label], device=x.device)

    found = rank_pixels(args, network, x, target)
    fills = {"blur": smoothgrad.blur(x), "mean": x.mean((2, 3), keepdim=True).expand_as(x)}
    rows = {}
    arrays = {"photo": x[0].cpu().numpy()}
    for name, (heat, seconds, evaluations) in found.items():
        rows[name] = {"seconds": seconds, "evaluations": evaluations}
        rows[name].update(measure_curves(network, x, target, heat, fills))
        arrays[name] = heat.cpu().numpy().astype(np.float32)
    if sanity:
        second = ranked[1] if ranked[0] == label else ranked[0]
        other = torch.tensor([second], device=x.device)
        for name, row in check_sanity(args, network, x, target, other, found).items():
            rows[name].update(row)
    with replacing(folder / "maps" / f"{stem}.npz") as part:
        np.savez_compressed(part, **arrays)
    say(f"{photo}: {classifier.classes[label]} {probabilities[label]:.1%}")
    return {
        "path": photo,
        "target": label,
        "class_name": classifier.classes[label],
        "probability": float(probabilities[label]),
        "seconds": time.time() - started,
        "evaluations": sum(row["evaluations"] for row in rows.values()),
        "maps": f"maps/{stem}.npz",
        "methods": rows,
    }


def to_row(record):
    """Turn the record of a photo into a row of metrics.csv.

    :raises Exception: if the table and the plots can't be made of it: anybody may have written it
    """
    checked = any("random weights" in row for row in record["methods"].values())
    for row in record["methods"].values():
        curves = [row[f"{game} curve, {fill}"] for game in GAMES for fill in FILLS]
        np.array(curves, float).reshape(-1, STEPS + 1)
        if checked:
            cascade = [row[f"random weights, {kind}"] for kind in KINDS]
            np.array(cascade, float).reshape(-1, STAGES)
    summarise([record], COLUMNS)
    Path(record["maps"])
    columns = ("path", "target", "class_name", "probability", "seconds", "evaluations")
    return {name: record[name] for name in columns}


# ---------------------------------------------------------------------------- the table, the plots


def summarise(images, columns):
    """Average the metrics over photos.

    :param list[dict] images: the photos' records, each with "methods": metrics by method
    :param list[str] columns: which metrics; a photo may lack some, and all but the first methods
    :return: by method, by column, the mean, its standard error and the number of photos
    :rtype: dict[str, dict[str, tuple[float, float, int]]]
    """
    table = {}
    for name in images[0]["methods"]:
        rows = [image["methods"][name] for image in images if name in image["methods"]]
        table[name] = {}
        for column in columns:
            values = np.array([row[column] for row in rows if column in row], dtype=float)
            if len(values):
                error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
                table[name][column] = (float(values.mean()), float(error), len(values))
    return table


def to_markdown(table, columns, blind=()):
    """Write the means as Markdown, the best of each column in bold.

    Maps that are blind to the network can't win: that they never change is no merit.

    :param dict table: as from :func:`summarise`
    :param dict[str, str] columns: for each metric which end is the good one, "low" or "high"
    :param tuple[str] blind: methods that can't win
    :return: the table's lines
    :rtype: list[str]
    """
    present = [c for c in columns if c in next(iter(table.values()))]
    best = {}
    for column in present:
        means = [row[column][0] for name, row in table.items() if name not in blind]
        best[column] = (max if columns[column] == "high" else min)(means, default=None)
    lines = ["| method | " + " | ".join(present) + " |", "|---" * (len(present) + 1) + "|"]
    for name, row in table.items():
        cells = []
        for column in present:
            mean, error, count = row[column]
            text = f"{mean:.3f} ± {error:.3f}" if count > 1 else f"{mean:.3f}"
            text = f"{mean:.0f}" if column == "evaluations" else text
            won = name not in blind and mean == best[column]
            cells.append(f"**{text}**" if won else text)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def write_tables(folder, table, columns, blind=()):
    """Write the means as Markdown, see :func:`to_markdown`, and as CSV; print them.

    :param pathlib.Path folder: the run folder
    :param dict table: as from :func:`summarise`
    :param dict[str, str] columns: for each metric which end is the good one, "low" or "high"
    :param tuple[str] blind: methods that can't win
    """
    lines = to_markdown(table, columns, blind)
    with replacing(folder / "table.md") as part:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = []
    for name, cells in table.items():
        row = {"method": name}
        for column, (mean, error, count) in cells.items():
            row.update({column: mean, f"{column} error": error, f"{column} n": count})
        rows.append(row)
    write_csv(folder / "table.csv", rows)
    print("\n".join(lines))
    high = [column for column, end in columns.items() if end == "high"]
    print(f"high is good in {', '.join(high)}, low in the others; {', '.join(blind)} are blind to "
          "the network and can't win")  # fmt: skip


def draw_curves(path, images):
    """Draw each method's mean deletion and insertion curve; atomically.

    :param pathlib.Path path: the PNG file
    :param list[dict] images: the records of compare_explanations.py
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    for axes, game in zip(figure.subplots(1, 2, sharey=True), GAMES, strict=True):
        for i, name in enumerate(images[0]["methods"]):
            keys = [f"{game} curve, {fill}" for fill in FILLS]
            curves = [image["methods"][name][key] for image in images for key in keys]
            fraction = np.linspace(0, 1, len(curves[0]))
            style = ("-", "--", ":")[i // 10]
            axes.plot(fraction, np.mean(curves, 0), style, label=name, color=f"C{i % 10}")
        axes.set(xlabel=f"fraction of the pixels, {game}", ylabel="probability of the class")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save_figure(path, figure)


def draw_cascade(path, images):
    """Draw how alike maps stay while more and more layers get random weights; atomically.

    :param pathlib.Path path: the PNG file
    :param list[dict] images: the records of compare_explanations.py; only those with the check
    """
    images = [i for i in images if any("random weights" in m for m in i["methods"].values())]
    if not images:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), KINDS, strict=True):
        for i, name in enumerate(images[0]["methods"]):
            lines = [image["methods"][name][f"random weights, {kind}"] for image in images]
            mean = [1, *np.mean(lines, 0)]
            style = ("-", "--", ":")[i // 10]
            axes.plot(np.linspace(0, 1, len(mean)), mean, style, marker=".", label=name,
                      color=f"C{i % 10}")  # fmt: skip
        axes.set(xlabel="fraction of the layers that is random, from the top",
                 ylabel=f"similarity to the true map: {kind}")  # fmt: skip
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save_figure(path, figure)


def map_sheet(path, files):
    """Show photos in columns and the maps of each method in rows; atomically.

    :param pathlib.Path path: the PNG file
    :param dict[pathlib.Path, str] files: captions by .npz file, whose "photo" is (C, H, W) in
        [0, 1] and whose other arrays are maps, (H, W)
    """
    from matplotlib.figure import Figure

    photos = [read_arrays(file) for file in files]
    names = [name for name in photos[0] if name != "photo"]
    for file, arrays in zip(files, photos, strict=True):
        kinds = {name: (array.ndim, array.dtype.kind) for name, array in arrays.items()}
        wanted = {"photo": (3, "f"), **dict.fromkeys(names, (2, "f"))}
        if kinds != wanted or len(arrays["photo"]) not in (1, 3):
            raise UserError(f"{file} holds other arrays than the first one: start a new run")
    blocks = max(1, round((len(names) / (len(photos) + 1.3)) ** 0.5))  # nearly a square
    rows = -(-len(names) // blocks)
    figure = Figure(figsize=(blocks * (len(photos) + 1.5), rows + 1.4), layout="constrained")
    for i, block in enumerate(figure.subfigures(1, blocks, squeeze=False)[0]):
        grid = block.subplots(rows + 1, len(photos), squeeze=False)
        some = ["photo", *names[i * rows : (i + 1) * rows]]
        for line, name in zip(grid, some, strict=False):  # the last block may have fewer
            for axes, arrays in zip(line, photos, strict=True):
                values = arrays[name]
                if name == "photo":
                    axes.imshow(values.transpose(1, 2, 0).squeeze(), cmap="gray")
                else:
                    high = np.percentile(values, 99)
                    axes.imshow(values, cmap="inferno", vmin=values.min(), vmax=high)
                axes.set(xticks=[], yticks=[])
            label = name.replace(", ", ",\n").replace(" Back", "\nBack")
            line[0].set_ylabel(label, fontsize=7, rotation=0, ha="right", va="center")
        for axes in grid[len(some) :].flat:
            axes.set_visible(False)
        for axes, caption in zip(grid[0], files.values(), strict=True):
            axes.set_title(to_line(caption, 30), fontsize=7, parse_math=False)
    save_figure(path, figure)


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
    group.add_argument("--image", nargs="+", metavar="PATH",
                       default=[f"sample:{name}" for name in SAMPLES],
                       help="pictures, or folders of them; sample:coffee, :cat, :rocket and "
                            ":astronaut (default: these four) need no file")

    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="NAME",
                       help="any of torchvision.models, timm/NAME, a run of train_classifier.py "
                            "or, with --arch, a file of weights (default: efficientnet_lite0, "
                            "which needs no download)")
    group.add_argument("--arch", metavar="NAME",
                       help="whose weights the file --model holds: any of torchvision.models, or "
                            "timm/NAME")
    group.add_argument("--classes", metavar="NAMES",
                       help="with --arch, names of the classes: a file with one a line, or a,b,c")
    group.add_argument("--target", help="class to explain, index or name (default: the top one)")

    group = parser.add_argument_group("method")
    group.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS),
                       metavar="NAME", help=f"{'; '.join(METHODS)} (default: all)")
    group.add_argument("--sanity", type=number(int, 0), default=4, metavar="N",
                       help="photos, from the first one on, on which the checks are made that need "
                            "many maps: sensitivity, random weights, another class "
                            "(default: %(default)s)")
    group.add_argument("--seed", type=seed_int, default=0,
                       help="same seed, same machine, same result (default: %(default)s)")
    group.add_argument("--cuda", action="store_true", help="use the GPU, if there is one")
    group.add_argument("--device", metavar="NAME", help="any other device: mps, xpu, cuda:1")

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
    started = time.time()
    parser = get_parser()
    args = parser.parse_args(argv)
    if args.resume:
        args = resume_args(parser, argv, load_arguments(args.resume, SCRIPT), CHANGEABLE_ON_RESUME)
    elif args.dry_run:
        args.image = args.image[:1]
        args.sanity = 1
        args.methods = ["random", "gradient", "Grad-CAM"]
    photos = find_photos(args.image)
    device = set_up(args.cuda, args.seed, args.device)
    if args.arch:
        classifier = load_weights(args.model, args.arch, args.classes, device)
    else:
        classifier = load_classifier(args.model, device)
    classifier = check_classifier(classifier)
    if args.target is not None:
        find_class(classifier.classes, args.target)  # a mistake in it is no single photo's fault
    folder = open_run(SCRIPT, args.out, args.resume)
    save_arguments(folder, SCRIPT, args)
    (folder / "maps").mkdir(exist_ok=True)  # whichever process is first
    example = torch.rand(1, classifier.channels, classifier.size, classifier.size).to(device)
    args.methods = leave_out(args.methods, classifier.network, example)
    checked = set(photos[: args.sanity])

    def explain(pairs):
        ((photo, stem),) = pairs
        return [explain_photo(classifier, args, folder, photo in checked, photo, stem)]

    with interruptible(SCRIPT, folder):
        images, failed = explain_photos(photos, folder, explain, check=to_row)
    if not is_first():
        return {}
    found = {"images": images, "failed": failed}
    write_csv(folder / "metrics.csv", [to_row(image) for image in images])
    if images:
        found["table"] = summarise(images, COLUMNS)
        write_tables(folder, found["table"], COLUMNS, BLIND)
        draw_curves(folder / "curves.png", images)
        draw_cascade(folder / "random_weights.png", images)
        shown = {folder / image["maps"]: image["class_name"] for image in images[:8]}
        map_sheet(folder / "contact_sheet.png", shown)
        print(f"look at  {folder}/contact_sheet.png, curves.png and table.md")
    metrics = write_metrics(folder, args, argv, started, device, script=SCRIPT,
                            model=classifier.name, dataset=f"{len(images)} photos",
                            **found)  # fmt: skip
    report_failures(failed, len(photos))
    return metrics


if __name__ == "__main__":
    sys.exit(exit_code(main))
