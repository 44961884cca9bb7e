"""smoothgrad.py beside captum and PAIR's saliency: the same maps, their time, their memory.

    pip install --no-deps -r requirements-dev.txt
    python benchmarks/against_captum.py

All explain the same class of the same photo by the same EfficientNet-Lite0, each in a process of
its own. Ours is as smoothgrad.py runs: set_up() and load_classifier(), hence frozen, BatchNorm
folded, channels last, 8 copies at once. The peers get what a user would give them: the network
with the same weights, in eval mode, with the normalisation in front so that their inputs are pixels
too; channels first, nothing folded, nothing frozen, torch as it comes.

With --cuda all compute on the GPU; ours in chunks of up to 64, each a graph, and memory is what the
GPU has reserved for a process.

Equality: the peers are fed our noise, and each of their maps is compared with ours of the same
definition. Time: each draws its own noise; the processes compute in turn, never at once, round
after round, so that a machine that slows down slows down all. Ratios are taken within each round;
their median is what counts. Memory: of a fresh process for each figure.

    python benchmarks/against_captum.py --samples 24 --rounds 15 --changes

times ours with each of its speed tricks taken back, alone and all together, each in a process of
its own; "nothing" tells how much of a difference is none.
"""

import argparse
import contextlib
import copy
import importlib.metadata
import io
import json
import multiprocessing
import random
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
from common.classifiers import (
    Classifier,
    Normalise,
    load_classifier,
    load_lite0,
    load_torchvision,
    prepare,
)
from common.device import make_rng, set_up, split_evenly, wait_for
from common.errors import UserError, exit_code, positive_int
from common.fast import fold, is_plain, replaying
from common.photos import read_photo

PHOTO = "sample:coffee"
NOISE = 0.15  # sigma as a fraction of the photo's range; PAIR's default
CHUNK = 8  # smoothgrad.py's default on a CPU
GPU_CHUNK = 64  # and the most on a GPU
STEPS = 50  # of Integrated Gradients; captum's default
EQUAL = 0.9999  # correlation from which on two maps are the same
PATCHES = {  # what takes a trick back: a name, and what it is to mean
    "memory not kept": ("common.device.keep_memory", lambda: None),
    "denormals not flushed": ("torch.set_flush_denormal", lambda _: None),
    "BatchNorm not folded": ("common.fast.NORMS", ()),  # then no ReLU is next to its convolution
    "ReLU not fused": ("common.fast.LIMITS", {}),
    "padding not fused": (
        "common.fast.is_plain", lambda layer: type(layer) is nn.Conv2d and is_plain(layer)),
    "channels first": ("torch.channels_last", torch.contiguous_format),
}  # fmt: skip
CHANGES = ("nothing", *PATCHES, "all of these")


# ------------------------------------------------------------------------- the three, side by side


class Ours:
    """smoothgrad.py's own functions, with its own classifier."""

    def __init__(self, device, model="efficientnet_lite0"):
        if model == "efficientnet_lite0":
            self.classifier = load_classifier(device=device)
        else:  # with random weights: none are at hand
            torch.manual_seed(0)
            self.classifier = prepare(model, device, *load_torchvision(model, classes=1000))

    def smoothgrad(self, x, target, n, reduce="abs", score="logit"):
        """Average n samples and estimate the map's reliability, as every run does."""
        chunk = self.choose_chunk(n)
        replay = replaying(smoothgrad.gradient, chunk)

        def explain(network, x, target):
            return replay(network, x, target, score)

        rng = make_rng(x.device, 0)
        network = self.classifier.network
        means = smoothgrad.average_maps(network, x, target, NOISE, n, explain, chunk, rng)
        means.reliability(reduce)
        return means.get(reduce)

    def integrated(self, x, target):
        """Integrate from black."""
        network = self.classifier.network
        chunk = self.choose_chunk(STEPS)
        return smoothgrad.integrated_gradients(
            network, x, target, steps=STEPS, chunk=chunk,
            explain=replaying(smoothgrad.gradient, chunk),
        )  # fmt: skip

    def choose_chunk(self, n):
        """Choose what smoothgrad.py does where memory isn't short."""
        return CHUNK if self.classifier.device.type == "cpu" else split_evenly(n, GPU_CHUNK)


class Peer:
    """What the others have in common: the network as a user has it."""

    def __init__(self, device):
        network, mean, std, classes, size, transform = load_lite0()
        network = nn.Sequential(Normalise(mean, std), network).eval().to(device)
        self.classifier = Classifier("plain", network, classes, 3, size, size, device, transform)


