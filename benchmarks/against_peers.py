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
from functools import partial
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import compare_explanations as compare
from benchmarks.against_captum import correlate, print_versions
from common.classifiers import Normalise, load_classifier, load_lite0
from common.device import make_rng, set_up
from common.errors import UserError, exit_code
from common.photos import SAMPLES, find_photos, read_photo
from smoothgrad import blur, over_channels

PACKAGES = ("captum", "grad-cam", "torchray")
SAMPLES_OF_NOISE = 50  # this and the next two as in compare_explanations.py
STEPS = 64
MASKS = 500
SLOW = (("TorchRay", "RISE"), ("TorchRay", "extremal perturbation"))  # explain the first photo only
COLUMNS = {"deletion": "low", "insertion": "high", "CPU seconds": "low", "evaluations": "low"}


# ------------------------------------------------- one map: a photo, (1, C, H, W), to (H, W)


def ours(name, network, x, target):
    """Explain by a method of compare_explanations.py."""
    args = argparse.Namespace(methods=[name], seed=0)
    heat, _, _ = compare.rank_pixels(args, network, x, torch.tensor([target]))[name]
    return heat


def captum_smoothgrad(network, x, target, absolute):
    """Average the gradient, or its absolute value, over noisy copies."""
    from captum.attr import NoiseTunnel, Saliency

    maps = NoiseTunnel(Saliency(network)).attribute(
        x, nt_samples=SAMPLES_OF_NOISE, nt_samples_batch_size=10,
        stdevs=compare.NOISE * float(x.max() - x.min()), target=target, abs=absolute,
    )  # fmt: skip
    return over_channels(maps)[0]


def captum_integrated(network, x, target):
    """Integrate from black, by captum's default rule."""
    from captum.attr import IntegratedGradients

    maps = IntegratedGradients(network).attribute(
        x, 0, target, n_steps=STEPS, internal_batch_size=8
    )
    return over_channels(maps)[0]


def captum_guided(network, x, target):
    """Guide the ReLUs that are of the type nn.ReLU."""
    from captum.attr import GuidedBackprop

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it sets hooks
        return over_channels(GuidedBackprop(network).attribute(x, target))[0]


def grad_cam(kind, network, x, target):
    """Weight the last feature maps, in one of the ways of pytorch-grad-cam."""
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    make = getattr(pytorch_grad_cam, kind)
    with make(model=network, target_layers=[network[1].bn2]) as cam:
        return torch.from_numpy(cam(x, [ClassifierOutputTarget(target)])[0])


def torchray_cam(network, x, target):
    """Weight the last feature maps."""
    from torchray.attribution.grad_cam import grad_cam

    normalise, plain = network
    return grad_cam(plain, normalise(x), target, saliency_layer="bn2", resize=True)[0, 0]


def torchray_guided(network, x, target):
    """Guide the ReLUs that are torch.relu."""
    from torchray.attribution.guided_backprop import guided_backprop

    normalise, plain = network
    return guided_backprop(plain, normalise(x), target)[0, 0]


def torchray_rise(network, x, target):
    """Average random masks."""
    from torchray.attribution.rise import rise

    normalise, plain = network
    return rise(plain, normalise(x), num_masks=MASKS, batch_size=8)[0, target]


def torchray_extremal(network, x, target):
    """Learn one mask of a tenth of the picture that keeps the class."""
    from torchray.attribution.extremal_perturbation import extremal_perturbation

    normalise, plain = network
    masks, _ = extremal_perturbation(plain, normalise(x), target)
    return masks[0, 0]


OURS = (
    "gradient", "SmoothGrad signed", "SmoothGrad abs", "Integrated Gradients",
    "Guided Backpropagation", "Grad-CAM", "RISE", "perturbation, nested",
)  # fmt: skip
LIBRARIES = {
    "ours": {name: partial(ours, name) for name in OURS},
    "captum": {
        "SmoothGrad signed": partial(captum_smoothgrad, absolute=False),
        "SmoothGrad abs": partial(captum_smoothgrad, absolute=True),
        "Integrated Gradients": captum_integrated,
        "Guided Backpropagation": captum_guided,
    },
    "grad-cam": {
        "Grad-CAM": partial(grad_cam, "GradCAM"),
        "Grad-CAM++": partial(grad_cam, "GradCAMPlusPlus"),
        "Layer-CAM": partial(grad_cam, "LayerCAM"),
    },
    "TorchRay": {
        "Grad-CAM": torchray_cam,
        "Guided Backpropagation": torchray_guided,
        "RISE": torchray_rise,
        "extremal perturbation": torchray_extremal,
    },
}


