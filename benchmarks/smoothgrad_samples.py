"""How many samples does a SmoothGrad map need, and can better ones replace more of them?

    python benchmarks/smoothgrad_samples.py

Part 1, for each --reduce of smoothgrad.py: how the reliability of a map grows with the number n of
its samples. What smoothgrad.py estimates from the two halves of one map is put beside the truth,
the correlation of two independent maps of n samples each, and beside the agreement with a map of
800 others. As there, signed maps are compared with their signs, the others as drawn.

Part 2, tricks that make Monte Carlo sampling cheaper elsewhere. Each draws several independent maps
from as many gradients; from their correlation r follows how many plain samples they are worth,
since r / (1 - r) is proportional to n (Spearman and Brown, 1910). What is reported is the number of
gradients that gives the same reliability, plain sampling being 1. Smoothing the map is shown apart,
as it changes what is estimated.
"""

import argparse
import json
import math
import sys
from itertools import combinations, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.fft import idctn
from scipy.ndimage import gaussian_filter
from scipy.stats import chi2
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import smoothgrad
from common.classifiers import Normalise, load_classifier, load_lite0
from common.device import make_rng, set_up
from common.errors import exit_code, number
from common.images import save_figure
from common.photos import SAMPLES, find_photos, read_photo

CHUNK = 8  # copies at once
NOISE = 0.15  # sigma as a fraction of the photo's range
LEVELS = (0.9, 0.95, 0.99)  # of reliability, in the table
BLURS = (0, 1, 2, 4)  # standard deviation in pixels
TRIAL_SAMPLES = 64  # of each map of part 2
TRIAL_MAPS = 4  # of each trick and photo


def correlate(a, b):
    """Correlate two maps."""
    return float(np.corrcoef(a.flatten(), b.flatten())[0, 1])


def comparable(means, reduce):
    """Bring a map to what its reliability is about: with its signs, or summed over the channels."""
    values = means.get(reduce)[0].float()
    return values if reduce == "signed" else values.sum(0)


# --------------------------------------------------------------- part 1: reliability against n


class Look(NamedTuple):
    """A map after n samples."""

    values: torch.Tensor  # as from comparable()
    reliability: float  # as smoothgrad.py estimates it


class Curves(NamedTuple):
    """What one photo gives, for one --reduce: correlations by n."""

    estimated: dict
    measured: dict
    agreement: dict


def grow_map(network, x, target, samples, seed):
    """Draw samples, and look at the maps on the way.

    :return: by n, by --reduce
    :rtype: dict[int, dict[str, Look]]
    """
    found = {}
    means = smoothgrad.RunningMeans(x)
    draws = smoothgrad.Noise(x, make_rng("cpu", seed))
    while means.n < samples:
        e = draws.take(min(CHUNK, samples - means.n))
        means.add(smoothgrad.noisy_maps(network, x, target, NOISE, e, smoothgrad.gradient))
        if means.n >= 1.25 * max(found, default=1) or means.n == samples:
            found[means.n] = {
                reduce: Look(comparable(means, reduce), float(means.reliability(reduce)))
                for reduce in smoothgrad.REDUCE
            }
    return found


def compare_growth(one, other):
    """Compare two maps of the same photo while they grow, each as from :func:`grow_map`.

    :return: by --reduce
    :rtype: dict[str, Curves]
    """
    curves = {}
    for reduce in smoothgrad.REDUCE:
        last = other[max(other)][reduce].values
        curves[reduce] = Curves({}, {}, {})
        for n in one:
            values, reliability = one[n][reduce]
            curves[reduce].estimated[n] = reliability
            curves[reduce].measured[n] = correlate(values, other[n][reduce].values)
            curves[reduce].agreement[n] = correlate(values, last)
    return curves


def first_n(curve, level):
    """Find where a growing curve reaches a level, between its points on a log scale.

    :param dict[int, float] curve: reliability by n
    :return: n, infinite if the curve ends below
    :rtype: float
    """
    points = sorted(curve.items())
    if points[0][1] >= level:
        return points[0][0]
    for (n, r), (next_n, next_r) in pairwise(points):
        if next_r >= level:
            return n * (next_n / n) ** ((level - r) / (next_r - r))
    return math.inf


