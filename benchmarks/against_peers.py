"""compare_explanations.py beside captum, pytorch-grad-cam and TorchRay: what maps are worth.

    pip install --no-deps -r requirements-dev.txt
    python benchmarks/against_peers.py

All explain the same class of the same photos by the same EfficientNet-Lite0, each library in a
process of its own. Ours is as compare_explanations.py runs. The peers get what a user would give
them: the plain network with the same weights, in eval mode, channels first, nothing folded, nothing
frozen, torch as it comes. For captum and pytorch-grad-cam the normalisation is a layer in front, so
that noise and baselines mean what ours mean; TorchRay blurs and masks normalised pictures.

As many samples (50 of 15 % noise; captum's 10 at once, which is faster than its default), steps
(64) and masks (500) for all. TorchRay's RISE, and its extremal perturbation of 800 iterations for
one area, explain the first photo only.

On each photo the methods take turns, one at a time, in an order that is drawn for each photo. All
maps are judged alike, by our network, with the areas of compare_explanations.py. Time is that of
the processor, so that other programs matter little; with OMP_NUM_THREADS=1 it is that of a clock.
Before that our max-sensitivity is held against captum's, on the same nudges.
"""

import argparse
import contextlib
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

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import compare_explanations as compare
from benchmarks import against_captum
from benchmarks.against_captum import correlate, print_versions
from common.classifiers import load_classifier
from common.device import make_rng, set_up
from common.errors import UserError, exit_code
from common.photos import SAMPLES, find_photos, read_photo
from smoothgrad import blur, over_channels

SAMPLES_OF_NOISE = 50  # this and the next two as in compare_explanations.py
STEPS = 64
MASKS = 500
SLOW = (("TorchRay", "RISE"), ("TorchRay", "extremal perturbation"))  # explain the first photo only
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
        args = argparse.Namespace(methods=[name], seed=0)
        heat, _, _ = compare.rank_pixels(args, self.network, x, target)[name]
        return heat


class Peer(against_captum.Peer):
    """What the others have in common: the network as a user has it."""

    def __init__(self):
        super().__init__()
        self.network = self.classifier.network
        self.normalise, self.plain = self.network

    def explain(self, name, x, target):
        """Rank the pixels of a photo, (1, C, H, W): (H, W)."""
        torch.manual_seed(0)
        try:
            heat = type(self).methods[name](self, x, int(target))
        finally:
            self.network.requires_grad_(True)  # TorchRay freezes the network, and leaves it so
        return heat.detach().float()


class Captum(Peer, against_captum.Captum):
    """captum, called as its documentation does."""

    packages = ("captum",)

    def signed(self, x, target):
        """Average the gradient over noisy copies."""
        return over_channels(self.smoothgrad(x, target, SAMPLES_OF_NOISE, 10, abs=False))[0]

    def absolute(self, x, target):
        """Average the gradient's absolute value."""
        return over_channels(self.smoothgrad(x, target, SAMPLES_OF_NOISE, 10))[0]

    def integrate(self, x, target):
        """Integrate from black, by its default rule."""
        return over_channels(self.integrated(x, target, 8, STEPS, "gausslegendre"))[0]

    def guided(self, x, target):
        """Guide the ReLUs that are of the type nn.ReLU."""
        from captum.attr import GuidedBackprop

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it sets hooks
            return over_channels(GuidedBackprop(self.network).attribute(x, target))[0]

    methods: ClassVar = {
        "SmoothGrad signed": signed,
        "SmoothGrad abs": absolute,
        "Integrated Gradients": integrate,
        "Guided Backpropagation": guided,
    }


