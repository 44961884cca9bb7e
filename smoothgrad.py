"""Show which pixels a classifier looks at: SmoothGrad (arXiv 1706.03825).

The gradient M of a class score S says which pixels matter, but from point to
point it flickers. So average it over noisy copies of the photo x (Smilkov et
al. 2017):

    M(x) = dS/dx,   SmoothGrad(x) = 1/n sum_i M(x + e_i),   e_i ~ N(0, sigma^2)

with sigma = noise * (max x - min x), in pixels from 0 to 1, the space that the
noise is added in.

    python smoothgrad.py --image sample:coffee

M may also be Guided Backpropagation (Springenberg et al. 2014, arXiv
1412.6806), which lets only positive gradients pass a ReLU, or Integrated
Gradients IG (Sundararajan et al. 2017, arXiv 1703.01365):

    IG(x) = (x - b) * integral from 0 to 1 of M(b + a (x - b)) da
    sum IG(x) = S(x) - S(b)

A map of 100 noisy copies takes 1.3 seconds on two cores of an AMD EPYC, 2.6 on
those of an Intel Xeon (benchmarks/README.md). In a notebook:

    heat = smoothgrad(network, x, target, noise=0.1, samples=100)

Differences from the paper: M, |M| and M^2 are kept as running means, so that
memory doesn't grow with n; each map comes with its reliability, the
correlation of two maps of n samples.
"""

import argparse
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import common  # isort: skip # noqa: F401 (Ctrl-C while torch is imported: one line)