def report_reliability(photos):
    """Print the tables of part 1.

    :param list[dict[str, Curves]] photos: of each photo, by --reduce
    :return: figures for the RESULT line
    :rtype: dict
    """
    result = {}
    print(f"\n{'samples for a reliability of':30s}" + "".join(f"{r:>14}" for r in LEVELS))
    for reduce in smoothgrad.REDUCE:
        line = f"--reduce {reduce:21s}"
        for level in LEVELS:
            counts = [first_n(curves[reduce].measured, level) for curves in photos]
            ends = [round(n) if n < math.inf else None for n in (min(counts), max(counts))]
            line += f"{' - '.join(str(n or 'more') for n in ends):>14s}"
            result[f"n_{reduce}_{level}"] = ends
        print(line)
    print(f"\n{'at n =':27s}{'reliability':>15s}{'with the other':>16s}{'estimate is off by':>24s}")
    for reduce in smoothgrad.REDUCE:
        some = [curves[reduce] for curves in photos]
        n = min(some[0].estimated, key=lambda n: abs(n - 100))
        reliable = [curves.estimated[n] for curves in some]
        agreement = [curves.agreement[n] for curves in some]
        errors = [c.estimated[k] - c.measured[k] for c in some for k in c.measured]
        off = np.abs(errors).max()
        print(f"{n}, --reduce {reduce:13s}{spread(reliable):>15s}{spread(agreement):>16s}"
              f"{np.mean(errors):+10.3f}, most {off:.3f}")  # fmt: skip
        result[f"reliability_{reduce}_{n}"] = [round(min(reliable), 3), round(max(reliable), 3)]
        result[f"estimate_error_{reduce}"] = round(float(off), 4)
    return result


def spread(values):
    """Write the ends of some values."""
    return f"{min(values):.3f} - {max(values):.3f}"


def plot_curves(path, photos):
    """Draw reliability against n, a panel for each photo.

    :param pathlib.Path path: the PNG file
    :param dict[str, dict[str, Curves]] photos: by title and --reduce
    """
    from matplotlib.figure import Figure

    columns = min(2, len(photos))
    rows = -(-len(photos) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.6 * rows + 0.9), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, (title, curves) in zip(grid.flat, photos.items(), strict=False):
        for i, (reduce, (estimated, measured, agreement)) in enumerate(curves.items()):
            axes.plot(*zip(*estimated.items(), strict=True), color=f"C{i}", label=reduce)
            axes.plot(*zip(*measured.items(), strict=True), "o", ms=4, color=f"C{i}")
            axes.plot(*zip(*agreement.items(), strict=True), ":", lw=1.2, color=f"C{i}")
        axes.axhline(0.95, color="0.6", lw=0.8)
        most = max(estimated)
        ticks = [n for n in (8, 16, 32, 50, 100, 200, 400, 800, 1600, 3200) if n <= most]
        axes.set_xscale("log")
        axes.set_xticks(ticks, ticks)
        axes.minorticks_off()
        axes.set(title=title, ylim=(0, 1.01))
    for axes in grid[-1]:
        axes.set_xlabel("samples n")
    for axes in grid[:, 0]:
        axes.set_ylabel("correlation")
    lines, names = grid[0, 0].get_legend_handles_labels()
    for style, name in (
        ("-", "reliability, estimated from two halves"),
        ("o", "two independent maps of n samples"),
        (":", f"with a map of {most} others"),
    ):
        lines += grid[0, 0].plot([], [], style, color="0.3")
        names.append(name)
    figure.legend(lines, names, loc="outside upper center", ncols=4, fontsize=9, frameon=False,
                  title=f"SmoothGrad, {NOISE:.0%} noise")  # fmt: skip
    save_figure(path, figure)


def report_blur(photos):
    """Print what smoothing the signed map, as drawn, does: two agree better, on something else.

    :param list[tuple[dict, dict]] photos: of each photo two maps, as from :func:`grow_map`
    :return: figures for the RESULT line
    :rtype: dict
    """
    result = {}
    print(f"\n{'signed map, smoothed':27s}{'reliability at n = 50':>24s}{'with the full map':>20s}")
    for width in BLURS:
        reliable = []
        true = []
        for one, other in photos:
            n = min(one, key=lambda n: abs(n - 50))
            drawn = [look["signed"].values.abs().sum(0) for look in (one[n], other[n])]
            a, b = (gaussian_filter(values, width) for values in drawn)
            full = other[max(other)]["signed"].values.abs().sum(0)
            reliable.append(correlate(a, b))
            true.append(correlate(a, full))
        print(f"{f'{width} px':27s}{spread(reliable):>24s}{spread(true):>20s}")
        result[f"blur_{width}"] = [round(float(np.mean(v)), 3) for v in (reliable, true)]
    return result