class GradCam(Peer):
    """pytorch-grad-cam, called as its documentation does, at the last feature maps."""

    packages = ("grad-cam",)

    def cam(self, x, target, kind="GradCAM"):
        """Weight the last feature maps."""
        import pytorch_grad_cam
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        make = getattr(pytorch_grad_cam, kind)
        with make(model=self.network, target_layers=[self.plain.bn2]) as cam:
            return torch.from_numpy(cam(x, [ClassifierOutputTarget(target)])[0])

    methods: ClassVar = {
        "Grad-CAM": cam,
        "Grad-CAM++": lambda self, x, target: self.cam(x, target, "GradCAMPlusPlus"),
        "Layer-CAM": lambda self, x, target: self.cam(x, target, "LayerCAM"),
    }


class TorchRay(Peer):
    """TorchRay, called as its examples do, on normalised pictures."""

    packages = ("torchray",)

    def cam(self, x, target):
        """Weight the last feature maps."""
        from torchray.attribution.grad_cam import grad_cam

        x = self.normalise(x)
        return grad_cam(self.plain, x, target, saliency_layer="bn2", resize=True)[0, 0]

    def guided(self, x, target):
        """Guide the ReLUs that are torch.relu."""
        from torchray.attribution.guided_backprop import guided_backprop

        return guided_backprop(self.plain, self.normalise(x), target)[0, 0]

    def rise(self, x, target):
        """Average random masks."""
        from torchray.attribution.rise import rise

        return rise(self.plain, self.normalise(x), num_masks=MASKS, batch_size=8)[0, target]

    def extremal(self, x, target):
        """Learn one mask of a tenth of the picture that keeps the class."""
        from torchray.attribution.extremal_perturbation import extremal_perturbation

        masks, _ = extremal_perturbation(self.plain, self.normalise(x), target)
        return masks[0, 0]

    methods: ClassVar = {
        "Grad-CAM": cam,
        "Guided Backpropagation": guided,
        "RISE": rise,
        "extremal perturbation": extremal,
    }


LIBRARIES = {"ours": Ours, "captum": Captum, "grad-cam": GradCam, "TorchRay": TorchRay}


# ------------------------------------------------------------------------ processes of their own


def start(library):
    """Load everything, in the new process, and let it warm up."""
    global SIDE, EVALUATIONS
    SIDE = LIBRARIES[library]()
    EVALUATIONS = []
    SIDE.network[1].register_forward_pre_hook(lambda _, x: EVALUATIONS.append(len(x[0])))
    warm = "gradient" if library == "ours" else next(iter(SIDE.methods))
    SIDE.explain(warm, torch.rand(1, 3, 224, 224), torch.tensor([0]))


def call(name, x, target):
    """Make one map in the library's process.

    :return: the map, (H, W); CPU seconds, and the pictures that the network evaluated
    :rtype: tuple[numpy.ndarray, float, int]
    """
    EVALUATIONS.clear()
    began = time.process_time()
    heat = SIDE.explain(name, x, target)
    return heat.numpy(), time.process_time() - began, sum(EVALUATIONS)


def take_turns(workers, number, x, target):
    """Let all methods explain one photo, one at a time, in an order that is drawn.

    :param dict[str, concurrent.futures.Executor] workers: by library
    :param int number: of the photo: the same number, the same order
    :return: by library and method, as from :func:`call`
    :rtype: dict[tuple[str, str], tuple[numpy.ndarray, float, int]]
    """
    turns = [(library, name) for library in workers for name in LIBRARIES[library].methods]
    if number:
        turns = [turn for turn in turns if turn not in SLOW]
    random.Random(number).shuffle(turns)
    return {
        (library, name): workers[library].submit(call, name, x, target).result()
        for library, name in turns
    }


# ------------------------------------------------------------------------------ what is measured


def judge(network, x, target, heat):
    """Measure what a map is worth: deletion and insertion, both fills averaged."""
    fills = {"blur": blur(x), "mean": x.mean((2, 3), keepdim=True).expand_as(x)}
    found = compare.measure_curves(network, x, target, heat, fills)
    return {game: found[game] for game in ("deletion", "insertion")}


