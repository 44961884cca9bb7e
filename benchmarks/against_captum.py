"""smoothgrad.py beside captum and PAIR's saliency: the same maps, their time, their memory.

    pip install --no-deps -r requirements-dev.txt
    python benchmarks/against_captum.py

All explain the same class of the same photo by the same EfficientNet-Lite0, each in a process of
its own. Ours is as smoothgrad.py runs: set_up() and load_classifier(), hence frozen, BatchNorm
folded, channels last, 8 copies at once. The peers get what a user would give them: timm's network
with the same weights, in eval mode, with the normalisation in front so that their inputs are pixels
too; channels first, nothing folded, nothing frozen, torch as it comes. With --set-up-peers they get
our set_up() as well, that is keep_memory() and no denormal numbers (common/device.py).

Equality: the peers are fed our noise, and each of their maps is compared with ours of the same
definition. Time: each draws its own noise; the processes compute in turn, never at once, round
after round, so that a machine that slows down slows down all. Ratios are taken within each round;
their median is what counts. Memory: of a fresh process for each figure.
"""

import argparse
import contextlib
import copy
import importlib.metadata
import io
import json
import multiprocessing
import resource
import statistics
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import smoothgrad
from common.classifiers import Normalise, load_classifier, load_lite0
from common.device import make_rng, set_up
from common.errors import HelpFormatter
from common.folding import fold
from common.photos import read_photo

NOISE = 0.15  # sigma in parts of the photo's range of values; PAIR's default
CHUNK = 8  # smoothgrad.py's default on a CPU
STEPS = 50  # of Integrated Gradients; captum's default
EQUAL = 0.9999  # correlation from which on two maps are the same

# ------------------------------------------------------------------------- the three, side by side


class Ours:
    """smoothgrad.py's own functions, with its own classifier."""

    def __init__(self, photo):
        classifier = load_classifier()
        self.network = classifier.network
        self.x = read_photo(photo, classifier.resize, classifier.size)
        with torch.no_grad():
            self.target = self.network(self.x).argmax(1)

    def smoothgrad(self, n, reduce="abs", score="logit"):
        """Average n samples and estimate the map's reliability, as every run does."""
        explain = partial(smoothgrad.input_gradient, self.network, kind=score)
        rng = make_rng(self.x.device, 0)
        *_, maps = smoothgrad.smoothgrad(explain, self.x, self.target, NOISE, n, CHUNK, rng)
        maps.reliability(reduce)
        return maps.get(reduce)

    def integrated(self):
        """Integrate from black."""
        explain, black = partial(smoothgrad.input_gradient, self.network), torch.zeros(1)
        return smoothgrad.integrated_gradients(explain, black, STEPS, CHUNK, self.x, self.target)


class Peer:
    """What captum and PAIR have in common: the network as a user has it."""

    def __init__(self, photo):
        network, mean, std, _, _, size, resize = load_lite0()
        self.network = nn.Sequential(Normalise(mean, std), network).eval()
        self.x = read_photo(photo, resize, size)
        with torch.no_grad():
            self.target = int(self.network(self.x).argmax())


class Captum(Peer):
    """captum, called as its documentation does."""

    def smoothgrad(self, n, at_once=None, kind="smoothgrad", **options):
        """NoiseTunnel of Saliency; by default of |M|, and all n copies in one batch."""
        from captum.attr import NoiseTunnel, Saliency

        sigma = NOISE * float(self.x.max() - self.x.min())
        return NoiseTunnel(Saliency(self.network)).attribute(
            self.x, nt_type=kind, nt_samples=n, nt_samples_batch_size=at_once, stdevs=sigma,
            target=self.target, **options,
        )  # fmt: skip

    def integrated(self, at_once=None):
        """Integrate from black, by the midpoint rule as ours does."""
        from captum.attr import IntegratedGradients

        return IntegratedGradients(self.network).attribute(
            self.x, 0, self.target, n_steps=STEPS, method="riemann_middle",
            internal_batch_size=at_once,
        )  # fmt: skip


class Pair(Peer):
    """PAIR's saliency, called as its documentation does: arrays, channels last."""

    def smoothgrad(self, n):
        """Square the gradient of the probability, one copy at a time."""
        from saliency.core import GradientSaliency

        found = GradientSaliency().GetSmoothedMask(
            self.x[0].permute(1, 2, 0).numpy(), self.call_model, stdev_spread=NOISE, nsamples=n
        )
        return torch.from_numpy(found).permute(2, 0, 1)[None]

    def call_model(self, images, call_model_args=None, expected_keys=None):
        """Give the gradient of the probability, (N, H, W, C)."""
        x = torch.tensor(images, dtype=torch.float32).permute(0, 3, 1, 2).requires_grad_()
        probability = self.network(x).softmax(1)[:, self.target]
        gradient = torch.autograd.grad(probability.sum(), x)[0]
        return {expected_keys[0]: gradient.permute(0, 2, 3, 1).numpy()}


