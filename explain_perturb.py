"""Learn what to delete from a photo so that a classifier misses its class.

Meaningful Perturbation (Fong & Vedaldi 2017, arXiv 1704.03296) learns a mask
m: where it is 1 the photo x stays, where it is 0 a reference r (its blur,
noise, one colour) takes its place. With S the score of the class, the game of
deletion is

    min_m  l1 mean(1 - m) + l2 mean|grad m|^b + E_tau[S(z)]
    z = m x(. + tau) + (1 - m) r

In the game of preservation as little of the photo as possible has to keep S.

    python explain_perturb.py --image sample:coffee

The deleted area then depends on l1 and l2. Fong, Patrick & Vedaldi (2019,
arXiv 1910.08485) fix the area instead and learn a mask for each of several
areas: --regularizer area. Our default, nested, learns one map s, whose level
sets are the masks of all areas a:

    1 - m_a = sigmoid(s - q_a), with the threshold q_a so that mean(1 - m_a) = a

Each step draws some areas, deletes one half of them and keeps the other half,
which counts half as much. The result ranks the photo's parts; reported is the
smallest area that takes 95 % of the class's probability (--suppress). The map
s is the sum of maps of 28, 14, 7 and 3 cells a side, so that few steps move
large parts: with one map alone, half as much again is deleted.

A photo takes two seconds on two cores of an AMD EPYC, four on those of an
Intel Xeon, for 100 images evaluated. In a notebook:

    mask = learn_mask(network, x, target, reference="blur")  # 1 keeps

Differences from the paper: masks are sigmoids, as L-BFGS needs; the score is
log odds, as a probability near 1 has no gradient; l1 and l2 weigh means, not
sums.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import common  # isort: skip # noqa: F401 (Ctrl-C while torch is imported: one line)

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.nn import functional as F
from tqdm import tqdm

from common.classifiers import find_class, load_classifier
from common.device import fit_memory, is_first, make_rng, set_up
from common.errors import UserError, exit_code, interruptible, number, positive_int, seed_int
from common.fast import QuickAdam, captured
from common.images import (
    add_caption,
    add_title,
    contact_sheet,
    gaussian_blur,
    get_font,
    lay_over,
    magnify,
    save_gif,
    save_png,
    side_by_side,
    to_colours,
    to_grey,
    to_line,
    to_pixels,
)
from common.networks import check_classifier, eval_mode, load_weights
from common.photos import (
    explain_photos,
    find_photos,
    load_arguments,
    predict,
    read_photo,
    report_failures,
    save_arguments,
    say,
)
from common.run import open_run, replacing, resume_args, write_csv, write_metrics

SCRIPT = Path(__file__).stem
SEEN = 0.01  # the probability from which on a network sees a class
FRACTIONS = (0.8, 0.9, 0.95, 0.99)  # of the probability: the areas that take them are reported
STEPS = {"nested": 25, "area": 80, "tv": 25}  # by regularizer
LEARNING_RATES = {"nested": 1.0, "area": 0.5, "tv": 1.0}
CHANGEABLE_ON_RESUME = {"image", "cuda", "device", "batch", "resume"}


class Settings(NamedTuple):
    """How masks are learned; areas are fractions of the photo, lengths are in pixels of 224."""

    regularizer: str = "nested"  # or "area" (2019), "tv" (2017)
    game: str = "both"  # or "deletion", "preservation"
    score: str = "odds"  # or "probability", "logit": what deletion lowers, preservation raises
    reference: str = "blur"  # or "mean", "noise": what takes the place of what is deleted
    blur: float = 10.0  # sigma of the blur
    mask_size: int = 28  # cells a side of the finest map
    jitter: int = 4  # the photo is shifted under the mask by less than that
    areas: tuple = (0.1, 0.2, 0.4, 0.6, 0.8)  # nested draws areas between the smallest and largest
    keep_weight: float = 0.5  # both: how much preservation counts, where deletion counts 1
    l1: float = 2.0  # tv: weight of the deleted area
    l2: float = 1.0  # tv: weight of the total variation
    beta: float = 3.0  # tv: its exponent
    area_weight: float = 300.0  # area: weight of the distance from the wanted area
    pictures: int = 4  # nested and tv: perturbed pictures of a photo in a step
    optimizer: str = "adam"  # or "lbfgs"
    iterations: int | None = None  # steps; None for STEPS
    lr: float | None = None  # None for LEARNING_RATES, with L-BFGS 1
    suppress: float = 0.95  # the fraction of the probability that the answer has to take
    seed: int = 0


# -------------------------------------------------------------------------------- regions of a map


def start_maps(n, count, side, device):
    """Return the parameters to start from: no cell is better than another.

    :param int n: photos
    :param int count: regions of each
    :param int side: cells a side of the finest map
    :return: maps of side, side / 2, ... cells a side, down to 3 or 2, (n, count, s, s) each
    :rtype: list[torch.Tensor]
    """
    sides = [side >> k for k in range(side.bit_length() - 1)]
    return [torch.zeros(n, count, s, s, device=device, requires_grad=True) for s in sides]


def sum_levels(maps):
    """Add up maps, (N, K, s, s) each, the coarse ones enlarged: (N, K, S, S), S the largest s."""
    side = maps[0].shape[-1]
    return sum(F.interpolate(m, (side, side), mode="bilinear") for m in maps)


def level_sets(values, areas):
    """Cut a map s into nested regions, the softened sets of its largest values.

    :param torch.Tensor values: s, (N, 1, S, S)
    :param torch.Tensor areas: a, what the mean of each region has to be, (K,)
    :return: sigmoid(s - q_a), (N, K, S, S)
    :rtype: torch.Tensor
    """
    areas = areas.view(1, -1, 1, 1)
    with torch.no_grad():  # the threshold q, by bisection
        low = values.amin((2, 3), keepdim=True) - areas.logit().clamp_min(0)
        high = values.amax((2, 3), keepdim=True) - areas.logit().clamp_max(0)
        for _ in range(30):
            q = (low + high) / 2
            above = (values - q).sigmoid().mean((2, 3), keepdim=True) > areas
            low, high = torch.where(above, q, low), torch.where(above, high, q)
        soft = (values - q).sigmoid()
        slope = (soft * (1 - soft)).mean((2, 3), keepdim=True).clamp_min(1e-12)
    # A step of Newton's method, which hardly moves q, gives it the derivative of the true one.
    mean = (values - q).sigmoid().mean((2, 3), keepdim=True)
    return (values - q - (mean - areas) / slope).sigmoid()


def smooth_max(masks, radius=2, temperature=0.05):
    """Give each cell the softened maximum of its surroundings: nothing is smaller than a disc.

    :param torch.Tensor masks: in [0, 1], (N, K, s, s)
    :param int radius: of the disc, in cells, whose weight falls to its rim
    :param float temperature: 0 would be the maximum itself
    :return: (N, K, s, s)
    :rtype: torch.Tensor
    """
    place = torch.arange(-radius, radius + 1, device=masks.device)
    squared_distance = place.view(-1, 1) ** 2 + place.view(1, -1) ** 2
    disc = (1 - squared_distance / (radius + 1) ** 2).clamp_min(0).sqrt()
    near = F.unfold(masks.flatten(0, 1).unsqueeze(1), len(disc), padding=radius)
    near = near * disc.to(masks.dtype).view(-1, 1)  # (N K, cells of the disc, s^2)
    return ((near / temperature).softmax(1) * near).sum(1).view(masks.shape)


def total_variation(masks, beta):
    """Average |m - next m|^beta over neighbours within the mask: (..., s, s) to (...)."""
    down = masks.diff(dim=-2).abs() ** beta
    across = masks.diff(dim=-1).abs() ** beta
    return down.mean((-2, -1)) + across.mean((-2, -1))


def area_penalty(masks, areas):
    """Compare the sorted values of masks with those of a binary mask of the right area.

    :param torch.Tensor masks: in [0, 1], (N, K, s, s)
    :param torch.Tensor areas: (K,)
    :return: mean squared differences, (N, K)
    :rtype: torch.Tensor
    """
    values = masks.flatten(2).sort(dim=2).values
    n = values.shape[2]
    ones = (areas * n).round().view(-1, 1)  # how many cells of each mask should be 1
    wanted = torch.arange(n, device=masks.device) >= n - ones
    return ((values - wanted.to(masks.dtype)) ** 2).mean(2)


def enlarge(masks, size):
    """Enlarge masks from cells to pixels: each pixel a Gaussian mean (0.6 cells) of the cells.

    :param torch.Tensor masks: (..., s, s)
    :param int size: in pixels
    :return: (..., size, size), smooth whatever the cells hold
    :rtype: torch.Tensor
    """
    cells = masks.shape[-1]
    pixels = (torch.arange(size, device=masks.device) + 0.5) * cells / size
    centres = torch.arange(cells, device=masks.device) + 0.5
    distance = pixels.view(-1, 1) - centres.view(1, -1)  # (size, s)
    weights = torch.softmax(-((distance / 0.6) ** 2) / 2, dim=1).to(masks.dtype)
    return weights @ masks @ weights.T


# ------------------------------------------------------------------- what takes the photo's place


def make_reference(kind, x, sigma, rng):
    """Make what takes the place of what is deleted.

    :param str kind: "blur"; "mean", the photo's mean colour; or "noise" about that colour
    :param torch.Tensor x: photos, (N, C, H, W)
    :param float sigma: of the blur, in pixels
    :param torch.Generator rng: for the noise, the same for all photos
    :return: (N, C, H, W)
    :rtype: torch.Tensor
    """
    if kind == "blur":
        return gaussian_blur(x, sigma)
    mean = x.mean((2, 3), keepdim=True).expand_as(x)
    if kind == "mean":
        return mean
    noise = torch.randn(x.shape[1:], generator=rng, device=x.device) * 0.2
    return (mean + noise).clamp(0, 1)


def class_score(logits, target, score="odds", floor=0.02):
    """Return each picture's class score S.

    :param torch.Tensor logits: (N, classes)
    :param torch.Tensor target: class indices, (N,)
    :param str score: "logit"; "probability", without a gradient near 1 and 0; "odds", the logarithm
        of its odds, which has one
    :param float floor: of the odds: this near to 0 or 1, a probability has little left to win
    :return: (N,)
    :rtype: torch.Tensor
    """
    values = logits if score == "logit" else logits.softmax(1)
    chosen = values.gather(1, target.view(-1, 1)).squeeze(1)
    if score == "odds":
        return ((chosen + floor) / (1 - chosen + floor)).log()
    return chosen


class Draw(NamedTuple):
    """What is random in a step. The same for all photos, so that a batch changes no result.

    ``shifts`` of the photo under the mask, up and left for each of P pictures, in pixels, (P, 2);
    ``areas``, (P,); ``area_weight``, (), which grows.
    """

    shifts: torch.Tensor
    areas: torch.Tensor
    area_weight: torch.Tensor


class Game:
    """Deletion, preservation, or both, of N photos, each on its own.

    A region u is 1 where the class is. Deletion puts the reference there, m = 1 - u, and lowers the
    score; preservation puts it everywhere else, m = u, and raises the score. A step looks at P
    pictures of each photo; in the game "both" every other one is preserved.

    :param torch.nn.Module network: from images to logits; left as it is, also after an error
    :param torch.Tensor x: photos, (N, C, H, W), in [0, 1]
    :param torch.Tensor target: class indices, (N,)
    :param Settings settings: how masks are learned
    :param torch.Generator rng: for what is random; None for one of settings.seed
    """

    def __init__(self, network, x, target, settings, rng=None):
        self.network = network
        self.x = x
        self.target = target
        self.settings = settings
        self.size = x.shape[-1]
        self.rng = rng or make_rng(x.device, settings.seed)
        sigma = settings.blur * self.size / 224
        self.reference = make_reference(settings.reference, x, sigma, self.rng)
        self.areas = torch.tensor(settings.areas, device=x.device)
        both = settings.game == "both"
        self.pictures = settings.pictures
        if settings.regularizer == "area":  # a mask for each area, and each game has its turn
            self.pictures = len(settings.areas) * (2 if both else 1)
        self.keeps = torch.full((self.pictures,), settings.game == "preservation", device=x.device)
        if both:
            self.keeps[1::2] = True
        # The areas reported are those of deletion: it counts more than preservation.
        keep_weight = settings.keep_weight if both else 1.0
        self.weights = torch.where(self.keeps, -keep_weight, 1.0)
        self.jitter = max(1, round(settings.jitter * self.size / 224))
        pair = torch.cat([x, self.reference], 1)
        self.padded = F.pad(pair, (0, self.jitter - 1, 0, self.jitter - 1), "replicate")

    def draw(self, progress=1.0):
        """Draw what is random in a step.

        :param float progress: 1 in the last step
        :rtype: Draw
        """
        on = {"generator": self.rng, "device": self.x.device}
        shifts = torch.randint(self.jitter, (self.pictures, 2), **on)
        # From small to large on a logarithmic scale, an area from each stratum: small and large
        # ones have their turn in every step, and in both games.
        games = 2 if self.settings.game == "both" else 1
        stratum = torch.arange(self.pictures, device=self.x.device) // games
        strata = -(-self.pictures // games)
        place = stratum + torch.rand(self.pictures, **on)
        low = self.areas[0].log()
        high = self.areas[-1].log()
        areas = (low + (high - low) * place / strata).exp()
        # Masks of the right area from the start never find the class: the area comes to count.
        weight = areas.new_full((), self.settings.area_weight * progress**2)
        return Draw(shifts, areas, weight)

    def perturb(self, m, shifts):
        """Put the reference where m is 0: z = m x(. + tau) + (1 - m) r(. + tau).

        :param torch.Tensor m: (N, P, H, W)
        :param torch.Tensor shifts: tau, of each of the P pictures, (P, 2)
        :return: (N, P, C, H, W)
        :rtype: torch.Tensor
        """
        # All shifts, as a view: (N, 2 C, jitter, jitter, H, W). Shifts on a GPU stay there.
        windows = self.padded.unfold(2, self.size, 1).unfold(3, self.size, 1)
        shifted = windows[:, :, shifts[:, 0], shifts[:, 1]].transpose(1, 2)
        x, reference = shifted.chunk(2, 2)  # (N, P, C, H, W) each
        return torch.lerp(reference, x, m.unsqueeze(2))

    def value(self, regions, draw):
        """Return the mean of S(z) over the pictures, of preserved ones with a minus.

        :param torch.Tensor regions: u, (N, K, s, s), K a divisor of P
        :param Draw draw: as from :meth:`draw`
        :return: (N,)
        :rtype: torch.Tensor
        """
        u = regions.repeat_interleave(self.pictures // regions.shape[1], 1)  # (N, P, s, s)
        m = enlarge(torch.where(self.keeps.view(-1, 1, 1), u, 1 - u), self.size)
        z = self.perturb(m, draw.shifts).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        with eval_mode(self.network):
            logits = self.network(z)
        target = self.target.repeat_interleave(self.pictures)
        scores = class_score(logits, target, self.settings.score)
        return (scores.view(-1, self.pictures) * self.weights).mean(1)


# --------------------------------------------------------------------------- the three objectives


def objective_2017(game, maps, draw):
    """l1 mean(u) + l2 mean|grad u|^beta + E_tau[S(z)], with u = 1 - m; for each photo, (N,)."""
    settings = game.settings
    u = sum_levels(maps).sigmoid()  # (N, 1, s, s)
    score = game.value(u, draw)
    roughness = total_variation(u, settings.beta).squeeze(1)
    area = u.mean((2, 3)).squeeze(1)
    return settings.l1 * area + settings.l2 * roughness + score


def objective_2019(game, maps, draw):
    """S(z) + weight |sort(u) - (0 ... 0 1 ... 1)|^2, a mask u for each area; for each photo."""
    u = smooth_max(sum_levels(maps).sigmoid())  # (N, K, s, s)
    return game.value(u, draw) + draw.area_weight * area_penalty(u, game.areas).mean(1)


def objective_nested(game, maps, draw):
    """E_{a, tau}[S(z)], with the level sets of one map; for each photo."""
    u = level_sets(sum_levels(maps), draw.areas)  # (N, P, s, s)
    return game.value(u, draw)


OBJECTIVES = {"nested": objective_nested, "area": objective_2019, "tv": objective_2017}


def find_regions(maps, settings, areas):
    """Turn learned maps into regions u, (N, K, s, s); nested ones have the areas given, (K,)."""
    values = sum_levels(maps)
    if settings.regularizer == "nested":
        return level_sets(values, areas)
    if settings.regularizer == "area":
        return smooth_max(values.sigmoid())
    return values.sigmoid()


def minimise(game):
    """Minimise the objective of each photo, step by step.

    Photos share no parameters, so that the sum of their objectives has the minima of each.

    :param Game game: what is minimised
    :return: after each step: the maps, changed in place, and the objectives, (N,), of each
        evaluation in the step; Adam has one, L-BFGS some
    :rtype: Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]
    :raises UserError: if the maps become infinite
    """
    settings = game.settings
    objective = OBJECTIVES[settings.regularizer]
    steps = settings.iterations or STEPS[settings.regularizer]
    count = len(settings.areas) if settings.regularizer == "area" else 1
    maps = start_maps(len(game.x), count, settings.mask_size, game.x.device)
    optimizer = make_optimizer(maps, settings)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def differentiate(shifts, areas, area_weight, *maps):
        with torch.enable_grad():
            value = objective(game, maps, Draw(shifts, areas, area_weight))
            return value.detach(), *torch.autograd.grad(value.sum(), maps)

    def evaluate(draw, values):
        value, *gradients = differentiate(*draw, *maps)
        for m, gradient in zip(maps, gradients, strict=True):
            m.grad = gradient
        values.append(value.clone())  # where it lies, a graph writes the next one
        return value.sum()

    for step in range(1, steps + 1):
        draw = game.draw(step / steps)  # once a step: a line search compares values
        if step == 1:
            differentiate = captured(differentiate, *draw, *maps)
        values = []
        optimizer.step(partial(evaluate, draw, values))
        schedule.step()
        if not torch.cat([m.flatten() for m in maps]).isfinite().all():
            raise UserError("the mask is no longer finite: choose a smaller --lr, or adam")
        yield maps, values


def make_optimizer(maps, settings):
    """Make Adam, or L-BFGS with a line search, which takes one photo at a time."""
    if settings.optimizer == "lbfgs":
        lr = settings.lr or 1.0
        return torch.optim.LBFGS(maps, lr, max_iter=5, line_search_fn="strong_wolfe")
    lr = settings.lr or LEARNING_RATES[settings.regularizer]
    return QuickAdam(maps, lr, betas=(0.8, 0.99))


# --------------------------------------------------------------------------------------- the answer


class Tried(NamedTuple):
    """K regions of one photo, tried on pictures as they will be saved."""

    regions: torch.Tensor  # u, (K, H, W)
    masks: torch.Tensor  # m, (K, H, W)
    pictures: torch.Tensor  # uint8 values, (K, C, H, W)
    left: torch.Tensor  # probability of the class, (K,)


@torch.no_grad()
def try_regions(game, i, u):
    """Delete regions u, (K, s, s), of photo i, or keep nothing else, and look at the probability.

    :rtype: Tried
    """
    u = enlarge(u, game.size)
    m = u if game.settings.game == "preservation" else 1 - u
    pictures = (torch.lerp(game.reference[i], game.x[i], m.unsqueeze(1)) * 255).round()
    with eval_mode(game.network):
        logits = torch.cat([game.network(some / 255) for some in pictures.split(8)])
    return Tried(u, m, pictures, logits.softmax(1)[:, game.target[i]])


class Answer(NamedTuple):
    """The smallest region of one photo that is enough."""

    mask: torch.Tensor  # m, (H, W), 1 keeps, 0 deletes
    ranking: torch.Tensor  # of the pixels, (H, W), large where the class is
    picture: torch.Tensor  # the masked photo, uint8, (C, H, W)
    facts: dict  # what metrics.json says


@torch.no_grad()
def find_answer(game, i, maps, before):
    """Find the smallest region that is enough for photo i.

    :param Game game: that was played
    :param int i: the photo
    :param list[torch.Tensor] maps: what was learned, (N, K, s, s) each
    :param float before: the class's probability in the photo
    :rtype: Answer
    """
    settings = game.settings
    own = [m[i : i + 1] for m in maps]

    def enough(left, fraction):
        if settings.game == "preservation":
            return left >= fraction * before
        return left <= (1 - fraction) * before

    areas = torch.linspace(0.1, 0.98, 24, device=game.x.device) ** 2
    tried = try_regions(game, i, find_regions(own, settings, areas)[0])
    ranking = tried.regions.mean(0)
    first = int(enough(tried.left, settings.suppress).int().argmax())
    if first and settings.regularizer == "nested":  # a closer look below the first that is enough
        closer = torch.linspace(*areas[first - 1 : first + 1].tolist(), 9, device=areas.device)
        between = try_regions(game, i, find_regions(own, settings, closer[1:-1])[0])
        pairs = zip(tried, between, strict=True)
        tried = Tried(*(torch.cat([a[:first], b, a[first:]]) for a, b in pairs))

    areas = tried.regions.mean((1, 2))
    smallest = {}
    for fraction in sorted({*FRACTIONS, settings.suppress}):
        ok = enough(tried.left, fraction)
        smallest[fraction] = int(areas.where(ok, torch.inf).argmin()) if ok.any() else None
    best = smallest[settings.suppress]
    reached = best is not None
    if not reached:
        keeping = settings.game == "preservation"
        best = int(tried.left.argmax() if keeping else tried.left.argmin())
    deleted = 1 - tried.masks.mean((1, 2))
    facts = {
        "probability_after": float(tried.left[best]),
        "area": float(1 - tried.masks[best].mean()),
        "reached": reached,
        "smallest_areas": {
            f"{100 * fraction:g}%": None if k is None else float(areas[k])
            for fraction, k in smallest.items()
        },
        "curve": torch.stack([deleted, tried.left], 1).tolist(),  # probability over deleted area
    }
    return Answer(tried.masks[best], ranking, tried.pictures[best].byte(), facts)


def learn_mask(network, x, target, **settings):
    """Learn, for each photo, the smallest mask that takes the class.

    :param torch.nn.Module network: from images to logits; left as it is, also after an error
    :param torch.Tensor x: photos, (N, C, H, W), in [0, 1]
    :param torch.Tensor target: class indices, (N,)
    :param settings: any of :class:`Settings`, for example reference="mean"
    :return: m, (N, H, W), in [0, 1]: 1 keeps, 0 deletes
    :rtype: torch.Tensor
    """
    game = Game(network, x, target, Settings(**settings))
    *_, (maps, _) = minimise(game)
    with torch.no_grad(), eval_mode(network):
        before = network(x).softmax(1).gather(1, target.view(-1, 1)).squeeze(1).tolist()
    answers = [find_answer(game, i, maps, before[i]) for i in range(len(x))]
    return torch.stack([answer.mask for answer in answers])


# --------------------------------------------------------------------------------- group by group


def explain_group(classifier, args, settings, folder, pairs):
    """Explain some photos at once, and write their pictures.

    :param Settings settings: how masks are learned
    :param list[tuple[str, str]] pairs: photos, and what their files are called
    :return: their records in metrics.json
    :rtype: list[dict]
    """
    network = classifier.network
    x = [read_photo(photo, classifier) for photo, _ in pairs]
    started = time.time()
    x = torch.cat(x).to(classifier.device)
    probabilities = predict(classifier, x, [photo for photo, _ in pairs])
    target = probabilities.argmax(1)
    if args.target is not None:
        target[:] = find_class(classifier.classes, args.target)
    before = probabilities.gather(1, target.view(-1, 1)).squeeze(1).tolist()

    game = Game(network, x, target, settings)
    history = []
    frames = [[] for _ in pairs]
    evaluations = 0
    steps = settings.iterations or STEPS[settings.regularizer]
    hidden = not is_first() or None  # None: hidden where there is no terminal
    for maps, values in tqdm(minimise(game), total=steps, leave=False, disable=hidden):
        evaluations += len(values) * game.pictures
        history.append((evaluations, values[0]))
        for i in range(len(pairs) if args.gif else 0):
            frames[i].append(draw_frame(game, i, maps, evaluations))
    answers = [find_answer(game, i, maps, before[i]) for i in range(len(pairs))]

    seconds = round((time.time() - started) / len(pairs), 2)
    # Read at the end: a GPU that is asked for a number waits for the next step.
    traces = [(n, value.tolist()) for n, value in history]
    records = []
    for i, (photo, stem) in enumerate(pairs):
        record = {
            "path": photo,
            "panel": f"{stem}_panel.png",
            "target": int(target[i]),
            "class_name": classifier.classes[target[i]],
            "probability": before[i],
            "seconds": seconds,
            "evaluations": evaluations,
            **answers[i].facts,
            "reached": answers[i].facts["reached"] and before[i] >= SEEN,
            "trace": [{"evaluations": n, "objective": value[i]} for n, value in traces],
        }
        write_pictures(folder, stem, x[i], answers[i], record)
        if frames[i]:
            save_gif(folder / f"{stem}.gif", frames[i], seconds=5)
        say(f"{photo}: {record['class_name']} {before[i]:.2%}, after the mask "
            f"{record['probability_after']:.2%}; deleted {record['area']:.1%}")  # fmt: skip
        if before[i] < SEEN:
            say(f"warning: {photo}: the network doesn't see {record['class_name']} here, so that "
                "there is nothing to delete", sys.stderr)  # fmt: skip
        elif not record["reached"]:
            say(f"warning: {photo}: no area is enough: try another --reference", sys.stderr)
        records.append(record)
    return records


@torch.no_grad()
def draw_frame(game, i, maps, evaluations):
    """Draw the regions of a photo while they are learned, uint8, (H, W, 3)."""
    u = find_regions([m[i : i + 1] for m in maps], game.settings, game.areas)[0]
    picture = to_grey(enlarge(u, game.size).mean(0))
    return add_caption(picture, f"{evaluations} evaluations")


def write_pictures(folder, stem, x, answer, record):
    """Write all pictures and the arrays of one photo.

    :param pathlib.Path folder: the run folder
    :param str stem: what the files are called
    :param torch.Tensor x: the photo, (C, H, W), in [0, 1]
    :param Answer answer: what was learned
    :param dict record: of metrics.json
    """
    mask = answer.mask.cpu()
    deleted = 1 - mask
    photo = x.cpu()
    perturbed = answer.picture.cpu()
    save_png(folder / f"{stem}_mask.png", to_grey(mask))
    as_rgb = np.broadcast_to(perturbed.permute(1, 2, 0).numpy(), (*mask.shape, 3))
    save_png(folder / f"{stem}_perturbed.png", as_rgb)
    save_png(folder / f"{stem}_overlay.png", lay_over(photo, deleted))
    draw_panel(folder / f"{stem}_panel.png", photo, deleted, perturbed / 255, record)
    with replacing(folder / f"{stem}.npz") as part:
        ranking = answer.ranking.cpu().numpy()
        np.savez(part, photo=photo.numpy(), mask=mask.numpy(), ranking=ranking)


def draw_panel(path, photo, deleted, perturbed, record):
    """Draw the photo, what was deleted from it, what is left, and probability against area.

    :param pathlib.Path path: the PNG file
    :param torch.Tensor photo: (C, H, W), in [0, 1]
    :param torch.Tensor deleted: 1 - m, (H, W), in [0, 1]
    :param torch.Tensor perturbed: (C, H, W), in [0, 1]
    :param dict record: of metrics.json: class_name, probability, probability_after, area, curve
    """
    name = to_line(record["class_name"], 30)
    before = add_title(to_pixels(photo), f"{name}, {record['probability']:.1%}")
    after = add_title(to_pixels(perturbed), f"{name}, {record['probability_after']:.2%}")
    colours = magnify(to_colours(deleted).round().astype(np.uint8))
    mask = add_title(np.hstack([colours, draw_key(len(colours))]), f"{record['area']:.1%} deleted")
    save_png(path, side_by_side([before, mask, after, draw_chart(record)]))


def draw_key(height):
    """Draw what the colours of a mask mean, uint8, (height, 70, 3)."""
    canvas = Image.new("RGB", (70, height), "white")
    colours = to_colours(torch.linspace(1, 0, height).view(-1, 1)).round().astype(np.uint8)
    canvas.paste(Image.fromarray(colours.repeat(12, 1)), (8, 0))
    draw = ImageDraw.Draw(canvas)
    for place, text, anchor in ((0, "deleted", "la"), (1, "kept", "ld")):
        draw.text((25, place * height), text, "black", get_font(11), anchor)
    return np.asarray(canvas)


def draw_chart(record, width=330, height=270):
    """Draw the class's probability against the deleted area, both from 0 to 1.

    :param dict record: as in :func:`draw_panel`
    :return: uint8, (height, width, 3)
    :rtype: numpy.ndarray
    """
    fine = 3  # drawn that much larger, then averaged: Pillow's lines have steps
    left, right, top, bottom = 52 * fine, (width - 14) * fine, 24 * fine, (height - 36) * fine
    canvas = Image.new("RGB", (width * fine, height * fine), "white")
    draw = ImageDraw.Draw(canvas)
    font = get_font(11 * fine)
    blue, orange, grey = "#1f77b4", "#ff7f0e", "#7f7f7f"

    def place(area, probability):
        return left + area * (right - left), bottom - probability * (bottom - top)

    def dot(x, y, radius, colour):
        r = radius * fine
        draw.ellipse([x - r, y - r, x + r, y + r], colour)

    draw.rectangle([left, top, right, bottom], outline="black", width=fine)
    for tick in (0, 0.2, 0.4, 0.6, 0.8, 1):
        x, y = place(tick, tick)
        draw.line([x, bottom, x, bottom + 4 * fine], "black", fine)
        draw.line([left - 4 * fine, y, left, y], "black", fine)
        draw.text((x, bottom + 6 * fine), f"{tick:g}", "black", font, "ma")
        draw.text((left - 6 * fine, y), f"{tick:g}", "black", font, "rm")
    draw.text(((left + right) / 2, height * fine), "deleted area", "black", font, "md")
    words = Image.new("L", (bottom - top, 14 * fine), 255)
    ImageDraw.Draw(words).text((words.width / 2, 0), "probability of the class", 0, font, "ma")
    canvas.paste(words.rotate(90, expand=True), (2 * fine, top))

    for i in range(0, 50, 2):
        dash = [*place(i / 50, record["probability"]), *place((i + 1) / 50, record["probability"])]
        draw.line(dash, grey, fine)
    curve = [place(area, probability) for area, probability in record["curve"]]
    draw.line([x for point in curve for x in point], blue, 2 * fine, "curve")
    for point in curve:
        dot(*point, 2.5, blue)
    dot(*place(record["area"], record["probability_after"]), 4.5, orange)

    line = 10 * fine  # the middle of the line of words above the chart
    dot(left + 6 * fine, line, 4.5, orange)
    draw.text((left + 16 * fine, line), "the mask shown", "black", font, "lm")
    draw.line([left + 130 * fine, line, left + 145 * fine, line], grey, fine)
    draw.text((left + 150 * fine, line), "the photo", "black", font, "lm")
    return np.asarray(canvas.reduce(fine))


def to_row(record):
    """Turn the record of a photo into a row of metrics.csv."""
    return {name: record[name] for name in ("path", "target", "class_name", "probability",
                                            "probability_after", "area", "reached", "seconds",
                                            "evaluations")}  # fmt: skip


# ------------------------------------------------------------------------------------ the script


# fmt: off
def get_parser():
    """Build the command line."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,  # so that an error is one line
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    defaults = Settings()
    weight = number(float, 0)
    fraction = number(float, 0.001, 0.999)
    group = parser.add_argument_group("data")
    group.add_argument("--image", nargs="+", default=["sample:coffee"], metavar="PATH",
                       help="pictures, or folders of them; sample:coffee (default), :cat, :rocket "
                            "and :astronaut need no file")

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
    group.add_argument("--regularizer", default=defaults.regularizer, choices=tuple(OBJECTIVES),
                       help="nested: one map for all areas; area: one mask for each (2019); tv: "
                            "weights --l1 and --l2 (2017) (default: %(default)s)")
    group.add_argument("--game", default=defaults.game,
                       choices=("deletion", "preservation", "both"),
                       help="delete little to lose the class, keep little to keep it, or both "
                            "(default: %(default)s)")
    group.add_argument("--score", default=defaults.score,
                       choices=("odds", "probability", "logit"),
                       help="what deletion lowers and preservation raises (default: %(default)s)")
    group.add_argument("--reference", default=defaults.reference,
                       choices=("blur", "mean", "noise"),
                       help="what takes the place of what is deleted (default: %(default)s)")
    group.add_argument("--areas", nargs="+", type=fraction, default=list(defaults.areas),
                       help="fractions of the photo; nested draws areas between the smallest and "
                            "the largest (default: 0.1 0.2 0.4 0.6 0.8)")
    group.add_argument("--suppress", type=fraction, default=defaults.suppress,
                       help="report the smallest area that takes this fraction of the probability "
                            "(preservation: keeps) (default: %(default)s)")
    group.add_argument("--mask-size", type=number(int, 2, 224), default=defaults.mask_size,
                       help="cells a side of the finest map (default: %(default)s)")
    group.add_argument("--jitter", type=number(int, 0, 64), default=defaults.jitter,
                       help="shift the photo under the mask by less than so many pixels of 224, "
                            "up and left (default: %(default)s)")
    group.add_argument("--l1", type=weight, default=defaults.l1,
                       help="tv: weight of the deleted area (default: %(default)s)")
    group.add_argument("--l2", type=weight, default=defaults.l2,
                       help="tv: weight of the total variation (default: %(default)s)")

    group = parser.add_argument_group("optimisation")
    group.add_argument("--optimizer", default=defaults.optimizer, choices=("adam", "lbfgs"),
                       help="lbfgs: with a line search, one photo at a time (default: %(default)s)")
    group.add_argument("--iterations", type=positive_int,
                       help="steps (default: 25; area: 80)")
    group.add_argument("--pictures", type=number(int, 2), default=defaults.pictures,
                       help="perturbed pictures of a photo in a step (default: %(default)s)")
    group.add_argument("--lr", type=number(float, 1e-12),
                       help="learning rate (default: 1; area: 0.5)")
    group.add_argument("--batch", type=positive_int, default=1,
                       help="photos at once (default: %(default)s)")
    group.add_argument("--seed", type=seed_int, default=defaults.seed,
                       help="same seed, same machine, same result (default: %(default)s)")
    group.add_argument("--cuda", action="store_true", help="use the GPU, if there is one")
    group.add_argument("--device", metavar="NAME", help="any other device: mps, xpu, cuda:1")

    group = parser.add_argument_group("output")
    group.add_argument("--out", help=f"new run folder (default: runs/{SCRIPT}/DATE-TIME)")
    group.add_argument("--resume", metavar="RUN", help="go on with the photos that a run lacks")
    group.add_argument("--gif", action="store_true", help="show the mask forming")
    group.add_argument("--dry-run", action="store_true", help="two steps, to see that all works")
    return parser
