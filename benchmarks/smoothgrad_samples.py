"""How many samples does a SmoothGrad map need, and can better ones replace more of them?

    python benchmarks/smoothgrad_samples.py

Part 1, for each --reduce of smoothgrad.py: how the reliability of a map grows with the number n of
its samples. What smoothgrad.py estimates from the two halves of one map is put beside the truth,
the correlation of two independent maps of n samples each, and beside the agreement with a map of
800 others.

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
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.fft import idctn
from scipy.ndimage import gaussian_filter
from scipy.stats import chi2
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import smoothgrad
from common.classifiers import Normalise, load_classifier, load_lite0
from common.device import make_rng, set_up
from common.errors import HelpFormatter
from common.photos import read_photo
from common.run import replacing

CHUNK = 8  # copies at once
LEVELS = (0.9, 0.95, 0.99)  # of reliability, in the table
BLURS = (1, 2, 4)  # standard deviation in pixels
CPU = torch.device("cpu")

# --------------------------------------------------------------- part 1: reliability against n


def grow_map(explain, x, target, noise, samples, seed):
    """Draw samples, and look at the maps on the way.

    :return: by n and --reduce: the map, summed over the channels, (H, W), and its reliability as
        smoothgrad.py estimates it
    :rtype: dict[int, dict[str, tuple[torch.Tensor, float]]]
    """
    found, rng = {}, make_rng(CPU, seed)
    for maps in smoothgrad.smoothgrad(explain, x, target, noise, samples, CHUNK, rng):
        if maps.n >= 1.25 * max(found, default=1) or maps.n == samples:
            found[maps.n] = {
                reduce: (flat(maps.get(reduce)), float(maps.reliability(reduce)))
                for reduce in smoothgrad.REDUCE
            }
    return found


def flat(values):
    """Bring a map to what its reliability is computed of: (1, C, H, W) to (H, W)."""
    return smoothgrad.over_channels(values)[0].float()


def correlate(a, b):
    """Correlate two maps."""
    return float(np.corrcoef(a.flatten(), b.flatten())[0, 1])


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


def plot_curves(path, photos, noise):
    """Draw reliability against n, a panel for each photo.

    :param pathlib.Path path: the PNG file
    :param dict photos: name to (estimated, measured, agreement), each by --reduce and n
    """
    columns = min(2, len(photos))
    rows = -(-len(photos) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.6 * rows + 0.9), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, (name, curves) in zip(grid.flat, photos.items(), strict=False):
        for i, reduce in enumerate(smoothgrad.REDUCE):
            estimated, measured, agreement = (curve[reduce] for curve in curves)
            axes.plot(*zip(*estimated.items(), strict=True), color=f"C{i}", label=reduce)
            axes.plot(*zip(*measured.items(), strict=True), "o", ms=4, color=f"C{i}")
            axes.plot(*zip(*agreement.items(), strict=True), ":", lw=1.2, color=f"C{i}")
        axes.axhline(0.95, color="0.6", lw=0.8)
        axes.axvline(50, color="0.6", lw=0.8)
        ticks = [n for n in (8, 16, 32, 50, 100, 200, 400, 800, 1600, 3200) if n <= max(estimated)]
        axes.set_xscale("log")
        axes.set_xticks(ticks, ticks)
        axes.minorticks_off()
        axes.set(title=name, ylim=(0, 1.01))
    for axes in grid[-1]:
        axes.set_xlabel("samples n")
    for axes in grid[:, 0]:
        axes.set_ylabel("correlation")
    lines, names = grid[0, 0].get_legend_handles_labels()
    for style, text in (("-", "reliability, estimated from two halves"),
                        ("o", "two independent maps of n samples"),
                        (":", f"with a map of {max(estimated)} others")):  # fmt: skip
        lines.append(grid[0, 0].plot([], [], style, color="0.3")[0])
        names.append(text)
    figure.legend(lines, names, loc="outside upper center", ncols=4, fontsize=9, frameon=False,
                  title=f"SmoothGrad, {noise:.0%} noise")  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        figure.savefig(part, dpi=110)


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
    return (e / e.norm(dim=1, keepdim=True) * length[:, None]).view(n, *shape)


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


def replicate(draw, explain, x, target, sigma, n, times):
    """Make several independent maps of n samples each.

    :param Callable draw: as :func:`plain`
    :return: one for each time
    :rtype: list[smoothgrad.Maps]
    """
    found = []
    for seed in range(times):
        maps = smoothgrad.Maps(x)
        for e in draw(n, x.shape[1:], make_rng(CPU, 2, seed)).split(CHUNK):
            maps.add(explain(x + sigma * e, target.repeat(len(e)))[:, None])
        found.append(maps)
    return found


def mean_odds(found, reduce):
    """Average r / (1 - r) over all pairs of maps: proportional to how many samples they are worth.

    :rtype: float
    """
    found = [flat(maps.get(reduce)) for maps in found]
    r = np.mean([correlate(a, b) for a, b in combinations(found, 2)])
    return r / (1 - r)


def try_hessian(x, target, sigma, n):
    """Try H e as a control variate: M(x + e) = M(x) + H e + ..., and the mean of H e is known: 0.

    The plain gradient M(x), a constant, changes no variance. With the best factor b for all pixels,
    M(x + e) - b H e has 1 - c^2 of the variance, where c is the correlation of M(x + e) and H e.

    :return: by --score: c, and the root mean square of H e in parts of that of M(x + e)
    :rtype: dict[str, tuple[float, float]]
    """
    network, mean, std, *_ = load_lite0()  # what common/folding.py makes can't be derived twice
    network = nn.Sequential(Normalise(mean, std), network).eval().requires_grad_(False)
    found, rng = {}, make_rng(CPU, 3)
    for score in ("logit", "probability"):
        samples, products = [], []
        at = x.clone().requires_grad_()
        value = smoothgrad.class_score(network(at), target, score).sum()
        gradient = torch.autograd.grad(value, at, create_graph=True)[0]
        for _ in range(n):
            e = sigma * torch.randn(x.shape, generator=rng)
            samples.append(smoothgrad.input_gradient(network, x + e, target, score))
            # A piecewise linear function's derivative doesn't depend on x: no graph, no product.
            product = torch.autograd.grad(
                gradient, at, e, retain_graph=True, allow_unused=True, materialize_grads=True
            )[0]
            products.append(product)
        samples, products = torch.cat(samples), torch.cat(products)
        samples -= samples.mean(0)
        products -= products.mean(0)
        size = float(products.square().mean().sqrt() / samples.square().mean().sqrt())
        found[score] = (correlate(samples, products) if size else 0.0, size)
    return found


# --------------------------------------------------------------------------------------- the tables


def get_parser():
    """Build the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    names = ["sample:coffee", "sample:cat", "sample:rocket", "sample:astronaut"]
    parser.add_argument("--image", nargs="+", default=names, help="photos, or sample:NAME")
    parser.add_argument("--noise", type=float, default=0.15, help="sigma, as in smoothgrad.py")
    parser.add_argument("--samples", type=int, default=800, help="of each map of part 1")
    parser.add_argument("--trial-samples", type=int, default=64, help="of each map of part 2")
    parser.add_argument("--trial-maps", type=int, default=4, help="of each trick and photo")
    parser.add_argument(
        "--figure", type=Path, default=Path("runs/smoothgrad_reliability.png"), help="of part 1"
    )
    return parser


