"""compare_explanations.py beside captum, pytorch-grad-cam and TorchRay: what maps are worth.

    pip install --no-deps -r requirements-dev.txt
    python benchmarks/against_peers.py

All explain the same class of the same photos by the same EfficientNet-Lite0, each library in a
process of its own. Ours is as compare_explanations.py runs. The peers get what a user would give
them: timm's network with the same weights, in eval mode, channels first, nothing folded, nothing
frozen, torch as it comes. For captum and pytorch-grad-cam the normalisation is a layer in front, so
that noise and baselines mean what ours mean; TorchRay blurs and masks normalised pictures.

As many samples (50 of 15 % noise; captum's 10 at once, which is faster than its default), steps
(64) and masks (500) for all. TorchRay's RISE, and its extremal perturbation of 800 iterations for
one area, explain the first --slow photos only.

On each photo the methods take turns, one at a time, in an order that is drawn for each photo. All
maps are judged alike, by our network, with the areas of compare_explanations.py. Time is that of
the processor, so that other programs matter little; with OMP_NUM_THREADS=1 it is that of a clock.
Before that our max-sensitivity is held against captum's, on the same nudges.
"""

import argparse
import contextlib
import importlib.metadata
import io
import json
import multiprocessing
import random
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import compare_explanations as compare
from common.classifiers import Normalise, load_classifier, load_lite0
from common.deletion import area, blur, probability_curve
from common.device import make_rng, set_up
from common.errors import HelpFormatter
from common.photos import SAMPLES, find_photos, read_photo
from common.tables import summarise, to_markdown
from smoothgrad import over_channels

SAMPLES_OF_NOISE, STEPS, MASKS = 50, 64, 500  # those of compare_explanations.py
AT_ONCE = 10  # of captum's samples; 8 of Integrated Gradients
SLOW = (("TorchRay", "RISE"), ("TorchRay", "extremal perturbation"))
COLUMNS = {"deletion": "low", "insertion": "high", "CPU seconds": "low", "evaluations": "low"}


# ------------------------------------------------------------------------------------ the libraries


class Ours:
    """compare_explanations.py's own methods, with its own classifier."""

    packages = ()
    methods = (
        "gradient", "SmoothGrad signed", "SmoothGrad abs", "Integrated Gradients",
        "Guided Backpropagation", "Grad-CAM", "RISE", "perturbation, nested",
    )  # fmt: skip

    def __init__(self):
        with contextlib.redirect_stdout(io.StringIO()):
            set_up(False, seed=0)
        self.network = load_classifier().network

    def explain(self, name, x, target):
        """Rank the pixels of a photo, (1, C, H, W): (H, W)."""
        return compare.METHODS[name](self.network, x, target, make_rng("cpu", 0, 0))


class Peer:
    """What the others have in common: the network as a user has it."""

    def __init__(self):
        network, self.mean, self.std, *_ = load_lite0()
        self.network = nn.Sequential(Normalise(self.mean, self.std), network).eval()

    def explain(self, name, x, target):
        """Rank the pixels of a photo, (1, C, H, W): (H, W)."""
        torch.manual_seed(0)
        try:
            return type(self).methods[name](self, x, int(target))
        finally:
            self.network.requires_grad_(True)  # TorchRay freezes the network, and leaves it so


class Captum(Peer):
    """captum, called as its documentation does."""

    packages = ("captum",)

    def smoothgrad(self, x, target, signed):
        """Average the gradient, or its absolute value, over noisy copies."""
        from captum.attr import NoiseTunnel, Saliency

        sigma = compare.NOISE * float(x.max() - x.min())
        return over_channels(NoiseTunnel(Saliency(self.network)).attribute(
            x, nt_type="smoothgrad", nt_samples=SAMPLES_OF_NOISE, nt_samples_batch_size=AT_ONCE,
            stdevs=sigma, target=target, abs=not signed))[0]  # fmt: skip

    def integrated(self, x, target):
        """Integrate from black, by its default rule."""
        from captum.attr import IntegratedGradients

        found = IntegratedGradients(self.network)
        found = found.attribute(x, 0, target, n_steps=STEPS, internal_batch_size=8)
        return over_channels(found)[0].float()

    def guided(self, x, target):
        """Guide the ReLUs that are of the type nn.ReLU."""
        from captum.attr import GuidedBackprop

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it sets hooks
            return over_channels(GuidedBackprop(self.network).attribute(x, target))[0]

    methods: ClassVar = {
        "SmoothGrad signed": lambda self, x, target: self.smoothgrad(x, target, True),
        "SmoothGrad abs": lambda self, x, target: self.smoothgrad(x, target, False),
        "Integrated Gradients": integrated,
        "Guided Backpropagation": guided,
    }