# ------------------------------------------------------------------- part 2: fewer, better samples


def plain(n, shape, rng):
    """Draw noise as smoothgrad.py does."""
    return torch.randn(n, *shape, generator=rng)


def antithetic(n, shape, rng):
    """Draw pairs e and -e: what is odd in e cancels out."""
    half = torch.randn(n // 2, *shape, generator=rng)
    return torch.stack([half, -half], 1).flatten(0, 1)


def orthogonal(n, shape, rng):
    """Draw directions that are at right angles to each other, with lengths of their own."""
    e = torch.randn(n, math.prod(shape), generator=rng)
    directions = torch.linalg.qr(e.T).Q.T
    return (directions * e.norm(dim=1, keepdim=True)).view(n, *shape)


def stratified_length(n, shape, rng):
    """Draw directions freely, but one length from each of n equally likely ranges."""
    e = torch.randn(n, math.prod(shape), generator=rng)
    u = (torch.randperm(n, generator=rng) + torch.rand(n, generator=rng)) / n
    length = torch.from_numpy(chi2.ppf(u.double().numpy(), e.shape[1]) ** 0.5).float()
    return (e / e.norm(dim=1, keepdim=True) * length.view(-1, 1)).view(n, *shape)


def latin_hypercube(n, shape, rng):
    """Draw each pixel's n values from n equally likely ranges, one from each."""
    order = torch.rand(n, *shape, generator=rng).argsort(0)
    u = (order + torch.rand(n, *shape, generator=rng)) / n
    return torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6))


def sobol(n, shape, rng, side=16):
    """Draw the coarsest 16 x 16 cosines of each channel from a scrambled Sobol sequence."""
    e = torch.randn(n, *shape, generator=rng)
    size = shape[0] * side * side
    seed = int(torch.randint(2**31, (), generator=rng))
    u = torch.quasirandom.SobolEngine(size, scramble=True, seed=seed).draw(n)
    coarse = torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6)).view(n, shape[0], side, side)
    # An orthonormal transform of white noise is white noise: the cosines can be drawn instead.
    e[:, :, :side, :side] = coarse
    return torch.from_numpy(idctn(e.numpy(), axes=(2, 3), norm="ortho"))


TRIALS = {
    "plain": plain,
    "antithetic pairs": antithetic,
    "orthogonal directions": orthogonal,
    "stratified lengths": stratified_length,
    "Latin hypercube of pixels": latin_hypercube,
    "Sobol sequence, coarse cosines": sobol,
}


def replicate(draw, network, x, target, n, times):
    """Make several independent maps of n samples each.

    :param Callable draw: as :func:`plain`
    :return: one for each time
    :rtype: list[smoothgrad.RunningMeans]
    """
    sigma = NOISE * (x.max() - x.min())
    found = []
    for seed in range(times):
        means = smoothgrad.RunningMeans(x)
        for e in draw(n, x.shape[1:], make_rng("cpu", 2, seed)).split(CHUNK):
            maps = smoothgrad.gradient(network, x + sigma * e, target.repeat(len(e)))
            means.add(maps.unsqueeze(1))
        found.append(means)
    return found


def mean_odds(found, reduce):
    """Average r / (1 - r) over all pairs of maps: proportional to how many samples they are worth.

    :rtype: float
    """
    maps = [comparable(means, reduce) for means in found]
    r = np.mean([correlate(a, b) for a, b in combinations(maps, 2)])
    return r / (1 - r)


def try_hessian(x, target, score, n):
    """Try H e as a control variate: M(x + e) = M(x) + H e + ..., and the mean of H e is known: 0.

    The plain gradient M(x), a constant, changes no variance. With the best factor b for all pixels,
    M(x + e) - b H e has 1 - c^2 of the variance, where c is the correlation of M(x + e) and H e.

    :return: c, and the root mean square of H e as a fraction of that of M(x + e)
    :rtype: tuple[float, float]
    """
    network, mean, std, *_ = load_lite0()  # what common/fast.py makes can't be derived twice
    network = nn.Sequential(Normalise(mean, std), network).eval().requires_grad_(False)
    sigma = NOISE * (x.max() - x.min())
    rng = make_rng("cpu", 3)
    at = x.clone().requires_grad_()
    value = smoothgrad.class_score(network(at), target, score).sum()
    (gradient,) = torch.autograd.grad(value, at, create_graph=True)
    samples = []
    products = []
    for _ in range(n):
        e = sigma * torch.randn(x.shape, generator=rng)
        samples.append(smoothgrad.gradient(network, x + e, target, score))
        # A piecewise linear function's derivative doesn't depend on x: no graph, no product.
        products += torch.autograd.grad(
            gradient, at, e, retain_graph=True, allow_unused=True, materialize_grads=True
        )
    samples = torch.cat(samples)
    products = torch.cat(products)
    samples -= samples.mean(0)
    products -= products.mean(0)
    size = float(products.square().mean().sqrt() / samples.square().mean().sqrt())
    return (correlate(samples, products) if size else 0.0), size


