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
import copy
import json
import math
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from scipy.fft import idctn
from scipy.ndimage import gaussian_filter
from scipy.stats import chi2
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import smoothgrad
from benchmarks.against_captum import correlate
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


def comparable(means, reduce):
    """Bring a map to what its reliability is about: with its signs, or summed over the channels."""
    values = means.get(reduce)[0].float()
    return values if reduce == "signed" else values.sum(0)


# --------------------------------------------------------------- part 1: reliability against n


def grow_map(network, x, target, samples, seed):
    """Draw samples, and keep the means on the way.

    :return: by n
    :rtype: dict[int, smoothgrad.RunningMeans]
    """
    found = {}
    means = smoothgrad.RunningMeans(x)
    draws = smoothgrad.Noise(x, make_rng("cpu", seed))
    while means.n < samples:
        e = draws.take(min(CHUNK, samples - means.n))
        means.add(smoothgrad.noisy_maps(network, x, target, NOISE, e, smoothgrad.gradient))
        if means.n >= 1.25 * max(found, default=1) or means.n == samples:
            found[means.n] = copy.deepcopy(means)
    return found


def compare_growth(one, other, reduce):
    """Compare two maps of the same photo while they grow, each as from :func:`grow_map`.

    :return: n, and what is estimated from one map, measured of both, and found with all samples
    :rtype: dict[str, list]
    """
    maps = [comparable(means, reduce) for means in one.values()]
    others = [comparable(means, reduce) for means in other.values()]
    return {
        "n": list(one),
        "estimated": [float(means.reliability(reduce)) for means in one.values()],
        "measured": [correlate(a, b) for a, b in zip(maps, others, strict=True)],
        "with all": [correlate(a, others[-1]) for a in maps],
    }


def first_n(curves, level):
    """Find where the measured reliability reaches a level, between two points on a log scale.

    :return: n, infinite if it ends below
    :rtype: float
    """
    highest = np.maximum.accumulate(curves["measured"])
    return float(np.exp(np.interp(level, highest, np.log(curves["n"]), right=np.inf)))


def report_reliability(growth):
    """Print the table of part 1.

    :param dict[str, dict] growth: by title of the photo and --reduce, see :func:`compare_growth`
    :return: figures for the RESULT line
    :rtype: dict
    """
    result = {}
    levels = "".join(f"{level:>14}" for level in LEVELS)
    print(f"\n{'samples for a reliability of':30s}{levels}{'estimate is off by':>22s}")
    for reduce in smoothgrad.REDUCE:
        photos = [by_reduce[reduce] for by_reduce in growth.values()]
        line = f"--reduce {reduce:21s}"
        for level in LEVELS:
            counts = [first_n(curves, level) for curves in photos]
            ends = [round(n) if n < math.inf else None for n in (min(counts), max(counts))]
            line += f"{' - '.join(str(n or 'more') for n in ends):>14s}"
            result[f"n_{reduce}_{level}"] = ends
        errors = [np.subtract(curves["estimated"], curves["measured"]) for curves in photos]
        off = float(np.abs(errors).max())
        print(f"{line}{np.mean(errors):+9.3f}, most {off:.3f}")
        result[f"estimate_error_{reduce}"] = round(off, 4)
    return result