# fmt: on


def main(argv=None):
    """Explain every photo.

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
        args.iterations = 2
        args.pictures = 2
    args.areas = sorted(set(args.areas))
    settings = Settings(**{k: v for k, v in vars(args).items() if k in Settings._fields})
    if args.optimizer == "lbfgs" and args.batch > 1:
        raise UserError("--optimizer lbfgs takes one photo at a time: leave out --batch")
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
    batch = args.batch

    def explain(pairs):
        nonlocal batch  # where memory has run out, smaller for the rest of the photos
        records = []

        def explain_others(size):
            while len(records) < len(pairs):  # those that had room needn't be explained again
                group = pairs[len(records) :][:size]
                records.extend(explain_group(classifier, args, settings, folder, group))

        _, batch = fit_memory(explain_others, batch, "--batch")
        return records

    with interruptible(SCRIPT, folder):
        images, failed = explain_photos(photos, folder, explain, args.batch, to_row)
    if not is_first():
        return {}
    write_csv(folder / "metrics.csv", [to_row(record) for record in images])
    if len(photos) > 1:
        panels = {folder / record["panel"]: record["path"] for record in images}
        contact_sheet(folder / "contact_sheet.png", panels, columns=2, side=900)
        print(f"look at  {folder}/contact_sheet.png")
    elif images:
        print(f"look at  {folder}/{images[0]['panel']}")
    metrics = write_metrics(folder, args, argv, started, device, script=SCRIPT,
                            model=classifier.name, dataset=f"{len(images)} photos", images=images,
                            failed=failed)  # fmt: skip
    report_failures(failed, len(photos))
    return metrics


if __name__ == "__main__":
    sys.exit(exit_code(main))