def report_trials(worth, hessian):
    """Print the tables of part 2.

    :param dict worth: by trick and --reduce, :func:`mean_odds` of each photo
    :param dict hessian: by --score, :func:`try_hessian` of each photo
    :return: figures for the RESULT line
    :rtype: dict
    """
    result = {}
    print(f"\n{'gradients for the same reliability':36s}{'signed':>22s}{'abs':>22s}")
    for trick, by_reduce in worth.items():
        line = f"{trick:36s}"
        for reduce, values in by_reduce.items():
            ratios = np.divide(worth["plain"][reduce], values)
            text = f"{np.mean(ratios):.2f} ({ratios.min():.2f} - {ratios.max():.2f})"
            line += f"{text:>22s}"
            result[f"cost_{trick}_{reduce}".replace(" ", "_")] = round(float(np.mean(ratios)), 3)
        print(line)
    for score, values in hessian.items():
        c, size = np.mean(np.abs(values), 0)
        print(f"H e of the {score}: {size:.3g} of the size of M's scatter, correlation {c:.3f}: "
              f"variance x {1 - c * c:.3f} for 1 + some 3 gradients")  # fmt: skip
        result[f"hessian_{score}"] = [round(float(c), 4), float(f"{size:.3g}")]
    return result


# ------------------------------------------------------------------------------------ the script


def get_parser():
    """Build the command line."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,  # so that an error is one line
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--image", nargs="+", metavar="PATH",
                        default=[f"sample:{name}" for name in SAMPLES],
                        help="photos or folders of them (default: four samples)")  # fmt: skip
    parser.add_argument("--samples", type=number(int, 64), default=800,
                        help="of each map of part 1 (default: %(default)s)")  # fmt: skip
    parser.add_argument("--figure", type=Path, default=Path("runs/smoothgrad_reliability.png"),
                        metavar="PNG", help="of part 1 (default: %(default)s)")  # fmt: skip
    return parser


def main(argv=None):
    """Measure both parts, draw the figure, and print tables and a RESULT line.

    :param list[str] argv: the command line; None for sys.argv
    :return: what the RESULT line holds
    :rtype: dict
    """
    args = get_parser().parse_args(argv)
    args.figure.parent.mkdir(parents=True, exist_ok=True)
    set_up(False, seed=0)
    classifier = load_classifier()
    network = classifier.network
    photos = {}
    pairs = []
    worth = {trick: {"signed": [], "abs": []} for trick in TRIALS}
    hessian = {"logit": [], "probability": []}
    for photo in find_photos(args.image):
        x = read_photo(photo, classifier)
        with torch.no_grad():
            target = network(x).argmax(1)
        one, other = (grow_map(network, x, target, args.samples, seed) for seed in (0, 1))
        name = Path(photo).stem.removeprefix("sample:")
        photos[f"{name}, {classifier.classes[target]}"] = compare_growth(one, other)
        pairs.append((one, other))
        print(f"{name}: part 1 is done", flush=True)
        for trick, draw in TRIALS.items():
            found = replicate(draw, network, x, target, TRIAL_SAMPLES, TRIAL_MAPS)
            for reduce, values in worth[trick].items():
                values.append(mean_odds(found, reduce))
        for score, values in hessian.items():
            values.append(try_hessian(x, target, score, TRIAL_SAMPLES // 4))
        print(f"{name}: part 2 is done", flush=True)
    result = report_reliability(list(photos.values()))
    plot_curves(args.figure, photos)
    result.update(report_trials(worth, hessian))
    result.update(report_blur(pairs))
    print(f"look at  {args.figure}")
    print("RESULT", json.dumps(result))
    return result


if __name__ == "__main__":
    sys.exit(exit_code(main))