def plot_reliability(path, growth):
    """Draw reliability against n, a panel for each photo.

    :param pathlib.Path path: the PNG file
    :param dict[str, dict] growth: as for :func:`report_reliability`
    """
    from matplotlib.figure import Figure

    columns = min(2, len(growth))
    lines = -(-len(growth) // columns)
    figure = Figure(figsize=(10.4, 3.6 * lines + 1.2), layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat
    ticks = [8, 16, 32, 64, 128, 256, 512]
    for axes, (title, by_reduce) in zip(panels, growth.items(), strict=False):
        for i, (reduce, curves) in enumerate(by_reduce.items()):
            for column, style in (("estimated", "-"), ("measured", "o"), ("with all", ":")):
                label = f"{reduce}, {column}"
                axes.plot(curves["n"], curves[column], style, color=f"C{i}", ms=4, label=label)
        axes.set_xscale("log")
        axes.set_xticks(ticks, ticks)
        axes.minorticks_off()
        axes.set(title=title, ylim=(0, 1.01), xlabel="samples n", ylabel="correlation")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    save_figure(path, figure)


def compare_smoothed(one, other):
    """Smooth the signed map, as drawn: two agree better, on something else.

    :param dict one: as from :func:`grow_map`; other alike
    :return: for each of BLURS the correlation of two smoothed maps of 50 samples, and of one with
        the full map
    :rtype: list[tuple[float, float]]
    """
    n = min(one, key=lambda n: abs(n - 50))
    maps = [comparable(means, "signed") for means in (one[n], other[n], other[max(other)])]
    a, b, full = (values.abs().sum(0) for values in maps)
    found = []
    for width in BLURS:
        smooth = gaussian_filter(a, width)
        reliability = correlate(smooth, gaussian_filter(b, width))
        found.append((reliability, correlate(smooth, full)))
    return found


def report_smoothed(photos):
    """Print what smoothing does.

    :param list photos: of each photo, as from :func:`compare_smoothed`
    :return: figures for the RESULT line
    :rtype: dict
    """
    result = {}
    print(f"\n{'signed map, smoothed':27s}{'reliability at n = 50':>24s}{'with the full map':>20s}")
    values = np.array(photos)  # (photos, blurs, 2)
    low = values.min(0)
    high = values.max(0)
    for i, width in enumerate(BLURS):
        ends = [f"{a:.3f} - {b:.3f}" for a, b in zip(low[i], high[i], strict=True)]
        print(f"{f'{width} px':27s}{ends[0]:>24s}{ends[1]:>20s}")
        result[f"blur_{width}"] = [round(float(mean), 3) for mean in values[:, i].mean(0)]
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


def measure_worth(draw, network, x, target):
    """Make independent maps, and average r / (1 - r) over all pairs of them.

    :param Callable draw: as :func:`plain`
    :return: by --reduce, proportional to how many plain samples the maps are worth
    :rtype: dict[str, float]
    """
    sigma = NOISE * (x.max() - x.min())
    found = []
    for seed in range(TRIAL_MAPS):
        means = smoothgrad.RunningMeans(x)
        for e in draw(TRIAL_SAMPLES, x.shape[1:], make_rng("cpu", 2, seed)).split(CHUNK):
            maps = smoothgrad.gradient(network, x + sigma * e, target.repeat(len(e)))
            means.add(maps.unsqueeze(1))
        found.append(means)
    worth = {}
    for reduce in ("signed", "abs"):
        maps = [comparable(means, reduce) for means in found]
        r = np.mean([correlate(a, b) for a, b in combinations(maps, 2)])
        worth[reduce] = r / (1 - r)
    return worth


def try_hessian(x, target):
    """Try H e as a control variate: M(x + e) = M(x) + H e + ..., and the mean of H e is known: 0.

    The plain gradient M(x), a constant, changes no variance. With the best factor b for all pixels,
    M(x + e) - b H e has 1 - c^2 of the variance, where c is the correlation of M(x + e) and H e.
    M is that of the probability: the logits are piecewise linear in x, so that their H is 0.

    :return: c, and the root mean square of H e as a fraction of that of M(x + e)
    :rtype: tuple[float, float]
    """
    network, mean, std, *_ = load_lite0()  # what common/fast.py makes can't be derived twice
    network = nn.Sequential(Normalise(mean, std), network).eval().requires_grad_(False)
    sigma = NOISE * (x.max() - x.min())
    rng = make_rng("cpu", 3)
    at = x.clone().requires_grad_()
    value = smoothgrad.class_score(network(at), target, "probability").sum()
    (gradient,) = torch.autograd.grad(value, at, create_graph=True)
    samples = []
    products = []
    for _ in range(TRIAL_SAMPLES // 4):
        e = sigma * torch.randn(x.shape, generator=rng)
        samples.append(smoothgrad.gradient(network, x + e, target, "probability"))
        products += torch.autograd.grad(gradient, at, e, retain_graph=True)
    samples = torch.cat(samples)
    products = torch.cat(products)
    samples -= samples.mean(0)
    products -= products.mean(0)
    size = products.square().mean().sqrt() / samples.square().mean().sqrt()
    return correlate(samples, products), float(size)


def report_trials(worth, hessian):
    """Print the tables of part 2.

    :param dict worth: by trick, of each photo as from :func:`measure_worth`
    :param list hessian: of each photo, as from :func:`try_hessian`
    :return: figures for the RESULT line
    :rtype: dict
    """
    result = {}
    print(f"\n{'gradients for the same reliability':36s}{'signed':>22s}{'abs':>22s}")
    for trick, photos in worth.items():
        line = f"{trick:36s}"
        for reduce in ("signed", "abs"):
            pairs = zip(worth["plain"], photos, strict=True)
            ratios = [plainly[reduce] / cleverly[reduce] for plainly, cleverly in pairs]
            text = f"{np.mean(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})"
            line += f"{text:>22s}"
            result[f"cost_{trick}_{reduce}".replace(" ", "_")] = round(float(np.mean(ratios)), 3)
        print(line)
    c, size = np.mean(np.abs(hessian), 0)
    print(f"H e: {size:.3g} of the size of M's scatter, correlation {c:.3f}: "
          f"variance x {1 - c * c:.3f} for 1 + some 3 gradients")  # fmt: skip
    result["hessian_probability"] = [round(float(c), 4), float(f"{size:.3g}")]
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
    growth = {}
    smoothed = []
    worth = {trick: [] for trick in TRIALS}
    hessian = []
    for photo in find_photos(args.image):
        x = read_photo(photo, classifier)
        with torch.no_grad():
            target = network(x).argmax(1)
        one, other = (grow_map(network, x, target, args.samples, seed) for seed in (0, 1))
        title = f"{photo}, {classifier.classes[target]}"
        growth[title] = {r: compare_growth(one, other, r) for r in smoothgrad.REDUCE}
        smoothed.append(compare_smoothed(one, other))
        print(f"{title}: part 1 is done", flush=True)
        for trick, draw in TRIALS.items():
            worth[trick].append(measure_worth(draw, network, x, target))
        hessian.append(try_hessian(x, target))
        print(f"{title}: part 2 is done", flush=True)
    plot_reliability(args.figure, growth)
    result = report_reliability(growth)
    result.update(report_trials(worth, hessian))
    result.update(report_smoothed(smoothed))
    print(f"look at  {args.figure}")
    print("RESULT", json.dumps(result))
    return result


if __name__ == "__main__":
    sys.exit(exit_code(main))