import numpy as np
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from common.classifiers import find_class, load_classifier
from common.device import (
    choose_chunk,
    fit_memory,
    is_first,
    make_rng,
    ranks,
    set_up,
    split_evenly,
)
from common.errors import UserError, exit_code, interruptible, number, positive_int, seed_int
from common.fast import replaying
from common.images import (
    add_caption,
    add_title,
    contact_sheet,
    gaussian_blur,
    lay_over,
    save_gif,
    save_png,
    side_by_side,
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
METHODS = ("gradient", "gradient-x-input", "integrated", "guided")
REDUCE = ("signed", "abs", "squared", "variance")
MAX_SAMPLES = 5000  # where --converge gives up
DRAWN_AT_ONCE = 8  # noisy copies
TOP = 0.1  # fraction of the pixels that the deletion test blurs away
CHANGEABLE_ON_RESUME = {"image", "cuda", "device", "chunk", "resume"}


# ----------------------------------------------------------------- the gradient and its relatives


def class_score(logits, target, score="logit"):
    """Return each image's class score S.

    :param torch.Tensor logits: (N, classes)
    :param torch.Tensor target: class indices, (N,)
    :param str score: "logit"; "probability", flat close to 1; or "loss", which falls as they rise
    :return: (N,)
    :rtype: torch.Tensor
    """
    if score == "loss":
        return F.cross_entropy(logits, target, reduction="none")
    values = logits.softmax(1) if score == "probability" else logits
    return values.gather(1, target.view(-1, 1)).squeeze(1)


def gradient(network, x, target, score="logit"):
    """Differentiate the class score with respect to the pixels: M(x) = dS/dx.

    :param torch.nn.Module network: from images to logits; left as it is, also after an error
    :param torch.Tensor x: images, (N, C, H, W), in [0, 1]
    :param torch.Tensor target: class indices, (N,)
    :param str score: as in :func:`class_score`
    :return: signed, (N, C, H, W)
    :rtype: torch.Tensor
    """
    with torch.enable_grad(), eval_mode(network):
        x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        scores = class_score(network(x), target, score)
        (found,) = torch.autograd.grad(scores.sum(), x)  # of x only: parameters get no gradient
    return found


def gradient_x_input(network, x, target, score="logit"):
    """Multiply the gradient by the pixels; parameters as in :func:`gradient`."""
    return gradient(network, x, target, score) * x


def integrated_gradients(network, x, target, baseline=None, steps=128, chunk=8, score="logit",
                         explain=gradient):  # fmt: skip
    """Integrate the gradient along the line from a baseline b to the image, by the midpoint rule.

        IG(x) = (x - b) * integral from 0 to 1 of M(b + a (x - b)) da

    :param torch.nn.Module network: from images to logits; left as it is
    :param torch.Tensor x: images, (N, C, H, W), in [0, 1]
    :param torch.Tensor target: class indices, (N,)
    :param torch.Tensor baseline: b, the image without information, (1, C, H, W); None for black
    :param int steps: points on the line
    :param int chunk: images that are computed at once: memory and speed, not the result
    :param str score: as in :func:`class_score`
    :param Callable explain: M, :func:`gradient` or what computes the same
    :return: signed, (N, C, H, W)
    :rtype: torch.Tensor
    """
    if baseline is None:
        baseline = torch.zeros_like(x[:1])
    midpoints = (torch.arange(steps, device=x.device) + 0.5) / steps
    total = torch.zeros_like(x)
    for a in midpoints.split(max(1, chunk // len(x))):
        points = baseline + a.view(-1, 1, 1, 1, 1) * (x - baseline)  # (len(a), N, C, H, W)
        gradients = explain(network, points.flatten(0, 1), target.repeat(len(a)), score)
        total += gradients.unflatten(0, (len(a), len(x))).sum(0)
    return (x - baseline) * (total / steps)


def make_baseline(kind, x, rng):
    """Make the image that Integrated Gradients compares with.

    :param str kind: "black"; "mean", one colour; "blurred"; or "noise", uniform in [0, 1]
    :param torch.Tensor x: the photo, (1, C, H, W)
    :param torch.Generator rng: for the noise
    :return: (1, C, H, W)
    :rtype: torch.Tensor
    """
    if kind == "mean":
        return x.mean((2, 3), keepdim=True).expand_as(x)
    if kind == "blurred":
        return blur(x)
    if kind == "noise":
        return torch.rand(x.shape, generator=rng, device=x.device)
    return torch.zeros_like(x)


RELUS = {"relu", "relu_", "relu6"}  # functions and methods of torch, by name
CLAMPS = {"hardtanh", "hardtanh_", "clamp", "clamp_", "clamp_min", "clamp_min_", "clip", "clip_"}
OTHERS = {"leaky_relu", "leaky_relu_", "elu", "gelu", "silu", "hardswish", "mish", "softplus"}


class GuidedReLUs(TorchFunctionMode):
    """While it is active, every ReLU passes back positive gradients only.

    Functions are watched, not modules: ``F.relu`` and ``x.relu_()`` are found as ``nn.ReLU`` is.
    """

    def __init__(self):
        super().__init__()
        self.count = 0  # of ReLUs that were guided
        self.others = Counter()  # other activations, by name: they stay as they are

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Call the function; guide the gradient of its output if it is a ReLU."""
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        name = getattr(function, "__name__", None)
        low = kwargs.get("min_val", kwargs.get("min", args[1] if len(args) > 1 else None))
        clamps_at_0 = name in CLAMPS and type(low) in (int, float) and low == 0
        if (name in RELUS or clamps_at_0) and output.requires_grad:
            output.register_hook(lambda gradient: gradient.clamp_min(0))
            self.count += 1
        elif name in OTHERS:
            self.others[name] += 1
        return output


def guided_backprop(network, x, target, score="logit"):
    """Compute the gradient with every ReLU guided; parameters as in :func:`gradient`.

    It shows edges: its maps hardly change with random weights (Adebayo 2018, arXiv 1810.03292).

    :raises UserError: if the network has no ReLU
    """
    with GuidedReLUs() as guided:
        found = gradient(network, x, target, score)
    if not guided.count:
        raise UserError("this network has no ReLU to guide: choose another map or another model")
    return found


def describe_guiding(network, x):
    """Say how many activations Guided Backpropagation guides, of which kinds it leaves how many.

    :param torch.Tensor x: any image, (1, C, H, W)
    :return: one line; empty if all are ReLUs
    :rtype: str
    :raises UserError: if none is
    """
    with GuidedReLUs() as guided:
        guided_backprop(network, x, torch.tensor([0], device=x.device))
    kinds = " and ".join(f"{count} {name}" for name, count in guided.others.items())
    return f"{guided.count} ReLUs are guided, {kinds} are not" if kinds else ""


# ------------------------------------------------------------------------------------- SmoothGrad


def smoothgrad(network, x, target, noise=0.1, samples=100, reduce="signed", explain=gradient,
               chunk=8, rng=None):  # fmt: skip
    """Average the maps of noisy copies: 1/n sum_i M(x + e_i).

    :param torch.nn.Module network: from images to logits; left as it is
    :param torch.Tensor x: images, (N, C, H, W), in [0, 1]
    :param torch.Tensor target: class indices, (N,)
    :param float noise: sigma, as a fraction of each image's own range
    :param int samples: n, the number of noisy copies of each image; without noise 1 is enough
    :param str reduce: what is averaged, as in :meth:`RunningMeans.get`
    :param Callable explain: M: :func:`gradient`, or a function of the same parameters and result
    :param int chunk: images that are computed at once: memory and speed, not the result
    :param torch.Generator rng: for the noise; None for the same noise each time
    :return: (N, C, H, W), float64
    :rtype: torch.Tensor
    """
    rng = rng or make_rng(x.device, 0, 0)
    return average_maps(network, x, target, noise, samples, explain, chunk, rng).get(reduce)


def average_maps(network, x, target, noise, samples, explain, chunk, rng):
    """Do what :func:`smoothgrad` does, but keep the means of M, |M| and M^2.

    :rtype: RunningMeans
    """
    if not noise:
        samples = 1
    means = RunningMeans(x)
    draws = Noise(x, rng)
    while means.n < samples:
        count = min(max(1, chunk // len(x)), samples - means.n)
        means.add(noisy_maps(network, x, target, noise, draws.take(count), explain))
    return means


def noisy_maps(network, x, target, noise, e, explain):
    """Explain noisy copies: M(x + sigma e_i); parameters as in :func:`smoothgrad`.

    :param torch.Tensor e: standard normal, (count, C, H, W), the same for all images
    :return: (count, N, C, H, W)
    :rtype: torch.Tensor
    """
    sigma = noise * (x.amax((1, 2, 3), keepdim=True) - x.amin((1, 2, 3), keepdim=True))
    copies = x + sigma * e.unsqueeze(1)  # (count, N, C, H, W)
    maps = explain(network, copies.flatten(0, 1), target.repeat(len(e)))
    return maps.unflatten(0, (len(e), len(x)))


class Noise:
    """Standard normal noise e_1, e_2, ...: how many are taken at once doesn't change them.

    :param torch.Tensor x: the images, (N, C, H, W): where, and of which shape
    :param torch.Generator rng: where it comes from
    """

    def __init__(self, x, rng):
        self.x = x
        self.rng = rng
        self.left = x.new_empty(0, *x.shape[1:])  # drawn, and not yet taken

    def take(self, count):
        """Return the next ones, (count, C, H, W)."""
        drawn = [self.left]
        missing = count - len(self.left)
        while missing > 0:
            # Some at once, so that a GPU has less to launch, but always as many.
            shape = (DRAWN_AT_ONCE, *self.x.shape[1:])
            drawn.append(torch.randn(shape, generator=self.rng, device=self.x.device))
            missing -= DRAWN_AT_ONCE
        drawn = torch.cat(drawn)
        self.left = drawn[count:]
        return drawn[:count]


class RunningMeans:
    """Running means of M, |M| and M^2, of even and odd samples apart.

    :param torch.Tensor x: the images, (N, C, H, W): the shape of the maps
    """

    def __init__(self, x):
        # Signed gradients cancel out, so that single precision would show after some thousands.
        self.even = torch.zeros(3, *x.shape, dtype=torch.float64, device=x.device)
        self.odd = torch.zeros_like(self.even)
        self.n = 0

    def add(self, samples):
        """Add samples of M, (n, N, C, H, W)."""
        first_even = self.n % 2  # position of the first even sample among these
        for sums, half in (
            (self.even, samples[first_even::2]),
            (self.odd, samples[1 - first_even :: 2]),
        ):
            sums[0] += half.sum(0)
            sums[1] += half.abs().sum(0)
            sums[2] += half.square().sum(0)
        self.n += len(samples)

    def get(self, reduce):
        """Return one map for each image.

        :param str reduce: "signed", the mean of M as in the paper; "abs", the mean of |M|;
            "squared", that of M^2; "variance", that of (M - mean M)^2, called VarGrad
        :return: (N, C, H, W), float64
        :rtype: torch.Tensor
        """
        return self.reduce((self.even + self.odd) / self.n, reduce)

    @staticmethod
    def reduce(means, reduce):
        """Choose a map from the means of M, |M| and M^2, (3, N, C, H, W)."""
        if reduce == "variance":
            return (means[2] - means[0] ** 2).clamp_min(0)
        return means[REDUCE.index(reduce)]

    def reliability(self, reduce):
        """Estimate how well a second map of as many samples would agree with this one.

        The correlation r of the maps of the even and of the odd samples is that of n/2 samples; for
        n it is 2r / (1 + r) (Spearman and Brown, 1910). This holds for averages. So signed maps are
        compared with their signs, channel by channel: as drawn, two |mean M| also agree in where
        the noise is strong, and two maps of noise alone would by half.

        :param str reduce: as in :meth:`get`
        :return: from 0 to 1, of each image, (N,)
        :rtype: torch.Tensor
        """
        if self.n < 2:
            return torch.zeros(self.even.shape[1])
        even = self.reduce(self.even / ((self.n + 1) // 2), reduce)
        odd = self.reduce(self.odd / (self.n // 2), reduce)
        if reduce != "signed":
            even = over_channels(even)
            odd = over_channels(odd)
        even = even.flatten(1) - even.flatten(1).mean(1, keepdim=True)
        odd = odd.flatten(1) - odd.flatten(1).mean(1, keepdim=True)
        r = F.cosine_similarity(even, odd, eps=1e-30).clamp(0, 1)
        return 2 * r / (1 + r)


# ----------------------------------------------------------------------------- what the maps show


def over_channels(values):
    """Add up a map's absolute values over the channels: (N, C, H, W) to (N, H, W)."""
    return values.abs().sum(1)


def to_heatmap(values):
    """Bring a map to [0, 1] for the eye: over all channels, cut at the 99th percentile.

    :param torch.Tensor values: a signed map, (N, C, H, W)
    :return: (N, H, W); all zero where the map has one value only
    :rtype: torch.Tensor
    """
    heat = over_channels(values.double())
    low = heat.amin((1, 2), keepdim=True)
    high = heat.flatten(1).quantile(0.99, dim=1).view(-1, 1, 1)
    return ((heat - low) / (high - low).clamp_min(1e-300)).clamp(0, 1)


def blur(x):
    """Blur images, (N, C, H, W), with a sigma of 10 pixels of 224: objects become unknowable."""
    return gaussian_blur(x, 10 / 224 * x.shape[-1])


@torch.no_grad()
def deletion_test(network, x, blurred, target, heat, rng):
    """Blur the top 10 % of a map's pixels away, and as many at random.

    :param torch.nn.Module network: from images to logits
    :param torch.Tensor x: the photo, (1, C, H, W)
    :param torch.Tensor blurred: what :func:`blur` makes of it
    :param int target: the class
    :param torch.Tensor heat: the map, (H, W)
    :param torch.Generator rng: for the random pixels
    :return: what is left of the class's probability; the mean over 8 random choices
    :rtype: tuple[float, float]
    """
    shuffled = [torch.rand(heat.shape, generator=rng, device=x.device) for _ in range(8)]
    # In double precision: squares of small gradients vanish in single precision.
    ranked = torch.stack([heat, *shuffled]).double().flatten(1)  # (9, H W)
    top = ranked.topk(round(TOP * ranked.shape[1]), dim=1).indices
    deleted = x.new_zeros(ranked.shape).scatter_(1, top, 1).view(-1, 1, *heat.shape)
    with eval_mode(network):
        left = network(x + deleted * (blurred - x)).softmax(1)[:, target]
    return float(left[0]), float(left[1:].mean())


@torch.no_grad()
def completeness(network, x, target, baseline, values, score):
    """Compare the sum of Integrated Gradients with S(x) - S(b), which it should be.

    :return: S(x), S(b), and by how much the sum of the map misses their difference
    :rtype: tuple[float, float, float]
    """
    with eval_mode(network):
        logits = network(torch.cat([x, baseline]))
    scores = class_score(logits, target.repeat(2), score)
    high, low = scores.tolist()
    return high, low, float(values.sum()) - (high - low)


# ------------------------------------------------------------------------------- photo by photo


def choose_method(args, baseline, chunk):
    """Return the M that the arguments ask for, a function of network, images and targets."""
    if args.method == "integrated":
        explain = replaying(gradient, min(chunk, args.steps))
        return partial(integrated_gradients, baseline=baseline, steps=args.steps, chunk=chunk,
                       score=args.score, explain=explain)  # fmt: skip
    explain = {"gradient-x-input": gradient_x_input, "guided": guided_backprop}
    explain = replaying(explain.get(args.method, gradient), chunk)
    return lambda network, x, target: explain(network, x, target, args.score)


def watch_smoothgrad(network, x, target, noise, args, baseline, chunk):
    """Do what :func:`smoothgrad` does, with a progress bar, --converge and --gif.

    :return: the :class:`RunningMeans`; the frames of the animation, uint8, (H, W, 3)
    :rtype: tuple[RunningMeans, list[numpy.ndarray]]
    """
    explain = choose_method(args, baseline, chunk)
    copies = 1 if args.method == "integrated" else chunk  # it has a chunk of its own
    samples = MAX_SAMPLES if args.converge else args.samples
    if not noise:
        samples = 1
    draws = Noise(x, make_rng(x.device, args.seed, 0))
    means = RunningMeans(x)
    frames = []
    next_look = 16  # --converge looks at n = 16, 20, 25, 31, ..., whatever the chunk is
    with tqdm(total=samples, unit="sample", leave=False, disable=not is_first() or None) as bar:
        while means.n < samples:
            count = min(copies, samples - means.n)
            if args.converge:
                count = min(count, next_look - means.n)
            means.add(noisy_maps(network, x, target, noise, draws.take(count), explain))
            bar.update(count)
            if args.converge and means.n == next_look:
                next_look = int(1.25 * next_look)
                if means.reliability(args.reduce).min() >= args.converge:
                    samples = means.n
            if args.gif and noise and (means.n == samples or means.n >= 1.3 ** len(frames)):
                picture = to_grey(to_heatmap(means.get(args.reduce))[0])
                frames.append(add_caption(picture, f"{noise * 100:g} % noise, n = {means.n}"))
    return means, frames


def classify(classifier, x, photo, target=None):
    """Classify a photo, (1, C, H, W), and choose the class to explain.

    :param common.classifiers.Classifier classifier: whose classes
    :param str photo: what it is called
    :param str target: index or name; None for the top class
    :return: the class to explain, its probability, and the five top classes with theirs
    :rtype: tuple[int, float, list[tuple[str, float]]]
    """
    probabilities = predict(classifier, x, [photo])[0]
    best = probabilities.argsort(descending=True)[:5].tolist()
    top5 = [(classifier.classes[i], float(probabilities[i])) for i in best]
    label = best[0] if target is None else find_class(classifier.classes, target)
    return label, float(probabilities[label]), top5


def find_chunk(args, network, x):
    """Find how many images to compute at once, where the arguments don't say.

    :param torch.Tensor x: any image, (1, C, H, W)
    :rtype: int
    """

    def compute(count):
        gradient(
            network, x.repeat(count, 1, 1, 1), torch.zeros(count, dtype=torch.long, device=x.device)
        )

    chunk = choose_chunk(x.device, compute)
    if x.device.type == "cuda":  # where a full chunk is one graph, a small last one is none
        chunk = split_evenly(args.steps if args.method == "integrated" else args.samples, chunk)
    return chunk


def explain_photo(classifier, args, folder, photo, stem, chunk):
    """Classify one photo, make a map for each noise level, and write the pictures.

    :param str photo: a file or ``sample:NAME``
    :param str stem: what the files of this photo are called
    :param int chunk: images that are computed at once
    :return: its record in metrics.json; the chunk that there was memory for
    :rtype: tuple[dict, int]
    """
    started = time.time()
    network = classifier.network
    x = read_photo(photo, classifier).to(classifier.device)
    label, probability, top5 = classify(classifier, x, photo, args.target)
    say(f"{photo}: " + ", ".join(f"{name} {p:.1%}" for name, p in top5))
    target = torch.tensor([label], device=x.device)
    baseline = make_baseline(args.baseline, x, make_rng(x.device, args.seed, 1))
    lead = "  " if ranks()[1] == 1 else f"{photo}: "  # other processes print between our lines

    blurred = blur(x)
    arrays = {"photo": x[0].cpu().numpy()}
    records, heats = [], []
    for noise in args.noise:
        compute = partial(watch_smoothgrad, network, x, target, noise, args, baseline)
        (means, frames), chunk = fit_memory(compute, chunk)
        values = means.get(args.reduce if noise else "signed")  # one sample has no variance
        importance = over_channels(values)[0]
        rng = make_rng(x.device, args.seed, 2)
        left, left_random = deletion_test(network, x, blurred, label, importance, rng)
        reliability = float(means.reliability(args.reduce)) if noise else 1.0
        record = {"noise": noise, "samples": means.n, "reliability": reliability,
                  "probability_left": left, "probability_left_random": left_random}  # fmt: skip
        say(lead + describe_map(record, probability, args.method))
        if args.converge and reliability < args.converge:
            say(f"warning: {photo}: not converged after {MAX_SAMPLES} samples", sys.stderr)
        if args.method == "integrated" and not noise:
            high, low, gap = completeness(network, x, target, baseline, values, args.score)
            record.update(completeness_gap=gap, score=high, baseline_score=low)
            say(f"{lead}its sum misses the score's change of {high - low:.3f} by {gap:.3f}")
        records.append(record)
        heats.append(to_heatmap(values)[0])
        name = f"noise_{noise * 100:g}"
        arrays[name] = values[0].float().cpu().numpy()
        save_png(folder / f"{stem}_{name}.png", to_grey(heats[-1]))
        if frames:
            save_gif(folder / f"{stem}_{name}.gif", frames, seconds=5)
    with replacing(folder / f"{stem}.npz") as part:
        np.savez(part, **arrays)  # compressed, it takes longer than all pictures
    title = f"{classifier.classes[label]}, {probability:.1%}"
    heats = torch.stack(heats).cpu()
    draw_panel(folder / f"{stem}_panel.png", x[0].cpu(), heats, records, title, args.method)
    points = args.steps if args.method == "integrated" else 1
    record = {
        "path": photo,
        "target": label,
        "class_name": classifier.classes[label],
        "probability": probability,
        "seconds": round(time.time() - started, 2),
        "evaluations": points * sum(record["samples"] for record in records),
        "top5": top5,
        "maps": records,
        "panel": f"{stem}_panel.png",
    }
    return record, chunk


def describe_map(record, probability, method):
    """Say in one line what a map is worth."""
    name = f"{record['noise'] * 100:g} % noise" if record["noise"] else method
    line = (f"{name}: p {100 * probability:.1f} → {100 * record['probability_left']:.1f} % without "
            "its top 10 % of pixels "
            f"(random: {100 * record['probability_left_random']:.1f} %)")  # fmt: skip
    if record["noise"]:
        line += f", reliability {record['reliability']:.2f}, n = {record['samples']}"
    return line


def draw_panel(path, photo, heats, records, title, method):
    """Draw the photo and each map; below, each map laid over the photo, and what it is worth.

    :param pathlib.Path path: the PNG file
    :param torch.Tensor photo: (C, H, W), in [0, 1]
    :param torch.Tensor heats: maps in [0, 1], (maps, H, W)
    :param list[dict] records: of the maps, as in metrics.json
    :param str title: the class and its probability
    :param str method: name of the map without noise
    """
    pixels = to_pixels(photo)
    upper = [add_title(pixels, "photo")]
    words = "below: probability left\nwhen the top 10 %\nof pixels are blurred\n(random 10 %)"
    white = np.full_like(pixels[len(pixels) // 2 :], 255)
    lower = [add_title(white, words, below=True)]
    for heat, record in zip(heats, records, strict=True):
        noisy = f"{record['noise'] * 100:g} % noise, n = {record['samples']}"
        trust = f"reliability {record['reliability']:.2f}"
        left = f"{record['probability_left']:.1%} ({record['probability_left_random']:.1%})"
        upper.append(add_title(to_grey(heat), noisy if record["noise"] else method))
        worth = f"{left}\n{trust}" if record["noise"] else left
        lower.append(add_title(lay_over(photo, heat), worth, below=True))
    upper = side_by_side(upper)
    gap = np.full_like(upper[:8], 255)
    panel = np.concatenate([upper, gap, side_by_side(lower)])
    save_png(path, add_title(panel, to_line(title, 80), size=15))


def to_row(record):
    """Turn the record of a photo into a row of metrics.csv."""
    row = {name: record[name] for name in ("path", "target", "class_name", "probability",
                                           "seconds", "evaluations")}  # fmt: skip
    for found in record["maps"]:
        noise = f"{found['noise'] * 100:g}"
        for name in ("samples", "reliability", "probability_left", "probability_left_random"):
            row[f"{name}_{noise}"] = found[name]
    return row


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
    group.add_argument("--method", default="gradient", choices=METHODS,
                       help="the map that is averaged (default: %(default)s)")
    group.add_argument("--noise", nargs="+", type=number(float, 0, 10), default=[0.0, 0.1, 0.3],
                       help="sigma as a fraction of the photo's range; one map for each "
                            "(default: 0 0.1 0.3)")
    group.add_argument("--samples", type=positive_int, default=100,
                       help="noisy copies per map (default: %(default)s)")
    group.add_argument("--converge", type=number(float, 0.01, 0.9999), metavar="R",
                       help="instead of --samples, go on until the map's reliability is R, for "
                            f"example 0.95, or until {MAX_SAMPLES} samples")
    group.add_argument("--reduce", default="signed", choices=REDUCE,
                       help="mean of the gradient, as in the paper; of its absolute value; of its "
                            "square; its variance (default: %(default)s)")
    group.add_argument("--score", default="logit", choices=("logit", "probability", "loss"),
                       help="what is differentiated (default: %(default)s)")
    group.add_argument("--baseline", default="black", choices=("black", "mean", "blurred", "noise"),
                       help="where Integrated Gradients starts (default: %(default)s)")
    group.add_argument("--steps", type=number(int, 1, 100_000), default=128,
                       help="of Integrated Gradients; averaged over noisy copies, 8 are enough "
                            "(default: %(default)s)")
    group.add_argument("--seed", type=seed_int, default=0,
                       help="same seed, same machine, same result (default: %(default)s)")
    group.add_argument("--cuda", action="store_true", help="use the GPU, if there is one")
    group.add_argument("--device", metavar="NAME", help="any other device: mps, xpu, cuda:1")
    group.add_argument("--chunk", type=number(int, 1, 4096),
                       help="images computed at once: memory and speed, not the result "
                            "(default: 8 on a CPU, up to 64 on a GPU)")

    group = parser.add_argument_group("output")
    group.add_argument("--out", help=f"new run folder (default: runs/{SCRIPT}/DATE-TIME)")
    group.add_argument("--resume", metavar="RUN", help="go on with the photos that a run lacks")
    group.add_argument("--gif", action="store_true", help="show the maps forming")
    group.add_argument("--dry-run", action="store_true", help="two samples, to see that all works")
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
        args.samples = 2
        args.steps = 2
        args.converge = None
    args.noise = list({f"{100 * noise:g}": noise for noise in args.noise}.values())  # each once
    photos = find_photos(args.image)
    device = set_up(args.cuda, args.seed, args.device)
    if args.arch:
        classifier = load_weights(args.model, args.arch, args.classes, device)
    else:
        classifier = load_classifier(args.model, device)
    classifier = check_classifier(classifier)
    # What is wrong with the arguments, and not with a photo, is said before the first one.
    if args.target is not None:
        find_class(classifier.classes, args.target)
    example = torch.rand(1, classifier.channels, classifier.size, classifier.size).to(device)
    note = ""
    if args.method == "guided":
        note = describe_guiding(classifier.network, example)
    folder = open_run(SCRIPT, args.out, args.resume)
    save_arguments(folder, SCRIPT, args)
    if note and is_first():
        print(f"warning: {note}", file=sys.stderr)
    chunk = args.chunk or find_chunk(args, classifier.network, example)

    def explain(pairs):
        nonlocal chunk  # where memory has run out, smaller for the rest of the photos
        ((photo, stem),) = pairs
        record, chunk = explain_photo(classifier, args, folder, photo, stem, chunk)
        return [record]

    with interruptible(SCRIPT, folder):
        images, failed = explain_photos(photos, folder, explain, check=to_row)
    if not is_first():
        return {}
    write_csv(folder / "metrics.csv", [to_row(record) for record in images])
    if len(photos) > 1:
        panels = {folder / record["panel"]: record["path"] for record in images}
        contact_sheet(folder / "contact_sheet.png", panels, columns=2, side=640)
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