def measure_photo(network, x, target, made):
    """Measure all maps of one photo.

    :param dict made: as from :func:`take_turns`
    :return: by "METHOD: LIBRARY", COLUMNS; r, the correlation with our map of the same method
    :rtype: dict[str, dict]
    """
    rows = {}
    for (library, name), (heat, seconds, evaluations) in made.items():
        row = judge(network, x, target, torch.from_numpy(heat))
        row.update({"CPU seconds": seconds, "evaluations": evaluations})
        if library != "ours" and ("ours", name) in made:
            row["r"] = correlate(heat, made["ours", name][0])
        rows[f"{name}: {library}"] = row
    return rows


def compare_sensitivity(network, x, target):
    """Hold our max-sensitivity of the plain gradient against captum's, on the same nudges.

    :return: the largest relative difference
    :rtype: float
    :raises UserError: if they differ
    """
    from captum.metrics import sensitivity_max

    def explain(x):
        return compare.METHODS["gradient"](network, x, target, None)

    def explain_all(x):  # captum gives the photo as a tuple, and wants one back
        x = x[0] if isinstance(x, tuple) else x
        return (torch.stack([explain(one.unsqueeze(0)) for one in x]),)

    rng = make_rng("cpu", 0)
    nudged = [compare.nudge(x, rng) for _ in range(3)]
    ours = compare.max_sensitivity(explain(x), [explain(one) for one in nudged])
    theirs = sensitivity_max(explain_all, x, lambda _: torch.cat(nudged), n_perturb_samples=3)
    difference = abs(ours - float(theirs)) / float(theirs)
    print(f"max-sensitivity: ours differs from captum's by {difference:.1e} of it")
    if not difference < 1e-4:
        raise UserError("max-sensitivity differs from captum's")
    return difference


# ------------------------------------------------------------------------------------ the script


def report(images):
    """Print the table.

    :param list[dict] images: of each photo "methods", as from :func:`measure_photo`
    :return: figures for the RESULT line
    :rtype: dict
    """
    table = compare.summarise(images, [*COLUMNS, "r"])
    table = dict(sorted(table.items()))  # a method's libraries side by side
    few = [name for name, row in table.items() if row["deletion"][2] < len(images)]
    print("\n".join(compare.to_markdown(table, COLUMNS, few)))  # one that had few photos can't win
    alike = [f"{name} {row['r'][0]:.3f}" for name, row in table.items() if "r" in row]
    print("correlation with our map of that name:", ", ".join(alike))
    result = {}
    for name, row in table.items():
        key = name.lower().replace(":", "").replace(",", "").replace(" ", "_")
        for column, (mean, _, _) in row.items():
            result[f"{column.replace(' ', '_')}_{key}"] = round(mean, 4)
    return result


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
    return parser


def main(argv=None):
    """Let all take turns on each photo, and print a table and a RESULT line.

    :param list[str] argv: the command line; None for sys.argv
    :return: what the RESULT line holds
    :rtype: dict
    """
    args = get_parser().parse_args(argv)
    print_versions(["torch", *(p for side in LIBRARIES.values() for p in side.packages)])
    context = multiprocessing.get_context("spawn")
    workers = {name: ProcessPoolExecutor(1, context, start, (name,)) for name in LIBRARIES}
    classifier = load_classifier()
    network = classifier.network
    images = []
    for number, photo in enumerate(find_photos(args.image)):
        x = read_photo(photo, classifier)
        with torch.no_grad():
            target = network(x).argmax(1)
        if not images:
            difference = compare_sensitivity(network, x, target)
        made = take_turns(workers, number, x, target)
        images.append({"methods": measure_photo(network, x, target, made)})
        print(f"{photo}: {sum(s for _, s, _ in made.values()):.0f} s", flush=True)
    result = {"sensitivity_difference": difference, **report(images)}
    print("RESULT", json.dumps(result))
    return result


if __name__ == "__main__":
    sys.exit(exit_code(main))