class GradCam(Peer):
    """pytorch-grad-cam, called as its documentation does, at the last feature maps."""

    packages = ("grad-cam",)

    def cam(self, x, target, kind):
        """Weight the last feature maps."""
        import pytorch_grad_cam
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        layers = [self.network[1].bn2]
        with getattr(pytorch_grad_cam, kind)(model=self.network, target_layers=layers) as cam:
            return torch.from_numpy(cam(x, [ClassifierOutputTarget(target)])[0])

    methods: ClassVar = {
        "Grad-CAM": lambda self, x, target: self.cam(x, target, "GradCAM"),
        "Grad-CAM++": lambda self, x, target: self.cam(x, target, "GradCAMPlusPlus"),
        "Layer-CAM": lambda self, x, target: self.cam(x, target, "LayerCAM"),
    }


class TorchRay(Peer):
    """TorchRay, called as its examples do, on normalised pictures."""

    packages = ("torchray",)

    def cam(self, x, target):
        """Weight the last feature maps."""
        from torchray.attribution.grad_cam import grad_cam

        x = self.network[0](x)
        return grad_cam(self.network[1], x, target, saliency_layer="bn2", resize=True)[0, 0]

    def guided(self, x, target):
        """Guide the ReLUs that are torch.relu."""
        from torchray.attribution.guided_backprop import guided_backprop

        return guided_backprop(self.network[1], self.network[0](x), target)[0, 0]

    def rise(self, x, target):
        """Average random masks."""
        from torchray.attribution.rise import rise

        return rise(self.network[1], self.network[0](x), num_masks=MASKS, batch_size=8)[0, target]

    def extremal(self, x, target):
        """Learn one mask of a tenth of the picture that keeps the class."""
        from torchray.attribution.extremal_perturbation import extremal_perturbation

        return extremal_perturbation(self.network[1], self.network[0](x), target)[0][0, 0]

    methods: ClassVar = {
        "Grad-CAM": cam,
        "Guided Backpropagation": guided,
        "RISE": rise,
        "extremal perturbation": extremal,
    }


# ------------------------------------------------------------------------ processes of their own


def start(side):
    """Load everything, in the new process, and let it warm up."""
    global SIDE, EVALUATIONS
    SIDE, EVALUATIONS = side(), []
    SIDE.network[1].register_forward_pre_hook(lambda _, x: EVALUATIONS.append(len(x[0])))
    warm = "gradient" if side is Ours else next(iter(side.methods))
    SIDE.explain(warm, torch.rand(1, 3, 224, 224), torch.tensor([0]))


def call(name, x, target):
    """Make one map in the library's process.

    :return: the map, (H, W); CPU seconds, and the pictures that the network evaluated
    :rtype: tuple[torch.Tensor, float, int]
    """
    EVALUATIONS.clear()
    began = time.process_time()
    heat = SIDE.explain(name, x, target)
    return heat.detach().numpy(), time.process_time() - began, sum(EVALUATIONS)


def take_turns(sides, number, slow):
    """Draw the order of all methods on one photo.

    :param dict[str, type] sides: the libraries by name
    :param int number: of the photo: the same number, the same order
    :param bool slow: whether the slowest methods have a turn
    :return: pairs of library and method
    :rtype: list[tuple[str, str]]
    """
    turns = [(library, name) for library, side in sides.items() for name in side.methods]
    turns = [turn for turn in turns if slow or turn not in SLOW]
    return random.Random(number).sample(turns, len(turns))


# ------------------------------------------------------------------------------ what is measured


def judge(network, x, target, heat):
    """Measure what a map is worth: deletion and insertion, both fills averaged."""
    fills, found = (blur(x), x.mean((2, 3), keepdim=True).expand_as(x)), {}
    for game in ("deletion", "insertion"):
        curves = [probability_curve(network, x, target, heat, fill, game == "insertion")
                  for fill in fills]  # fmt: skip
        found[game] = sum(map(area, curves)) / len(curves)
    return found