class Captum(Peer):
    """captum, called as its documentation does."""

    def smoothgrad(self, x, target, n, at_once=None, kind="smoothgrad", **options):
        """NoiseTunnel of Saliency; by default of |M|, and all n copies in one batch."""
        from captum.attr import NoiseTunnel, Saliency

        sigma = NOISE * float(x.max() - x.min())
        return NoiseTunnel(Saliency(self.classifier.network)).attribute(
            x, nt_type=kind, nt_samples=n, nt_samples_batch_size=at_once, stdevs=sigma,
            target=target, **options,
        )  # fmt: skip

    def integrated(self, x, target, at_once=None, steps=STEPS, method="riemann_middle"):
        """Integrate from black, by the midpoint rule as ours does."""
        from captum.attr import IntegratedGradients

        return IntegratedGradients(self.classifier.network).attribute(
            x, 0, target, n_steps=steps, method=method, internal_batch_size=at_once
        )


class Pair(Peer):
    """PAIR's saliency, called as its documentation does: arrays, channels last."""

    def smoothgrad(self, x, target, n):
        """Square the gradient of the probability, one copy at a time."""
        from saliency.core import GradientSaliency

        pixels = x[0].permute(1, 2, 0).cpu().numpy()
        call_model = partial(self.call_model, target)
        found = GradientSaliency().GetSmoothedMask(
            pixels, call_model, stdev_spread=NOISE, nsamples=n
        )
        return torch.from_numpy(found).permute(2, 0, 1).unsqueeze(0)

    def call_model(self, target, images, call_model_args=None, expected_keys=None):
        """Give the gradient of the probability, (N, H, W, C)."""
        x = torch.tensor(images, dtype=torch.float32, device=self.classifier.device)
        x = x.permute(0, 3, 1, 2).requires_grad_()
        probability = self.classifier.network(x).softmax(1)[:, target]
        (gradient,) = torch.autograd.grad(probability.sum(), x)
        return {expected_keys[0]: gradient.permute(0, 2, 3, 1).cpu().numpy()}


@contextlib.contextmanager
def our_noise(x):
    """Let captum and PAIR, in this block, draw the noise that ours draws for an image."""
    draws = smoothgrad.Noise(x, make_rng(x.device, 0))

    def for_captum(mean, std):
        return draws.take(len(std)) * std

    def for_pair(mean, std, size):
        return draws.take(1)[0].permute(1, 2, 0).cpu().numpy() * std

    with mock.patch("torch.normal", for_captum), mock.patch("numpy.random.normal", for_pair):
        yield


# ------------------------------------------------------------------------ processes of their own


def open_worker(side, cuda, change=None, **options):
    """Start a fresh process, with nothing of this one, for one side.

    :param type side: Ours, Captum or Pair
    :param bool cuda: whether on the GPU
    :param str change: one of CHANGES, for ours
    :param options: of the side
    """
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, context, start, (side, cuda, change, options))


def start(side, cuda, change, options):
    """Load everything, in the new process."""
    global SIDE, X, TARGET
    for name, patch in PATCHES.items():
        if change in (name, "all of these"):
            mock.patch(*patch).start()
    if side is Ours:
        with contextlib.redirect_stdout(io.StringIO()):
            set_up(cuda, seed=0)
    device = torch.device("cuda" if cuda else "cpu")
    SIDE = side(device, **options)
    X = read_photo(PHOTO, SIDE.classifier).to(device)
    with torch.no_grad():
        TARGET = SIDE.classifier.network(X).argmax(1)


def call(method, *args, noise=False, **options):
    """Call a method of the side, in its process.

    :param bool noise: whether to draw our noise
    :return: the seconds, the map, the process's peak memory in MB
    :rtype: tuple[float, numpy.ndarray, float]
    """
    target = TARGET if isinstance(SIDE, Ours) else int(TARGET)
    with our_noise(X) if noise else contextlib.nullcontext():
        wait_for(X.device)
        began = time.perf_counter()
        found = getattr(SIDE, method)(X, target, *args, **options)
        wait_for(X.device)
        return time.perf_counter() - began, found.cpu().numpy(), peak()


def peak():
    """Tell the most memory that this process has held, in MB; on a GPU, of the GPU's."""
    if X.device.type == "cuda":  # what it reserves, as a graph's memory belongs to nobody else
        return torch.cuda.max_memory_reserved() / 1e6
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


# ------------------------------------------------------------------------------ what is measured