def reliability_table(photos, result):
    """Print part 1.

    :param dict photos: as in :func:`plot_curves`
    :param dict result: gets the figures
    """
    print(f"\n{'samples for a reliability of':30s}" + "".join(f"{r:>14}" for r in LEVELS))
    for reduce in smoothgrad.REDUCE:
        line = f"--reduce {reduce:21s}"
        for level in LEVELS:
            counts = [first_n(measured[reduce], level) for _, measured, _ in photos.values()]
            ends = [round(n) if n < math.inf else None for n in (min(counts), max(counts))]
            line += "{:>14s}".format(" - ".join(str(n or "more") for n in ends))
            result[f"n_{reduce}_{level}"] = ends
        print(line)
    print(
        f"\n{'at n =':30s}{'reliability':>14s}{'with the other':>16s}{'error of the estimate':>26s}"
    )
    for reduce in smoothgrad.REDUCE:
        errors, reliable, agree = [], [], []
        for estimated, measured, agreement in photos.values():
            n = min(estimated[reduce], key=lambda n: abs(n - 100))
            reliable.append(estimated[reduce][n])
            agree.append(agreement[reduce][n])
            errors += [estimated[reduce][k] - r for k, r in measured[reduce].items()]
        print(f"{n}, --reduce {reduce:15s}{f'{min(reliable):.3f} - {max(reliable):.3f}':>18s}"
              f"{f'{min(agree):.3f} - {max(agree):.3f}':>16s}"
              f"{np.mean(errors):+14.3f}, most {np.abs(errors).max():.3f}")  # fmt: skip
        result[f"reliability_{reduce}_{n}"] = [round(min(reliable), 3), round(max(reliable), 3)]
        result[f"estimate_error_{reduce}"] = round(float(np.abs(errors).max()), 4)