def compare_sensitivity(network, x, target):
    """Hold our max-sensitivity of the plain gradient against captum's, on the same nudges.

    :return: the largest relative difference
    :rtype: float
    """
    from captum.metrics import sensitivity_max

    def explain(x):
        return compare.METHODS["gradient"](network, x, target, None)

    def explain_all(x):  # captum gives the photo as a tuple, and wants one back
        x = x[0] if isinstance(x, tuple) else x
        return (torch.stack([explain(one[None]) for one in x]),)

    rng = make_rng("cpu", 0)
    nudged = [compare.nudge(x, rng) for _ in range(3)]
    ours = compare.max_sensitivity(explain(x), [explain(one) for one in nudged])
    theirs = sensitivity_max(explain_all, x, lambda _: torch.cat(nudged), n_perturb_samples=3)
    return abs(ours - float(theirs)) / float(theirs)


def get_parser():
    """Build the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    samples, libraries = [f"sample:{name}" for name in SAMPLES], list(LIBRARIES)
    parser.add_argument("--image", nargs="+", default=samples, help="photos or folders of them")
    parser.add_argument("--every", type=int, default=1, help="take only every so many-th photo")
    parser.add_argument("--libraries", nargs="+", default=libraries, choices=libraries,
                        metavar="NAME", help="some of them")  # fmt: skip
    parser.add_argument("--slow", type=int, default=1, metavar="N",
                        help="photos, from the first one on, for the slowest methods")  # fmt: skip
    parser.add_argument("--out", help="write the numbers of all photos to this JSON file")
    return parser


def main():
    """Let all take turns on each photo, and print a table and a RESULT line."""
    args = get_parser().parse_args()
    for package in ("torch", *(p for name in args.libraries for p in LIBRARIES[name].packages)):
        print(package, importlib.metadata.version(package), end="; ")
    print(torch.get_num_threads(), "threads")
    sides, context = {n: LIBRARIES[n] for n in args.libraries}, multiprocessing.get_context("spawn")
    workers = {
        name: ProcessPoolExecutor(1, context, start, (side,)) for name, side in sides.items()
    }
    classifier, images, result = load_classifier(), [], {}
    network = classifier.network
    for number, photo in enumerate(find_photos(args.image)[:: args.every]):
        x = read_photo(photo, classifier.resize, classifier.size)
        with torch.no_grad():
            target = network(x).argmax(1)
        if "captum" in sides and number == 0:
            difference = compare_sensitivity(network, x, target)
            print(f"max-sensitivity: ours differs from captum's by {difference:.1e} of it")
            if not difference < 1e-4:
                sys.exit("max-sensitivity differs from captum's")
            result["sensitivity_difference"] = difference
        rows, heats = {}, {}
        for library, name in take_turns(sides, number, number < args.slow):
            heat, seconds, evaluations = workers[library].submit(call, name, x, target).result()
            heats[library, name] = heat
            rows[f"{name}: {library}"] = judge(network, x, target, torch.from_numpy(heat)) | {
                "CPU seconds": seconds, "evaluations": evaluations}  # fmt: skip
        for library, name in heats.keys() - {("ours", name) for name in Ours.methods}:
            if ("ours", name) in heats:
                pair = heats[library, name].ravel(), heats["ours", name].ravel()
                rows[f"{name}: {library}"]["r"] = float(np.corrcoef(*pair)[0, 1])
        images.append({"path": photo, "methods": rows})
        print(f"{photo}: {sum(row['CPU seconds'] for row in rows.values()):.0f} s", flush=True)
        if args.out:
            Path(args.out).write_text(json.dumps(images, indent=1) + "\n")
    for worker in workers.values():
        worker.shutdown()
    table = summarise(images, [*COLUMNS, "r"])
    table = dict(sorted(table.items()))  # a method's libraries side by side
    few = [name for name, row in table.items() if row["deletion"][2] < len(images)]
    print("\n".join(to_markdown(table, COLUMNS, few)))  # one that had few photos can't win
    alike = [f"{name} {row['r'][0]:.3f}" for name, row in table.items() if "r" in row]
    print("correlation with our map of that name:", ", ".join(alike) or "none")
    for name, row in table.items():
        key = name.lower().replace(":", "").replace(",", "").replace(" ", "_")
        result |= {f"{c.replace(' ', '_')}_{key}": round(v[0], 4) for c, v in row.items()}
    print("RESULT", json.dumps(result))


LIBRARIES = {"ours": Ours, "captum": Captum, "grad-cam": GradCam, "TorchRay": TorchRay}

if __name__ == "__main__":
    main()