def print_versions(packages):
    """Print the versions of what is compared.

    :param list[str] packages: names
    :raises UserError: if one isn't installed
    """
    try:
        versions = [f"{package} {importlib.metadata.version(package)}" for package in packages]
    except importlib.metadata.PackageNotFoundError as error:
        install = "pip install --no-deps -r requirements-dev.txt"
        raise UserError(f"no {error.name} to compare with: {install}") from error
    print("; ".join([*versions, f"{torch.get_num_threads()} threads"]))


def measure_memory(n, cuda):
    """Measure the peak memory of each side in a process of its own.

    :param int n: noisy copies
    :param bool cuda: whether on the GPU
    :return: figures for the RESULT line
    :rtype: dict
    """
    result = {}
    print(f"{'peak memory, MB':34s} {'loaded':>7s} {'in the end':>11s} {'increase':>9s}")
    for name, side, *how in (
        ("ours", Ours, n // 2),
        ("ours", Ours, n),
        ("ours", Ours, 50 * n),
        ("captum", Captum, n),
        ("captum, 10 at once", Captum, n, 10),
        ("pair", Pair, n),
    ):
        with open_worker(side, cuda) as worker:
            loaded = worker.submit(peak).result()
            _, _, end = worker.submit(call, "smoothgrad", *how).result()
        title = f"{name}, n = {how[0]}"
        print(f"{title:34s} {loaded:7,.0f} {end:11,.0f} {end - loaded:9,.0f}")
        key = to_key(f"mb_{name}_{how[0]}")
        result[key] = round(end)
        result[f"{key}_increase"] = round(end - loaded)
    return result


def to_key(name):
    """Turn the name of a row into a key of the RESULT line."""
    return name.lower().replace(", ", "_").replace(" ", "_")


def compare_maps(ours, captum, pair, n):
    """Correlate each map of the peers with ours of the same definition and the same noise.

    :param concurrent.futures.Executor ours: the process of ours; captum and pair alike
    :param int n: noisy copies
    :return: figures for the RESULT line
    :rtype: dict
    """
    on_captum = partial(captum.submit, call, "smoothgrad", n, 10, noise=True)
    on_ours = partial(ours.submit, call, "smoothgrad", n)
    pairs = {
        "captum, abs=True = --reduce abs": (on_captum(), on_ours("abs")),
        "captum, abs=False = --reduce signed": (on_captum(abs=False), on_ours("signed")),
        "captum, vargrad = --reduce variance": (
            on_captum("vargrad", abs=False), on_ours("variance")),
        "PAIR = --reduce squared --score probability": (
            pair.submit(call, "smoothgrad", n, noise=True), on_ours("squared", "probability")),
        "captum, IntegratedGradients = --method integrated": (
            captum.submit(call, "integrated", CHUNK), ours.submit(call, "integrated")),
    }  # fmt: skip
    print("\ncorrelation with ours, the noise being the same")
    found = []
    for name, (theirs, same) in pairs.items():
        found.append(correlate(theirs.result()[1], same.result()[1]))
        print(f"{name:52s} {found[-1]:.7f}")
    if not min(found) >= EQUAL:
        raise UserError(f"the maps differ: r is {min(found)}, not {EQUAL} or more")
    return {"r_min": round(min(found), 7)}


def correlate(a, b):
    """Correlate two maps, arrays of the same shape."""
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def compare_guided():
    """Compare Guided Backpropagation on a SqueezeNet with random weights.

    Its ReLUs are modules that are used once each, and captum gets them not in place, as it needs
    it; ours needs neither.

    :return: figures for the RESULT line
    :rtype: dict
    """
    from captum.attr import GuidedBackprop

    torch.manual_seed(0)
    network, *_ = load_torchvision("squeezenet1_1", classes=1000)
    plain = copy.deepcopy(network.eval())
    x = read_photo(PHOTO, Peer("cpu").classifier)
    ours = smoothgrad.guided_backprop(fold(network, x), x, torch.tensor([0]))
    for module in plain.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it sets hooks
        theirs = GuidedBackprop(plain).attribute(x, 0)
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    print(f"Guided Backpropagation: largest difference {difference:.1e} of the largest value")
    return {"guided_difference": difference}


def measure_time(ours, captum, pair, n, rounds, cuda):
    """Let ours and the peers take turns; parameters as of :func:`compare_maps`.

    :param bool cuda: whether on a GPU, where as many as 50 n are timed, too
    :return: figures for the RESULT line
    :rtype: dict
    """
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
    if cuda:
        calls["ours, 50 n"] = (ours, "smoothgrad", 50 * n)
    result = take_turns(calls, rounds, f"seconds, n = {n}, IG {STEPS} steps")
    if cuda:
        result["copies_per_second"] = round(50 * n / result["seconds_ours_50_n"])
    return result


def measure_changes(changes, model, n, rounds):
    """Let ours take turns with itself, one trick or another taken back.

    :param list[str] changes: of CHANGES
    :param str model: the network
    :param int n: noisy copies
    :param int rounds: how often all take turns
    :return: figures for the RESULT line
    :rtype: dict
    """
    calls = {}
    for change in ("ours", *changes):
        worker = open_worker(Ours, False, change, model=model)
        calls[change] = (worker, "smoothgrad", n)
    maps = {name: worker.submit(call, *how).result()[1] for name, (worker, *how) in calls.items()}
    for name, values in maps.items():
        r = correlate(values, maps["ours"])
        if not r >= EQUAL:
            raise UserError(f"{name}: the map differs: r is {r}, not {EQUAL} or more")
    return take_turns(calls, rounds, f"{model}, n = {n}")


def take_turns(calls, rounds, title):
    """Time all calls in turn, round after round, and print a table.

    :param dict calls: by name, the worker and what to call in it; each is compared with the last
        one above it whose name begins with "ours"
    :param int rounds: how many count, after a first one that warms up memory and kernels
    :param str title: of the table
    :return: figures for the RESULT line
    :rtype: dict
    """
    rng = random.Random(0)
    seconds = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name in rng.sample(list(calls), len(calls)):  # whoever comes first may be slower
            worker, *how = calls[name]
            taken, _, _ = worker.submit(call, *how).result()
            if number:
                seconds[name].append(taken)

    def spread(values):
        return f"({min(values):.2f} - {max(values):.2f})"

    result = {}
    print(f"\n{title:32s} {'median':>7s} {'(min - max)':>16s} "
          f"{'to ours':>8s} {'(min - max)':>15s}")  # fmt: skip
    for name, times in seconds.items():
        median = statistics.median(times)
        line = f"{name:32s} {median:7.2f} {spread(times):>16s}"
        result[f"seconds_{to_key(name)}"] = round(median, 3)
        if name.startswith("ours"):
            base = times
        else:
            ratios = [a / b for a, b in zip(times, base, strict=True)]
            ratio = statistics.median(ratios)
            line += f" {ratio:8.2f} {spread(ratios):>15s}"
            result[f"ratio_vs_{to_key(name)}"] = round(ratio, 3)
        print(line)
    return result


# ------------------------------------------------------------------------------------ the script


def get_parser():
    """Build the command line."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,  # so that an error is one line
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--samples", type=positive_int, default=100,
                        help="noisy copies per map (default: %(default)s)")  # fmt: skip
    parser.add_argument("--rounds", type=positive_int, default=5,
                        help="how often all take turns (default: %(default)s)")  # fmt: skip
    parser.add_argument("--cuda", action="store_true", help="on the GPU")
    parser.add_argument("--changes", nargs="*", choices=CHANGES, metavar="CHANGE",
                        help="time ours only, with these taken back: "
                             f"{'; '.join(CHANGES)} (default: all)")  # fmt: skip
    parser.add_argument("--model", default="efficientnet_lite0",
                        choices=("efficientnet_lite0", "resnet18"),
                        help="for --changes (default: %(default)s)")  # fmt: skip
    return parser


def main(argv=None):
    """Measure memory, maps and time, and print tables and a RESULT line.

    :param list[str] argv: the command line; None for sys.argv
    :return: what the RESULT line holds
    :rtype: dict
    """
    args = get_parser().parse_args(argv)
    if args.changes is not None:
        print_versions(["torch"])
        changes = args.changes or CHANGES
        result = measure_changes(changes, args.model, args.samples, args.rounds)
    else:
        print_versions(["torch", "captum", "saliency"])
        # First the memory, as a new process may start with the peak of its parent.
        result = measure_memory(args.samples, args.cuda)
        workers = [open_worker(side, args.cuda) for side in (Ours, Captum, Pair)]
        result.update(compare_maps(*workers, args.samples))
        result.update(compare_guided())
        result.update(measure_time(*workers, args.samples, args.rounds, args.cuda))
    print("RESULT", json.dumps(result))
    return result


if __name__ == "__main__":
    sys.exit(exit_code(main))