def blur_table(maps, result):
    """Print what smoothing the signed map does: two maps agree better, but on something else.

    :param list maps: of each photo the two that :func:`grow_map` gave
    :param dict result: gets the figures
    """
    print(f"\n{'signed map, smoothed':30s}{'reliability at n = 50':>24s}{'with the full map':>20s}")
    for width in (0, *BLURS):
        reliable, true = [], []
        for one, other in maps:
            n, last = min(one, key=lambda n: abs(n - 50)), max(one)
            a, b = (gaussian_filter(m[n]["signed"][0].numpy(), width) for m in (one, other))
            reliable.append(correlate(a, b))
            full = other[last]["signed"][0]
            true.append(correlate(a, full))
        print(f"{f'{width} px':30s}{f'{min(reliable):.3f} - {max(reliable):.3f}':>24s}"
              f"{f'{min(true):.3f} - {max(true):.3f}':>20s}")  # fmt: skip
        result[f"blur_{width}"] = [round(float(np.mean(v)), 3) for v in (reliable, true)]


def main():
    """Measure both parts, draw the figure, and print tables and a RESULT line."""
    args, result, photos, both = get_parser().parse_args(), {}, {}, []
    set_up(False, 0)
    classifier = load_classifier()
    explain = partial(smoothgrad.input_gradient, classifier.network)
    worth = {name: {"signed": [], "abs": []} for name in TRIALS}
    hessian = {"logit": [], "probability": []}
    for photo in args.image:
        x = read_photo(photo, classifier.resize, classifier.size)
        with torch.no_grad():
            target = classifier.network(x).argmax(1)
        one, other = both_maps = [
            grow_map(explain, x, target, args.noise, args.samples, seed) for seed in (0, 1)
        ]
        both.append(both_maps)
        curves = ({}, {}, {})
        for reduce in smoothgrad.REDUCE:
            last = other[max(other)][reduce][0]
            curves[0][reduce] = {n: one[n][reduce][1] for n in one}
            curves[1][reduce] = {n: correlate(one[n][reduce][0], other[n][reduce][0]) for n in one}
            curves[2][reduce] = {n: correlate(one[n][reduce][0], last) for n in one}
        name = photo.removeprefix("sample:")
        photos[f"{name}, {classifier.classes[target]}"] = curves
        print(f"{name}: part 1 is done", flush=True)
        sigma = args.noise * float(x.max() - x.min())
        for trick, draw in TRIALS.items():
            found = replicate(draw, explain, x, target, sigma, args.trial_samples, args.trial_maps)
            for reduce, values in worth[trick].items():
                values.append(mean_odds(found, reduce))
        for score, value in try_hessian(x, target, sigma, args.trial_samples // 4).items():
            hessian[score].append(value)
        print(f"{name}: part 2 is done", flush=True)

    reliability_table(photos, result)
    plot_curves(args.figure, photos, args.noise)
    print(f"wrote {args.figure}")
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
    blur_table(both, result)
    print("RESULT", json.dumps(result))


if __name__ == "__main__":
    main()