@contextlib.contextmanager
def our_noise(shape):
    """Let captum and PAIR, in this block, draw the noise that ours draws.

    :param torch.Size shape: of one image, (C, H, W)
    """
    rng = make_rng(torch.device("cpu"), 0)

    def for_captum(mean, std):
        return torch.stack([torch.randn(shape, generator=rng) for _ in std]) * std

    def for_pair(mean, std, size):
        return torch.randn(shape, generator=rng).permute(1, 2, 0).numpy() * std

    with mock.patch("torch.normal", for_captum), mock.patch("numpy.random.normal", for_pair):
        yield


# ------------------------------------------------------------------------ processes of their own


def peak():
    """Tell the most memory that this process has held, in MB."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def open_worker(side, args):
    """Start a fresh process, with nothing of this one, for one side.

    :param type side: Ours, Captum or Pair
    :param argparse.Namespace args: the photo, and whether peers get our set_up()
    """
    with_set_up = side is Ours or args.set_up_peers
    return ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), start, (side, args.image, with_set_up)
    )


def start(side, photo, with_set_up):
    """Load everything, in the new process."""
    global SIDE
    if with_set_up:
        with contextlib.redirect_stdout(io.StringIO()):
            set_up(False, seed=0)
    SIDE = side(photo)


def call(method, *args, noise=False, **options):
    """Call a method of the side, in its process.

    :param bool noise: whether to draw our noise
    :return: the seconds, the map, the process's peak memory in MB
    :rtype: tuple[float, numpy.ndarray, float]
    """
    with our_noise(SIDE.x.shape[1:]) if noise else contextlib.nullcontext():
        started = time.perf_counter()
        found = getattr(SIDE, method)(*args, **options)
        return time.perf_counter() - started, found.numpy(), peak()


# ------------------------------------------------------------------------------ what is measured


def measure_memory(args):
    """Measure the peak memory of each method in a process of its own.

    :return: figures for the RESULT line
    :rtype: dict
    """
    n, result = args.samples, {}
    print(f"{'peak memory, MB':34s} {'loaded':>7s} {'in the end':>11s} {'increase':>9s}")
    for side, count, at_once in (
        (Ours, 50, ()), (Ours, n, ()), (Ours, args.most_samples, ()),
        (Captum, n, ()), (Captum, n, (10,)), (Pair, n, ()),
    ):  # fmt: skip
        with open_worker(side, args) as worker:
            loaded = worker.submit(peak).result()
            end = worker.submit(call, "smoothgrad", count, *at_once).result()[2]
        name = side.__name__.lower() + "".join(f", {k} at once" for k in at_once)
        print(f"{f'{name}, n = {count}':34s} {loaded:7,.0f} {end:11,.0f} {end - loaded:9,.0f}")
        key = f"mb_{name}_{count}".replace(", ", "_").replace(" ", "_")
        result |= {key: round(end), f"{key}_increase": round(end - loaded)}
    return result


def compare_maps(workers, n):
    """Correlate each map of the peers with ours of the same definition and the same noise.

    :return: figures for the RESULT line
    :rtype: dict
    """
    ours, captum, pair = workers
    chunks = {"at_once": 10}
    signed = {"at_once": 10, "abs": False}
    smooth = ("smoothgrad", n)
    pairs = {
        "captum, abs=True = --reduce abs": ((captum, smooth, chunks), (*smooth, "abs")),
        "captum, abs=False = --reduce signed": ((captum, smooth, signed), (*smooth, "signed")),
        "captum, vargrad = --reduce variance": (
            (captum, smooth, signed | {"kind": "vargrad"}), (*smooth, "variance")),
        "PAIR = --reduce squared --score probability": (
            (pair, smooth, {}), (*smooth, "squared", "probability")),
        "captum, IntegratedGradients = --method integrated": (
            (captum, ("integrated", CHUNK), {}), ("integrated",)),
    }  # fmt: skip
    print("\ncorrelation with ours, the noise being the same")
    found = {}
    for name, ((peer, args, options), same) in pairs.items():
        a = peer.submit(call, *args, noise=True, **options).result()[1]
        b = ours.submit(call, *same).result()[1]
        found[name] = float(np.corrcoef(a.ravel(), b.ravel())[0, 1])
        print(f"{name:52s} {found[name]:.7f}")
    if not min(found.values()) >= EQUAL:
        sys.exit(f"the maps differ: r is {min(found.values())}, not {EQUAL} or more")
    return {"r_min": round(min(found.values()), 7)}


def compare_guided(args):
    """Compare Guided Backpropagation on a SqueezeNet with random weights.

    Its ReLUs are modules that are used once each, and captum gets them not in place, as it needs
    it; ours needs neither.

    :return: figures for the RESULT line
    :rtype: dict
    """
    from captum.attr import GuidedBackprop
    from torchvision.models import squeezenet1_1

    torch.manual_seed(0)
    plain, x = squeezenet1_1(weights=None).eval(), read_photo(args.image, 256, 224)
    network = fold(plain, x).requires_grad_(False)
    gradient = partial(smoothgrad.input_gradient, network)
    ours = smoothgrad.guided_backprop(gradient, x, torch.tensor([0]))
    plain = copy.deepcopy(plain)
    for module in plain.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it sets hooks
        theirs = GuidedBackprop(plain).attribute(x, 0)
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    print(f"Guided Backpropagation: largest difference {difference:.1e} of the largest value")
    return {"guided_difference": difference}


def measure_time(workers, args):
    """Let all take turns.

    :return: figures for the RESULT line
    :rtype: dict
    """
    (ours, captum, pair), n, result = workers, args.samples, {}
    calls = {  # each peer is measured against ours of the same definition, the last one above it
        "ours": (ours, "smoothgrad", n),
        "captum, default": (captum, "smoothgrad", n),
        "captum, 10 at once": (captum, "smoothgrad", n, 10),
        "ours, squared probability": (ours, "smoothgrad", n, "squared", "probability"),
        "PAIR": (pair, "smoothgrad", n),
        "ours, IG": (ours, "integrated"),
        "captum, IG": (captum, "integrated"),
        "captum, IG, 8 at once": (captum, "integrated", CHUNK),
    }
    seconds = {name: [] for name in calls}
    for turn in range(args.rounds + 1):
        for name, (worker, *how) in calls.items():
            taken = worker.submit(call, *how).result()[0]
            if turn:  # the first warms up: memory, kernels
                seconds[name].append(taken)

    def spread(values):
        return f"({min(values):.2f} - {max(values):.2f})"

    print(f"\n{f'seconds, n = {n}, IG {STEPS} steps':30s} {'median':>7s} {'(min - max)':>16s} "
          f"{'to ours':>8s} {'(min - max)':>15s}")  # fmt: skip
    for name, times in seconds.items():
        key = name.replace(", ", "_").replace(" ", "_").lower()
        line = f"{name:30s} {statistics.median(times):7.2f} {spread(times):>16s}"
        result[f"seconds_{key}"] = round(statistics.median(times), 3)
        if name.startswith("ours"):
            base = times
        else:
            ratios = [a / b for a, b in zip(times, base, strict=True)]
            line += f" {statistics.median(ratios):8.2f} {spread(ratios):>15s}"
            result[f"ratio_vs_{key}"] = round(statistics.median(ratios), 2)
        print(line)
    return result


def get_parser():
    """Build the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parts = ["memory", "maps", "time"]
    parser.add_argument("--image", default="sample:coffee", help="a photo, or sample:NAME")
    parser.add_argument("--samples", type=int, default=100, help="noisy copies per map")
    parser.add_argument("--most-samples", type=int, default=5000, help="of ours, for the memory")
    parser.add_argument("--rounds", type=int, default=5, help="how often all take turns")
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts, help="what to measure")
    parser.add_argument("--set-up-peers", action="store_true", help="with our memory settings too")
    return parser


def main():
    """Measure memory, maps and time, and print tables and a RESULT line."""
    args, result = get_parser().parse_args(), {}
    for package in ("torch", "captum", "saliency"):
        print(package, importlib.metadata.version(package), end="; ")
    print(torch.get_num_threads(), "threads")
    if "memory" in args.parts:  # first, as a new process may start with the peak of its parent
        result |= measure_memory(args)
    workers = [open_worker(side, args) for side in (Ours, Captum, Pair)]
    if "maps" in args.parts:
        result |= compare_maps(workers, args.samples) | compare_guided(args)
    if "time" in args.parts:
        result |= measure_time(workers, args)
    for worker in workers:
        worker.shutdown()
    print("RESULT", json.dumps(result))


if __name__ == "__main__":
    main()