# ------------------------------------------------------------------------ processes of their own


def start(library):
    """Load the network, in the new process, and let it warm up."""
    global METHODS, NETWORK, EVALUATIONS
    METHODS = LIBRARIES[library]
    if library == "ours":
        with contextlib.redirect_stdout(io.StringIO()):
            set_up(False, seed=0)
        NETWORK = load_classifier().network
    else:
        network, mean, std, *_ = load_lite0()
        NETWORK = nn.Sequential(Normalise(mean, std), network).eval()
    EVALUATIONS = []
    NETWORK[1].register_forward_pre_hook(lambda _, x: EVALUATIONS.append(len(x[0])))
    call(next(iter(METHODS)), torch.rand(1, 3, 224, 224), 0)


def call(name, x, target):
    """Make one map in the library's process.

    :return: the map, (H, W); CPU seconds, and the pictures that the network evaluated
    :rtype: tuple[numpy.ndarray, float, int]
    """
    torch.manual_seed(0)
    EVALUATIONS.clear()
    began = time.process_time()
    heat = METHODS[name](NETWORK, x, target)
    seconds = time.process_time() - began
    if METHODS is not LIBRARIES["ours"]:
        NETWORK.requires_grad_(True)  # TorchRay freezes the network, and leaves it so
    return heat.detach().float().numpy(), seconds, sum(EVALUATIONS)


def take_turns(workers, number, x, target):
    """Let all methods explain one photo, one at a time, in an order that is drawn.

    :param dict[str, concurrent.futures.Executor] workers: by library
    :param int number: of the photo: the same number, the same order
    :return: by library and method, as from :func:`call`
    :rtype: dict[tuple[str, str], tuple[numpy.ndarray, float, int]]
    """
    turns = [(library, name) for library in workers for name in LIBRARIES[library]]
    if number:
        turns = [turn for turn in turns if turn not in SLOW]
    random.Random(number).shuffle(turns)
    return {
        (library, name): workers[library].submit(call, name, x, target).result()
        for library, name in turns
    }


# ------------------------------------------------------------------------------ what is measured


def measure_photo(network, x, target, made):
    """Measure all maps of one photo.

    :param dict made: as from :func:`take_turns`
    :return: by "METHOD: LIBRARY", COLUMNS; r, the correlation with our map of the same method
    :rtype: dict[str, dict]
    """
    fills = {"blur": blur(x), "mean": x.mean((2, 3), keepdim=True).expand_as(x)}
    rows = {}
    for (library, name), (heat, seconds, evaluations) in made.items():
        ranking = torch.from_numpy(heat)
        row = compare.measure_curves(network, x, torch.tensor([target]), ranking, fills)
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
        return ours("gradient", network, x, target)

    def explain_all(x):  # captum gives the photo as a tuple, and wants one back
        x = x[0] if isinstance(x, tuple) else x
        return (torch.stack([explain(one.unsqueeze(0)) for one in x]),)

    rng = make_rng("cpu", 0)
    nudged = [compare.nudge(x, rng) for _ in range(3)]
    here = compare.max_sensitivity(explain(x), [explain(one) for one in nudged])
    there = float(sensitivity_max(explain_all, x, lambda _: torch.cat(nudged), n_perturb_samples=3))
    difference = abs(here - there) / there
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
    print_versions(["torch", *PACKAGES])
    classifier = load_classifier()
    network = classifier.network
    context = multiprocessing.get_context("spawn")
    images = []
    with contextlib.ExitStack() as stack:
        workers = {}
        for library in LIBRARIES:
            worker = ProcessPoolExecutor(1, context, start, (library,))
            workers[library] = stack.enter_context(worker)
        for number, photo in enumerate(find_photos(args.image)):
            x = read_photo(photo, classifier)
            with torch.no_grad():
                target = int(network(x).argmax(1))
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
