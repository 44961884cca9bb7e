"""All that wants a GPU, within eight minutes: the goals first, each result as soon as it is there.

    python benchmarks/gpu.py          # or: make gpu

Each check is a command of its own. What it measured goes into table.md of a new folder, runs/gpu-
DATE-TIME, before the next one starts, and what it printed lies beside it: a GPU that is gone after
five minutes has been of use. The photos are 104 cut-outs of the four samples; no file is needed.

    python benchmarks/gpu.py --rehearse

goes through all of it on a CPU, in small; its numbers mean nothing.
"""

import argparse
import datetime
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import skimage
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import smoothgrad
from common.classifiers import load_classifier
from common.device import set_up
from common.errors import UserError, exit_code
from common.images import open_as_it_is
from common.photos import SAMPLES, read_photo
from common.run import replacing

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 480  # seconds, of all checks together
PHOTOS = 104


class Figure(NamedTuple):
    """What was measured, beside what was wanted: at least or at most so much, or nothing."""

    name: str
    value: float
    at_least: float | None = None
    at_most: float | None = None

    def reached(self):
        """Tell whether the goal is reached; None where there is none."""
        if self.at_least is None and self.at_most is None:
            return None
        return self.value >= self.at_least if self.at_most is None else self.value <= self.at_most

    def row(self):
        """Write a line of the table."""
        goal = ""
        if self.reached() is not None:
            sign, wanted = ("≤", self.at_most) if self.at_least is None else ("≥", self.at_least)
            goal = f"{sign} {wanted:,g}: {'reached' if self.reached() else 'missed'}"
        number = f"{self.value:,.0f}" if abs(self.value) >= 1000 else f"{self.value:.5g}"
        return f"| {self.name} | {number} | {goal} |"


class Check(NamedTuple):
    """A command, and how to read what it measured."""

    name: str
    words: list  # from the script on
    read: Callable  # from its metrics.json or RESULT line to figures
    seconds: int  # that it may take


# ---------------------------------------------------------------------------- what is looked at


def read_dcgan_speed(found):
    """Read figures of dcgan_speed.py."""
    speed = found["images_per_second_ours"]
    return [
        Figure("DCGAN, batch 64, fp32: times the copied loop", found["ratio_ours"], 5),
        Figure("DCGAN, batch 64, bf16: times the copied loop", found["ratio_bfloat16"], 6),
        Figure("DCGAN, fp32: images/s", speed),
        Figure("100 epochs of MNIST at this speed, s", 100 * 60_000 / speed, at_most=180),
        Figure("100 epochs of EMNIST balanced, s", 100 * 112_800 / speed, at_most=300),
    ]


def read_captum(found):
    """Read figures of against_captum.py, whose last column of numbers is the samples'."""
    n = next(key[8:] for key in found if key.startswith("mb_pair_") and key[8:].isdigit())
    memory = found[f"mb_ours_{n}"] / found[f"mb_captum_{n}"]
    figures = [
        Figure(f"SmoothGrad, n = {n}: captum's default call takes times ours",
               found["ratio_vs_captum_default"], 3),
        Figure(f"SmoothGrad, n = {n}: part of the memory of captum's", memory, at_most=0.5),
        Figure("Integrated Gradients: captum's takes times ours", found["ratio_vs_captum_ig"]),
        Figure("least correlation with captum's and PAIR's maps", found["r_min"], 0.9999),
    ]  # fmt: skip
    if "copies_per_second" in found:
        speed = found["copies_per_second"]
        figures.insert(2, Figure("SmoothGrad, 50 n: copies/s", speed, 15_000))
    return figures


def read_masks(found):
    """Read figures of explain_perturb.py."""
    each = statistics.median(image["seconds"] for image in found["images"])
    return [
        Figure("explain_perturb.py, batch 16: seconds of a mask, median", each, at_most=0.15),
        Figure(f"explain_perturb.py: {len(found['images'])} photos with their pictures, s",
               found["seconds"], at_most=30),
    ]  # fmt: skip


def read_ports(found):
    """Read figures of against_perturbation_ports.py."""
    figures = [Figure("masks: the port takes times ours", found["ratio_ours_defaults"])]
    if "ratio_TorchRay" in found:
        ratio = found["ratio_ours_defaults"] / found["ratio_TorchRay"]
        figures.append(Figure("masks: TorchRay takes times ours", ratio, 50))
    return figures


def read_comparison(found):
    """Read figures of compare_explanations.py, and tell what 104 photos, 24 checked, would take."""
    plain = [i["seconds"] for i in found["images"] if not is_checked(i)]
    checked = [i["seconds"] for i in found["images"] if is_checked(i)]
    each = statistics.median(plain)
    check = statistics.median(checked)
    total = 80 * each + 24 * check
    return [
        Figure("compare_explanations.py: seconds a photo", each),
        Figure("... with the sanity checks", check),
        Figure("... 104 photos, 24 of them checked, s", total, at_most=480),
    ]


def is_checked(image):
    """Tell whether a photo's record has the sanity checks."""
    return any("sensitivity" in row for row in image["methods"].values())


def read_smoothgrad(found):
    """Read figures of smoothgrad.py."""
    each = statistics.median(image["seconds"] for image in found["images"])
    return [Figure("smoothgrad.py: seconds a photo, with its pictures", each)]


def read_training(found):
    """Read the speed of the last epoch of a training."""
    speed = found["epochs"][-1]["images_per_second"]
    return [Figure(f"{found['script']}.py on {found['dataset']}: images/s", speed)]


def make_checks(folder, rehearse):
    """List the checks, those with goals first.

    :param pathlib.Path folder: where the photos are, and runs go
    :param bool rehearse: on a CPU, in small
    :rtype: list[Check]
    """
    on = [] if rehearse else ["--cuda"]
    photos = str(folder / "photos")
    some = sorted(map(str, (folder / "photos").glob("*.png")))
    few = some[: 2 if rehearse else 6]

    def out(name):
        return ["--out", str(folder / name), *on]

    def choose(full, small):
        return (small if rehearse else full).split()

    speed = ["--batch-size", "4" if rehearse else "64"]
    speed += choose("--batches 200 --rounds 5", "--batches 2 --rounds 1")
    samples = choose("--samples 100 --rounds 5", "--samples 2 --rounds 1")
    steps = choose("--batch 16", "--batch 2 --iterations 2")
    peers = choose("--torchray 40", "--image sample:coffee")
    methods = ["--methods", "random", "gradient"] if rehearse else []
    small = choose("", "--width 0.1")
    training = ["--dataset", "glyphs", "--epochs", "1" if rehearse else "3", *small]
    return [
        Check("dcgan_speed", ["benchmarks/dcgan_speed.py", "--dataset", "random", *speed,
                              "--changes", "bfloat16", *on], read_dcgan_speed, 90),
        Check("against_captum", ["benchmarks/against_captum.py", *samples, *on], read_captum, 150),
        Check("masks", ["explain_perturb.py", "--image", photos, *steps, *out("masks")],
              read_masks, 90),
        Check("comparison", ["compare_explanations.py", "--image", *few, "--sanity", "1",
                             *methods, *out("comparison")], read_comparison, 120),
        Check("ports", ["benchmarks/against_perturbation_ports.py", *peers, *on], read_ports, 120),
        Check("smoothgrad", ["smoothgrad.py", "--image", *few,
                             *choose("", "--samples 2"), *out("smoothgrad")], read_smoothgrad, 60),
        Check("train_dcgan", ["train_dcgan.py", *training, *out("train_dcgan")],
              read_training, 60),
        Check("train_classifier", ["train_classifier.py", *training, *out("train_classifier")],
              read_training, 60),
    ]  # fmt: skip


def make_photos(folder, count):
    """Cut photos out of the samples, at different places, every other one mirrored.

    :param pathlib.Path folder: where to; it is made
    """
    folder.mkdir()
    rng = np.random.default_rng(0)
    files = list(SAMPLES.values())
    for i in range(count):
        photo = open_as_it_is(Path(skimage.data_dir, files[i % len(files)])).convert("RGB")
        side = int(min(photo.size) * rng.uniform(0.8, 1))
        left = int(rng.integers(photo.width - side + 1))
        top = int(rng.integers(photo.height - side + 1))
        photo = photo.crop((left, top, left + side, top + side)).resize((256, 256))
        if i // len(files) % 2:
            photo = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        photo.save(folder / f"{i:03d}.png")


@torch.no_grad()
def compare_tf32(device):
    """Compare maps with the convolutions' TF32, which torch allows, and without.

    :return: the correlation of two means of 64 noisy gradients
    :rtype: list[Figure]
    """
    classifier = load_classifier(device=device)
    x = read_photo("sample:coffee", classifier).to(device)
    target = classifier.network(x).argmax(1)
    maps = []
    for allowed in (True, False):
        torch.backends.cudnn.allow_tf32 = allowed
        values = smoothgrad.smoothgrad(classifier.network, x, target, samples=64, chunk=32)
        maps.append(values.flatten().cpu().numpy())
    return [Figure("a map with TF32, against fp32: correlation", np.corrcoef(maps)[0, 1], 0.9999)]


# ----------------------------------------------------------------------------------- running them


def run(check, folder, seconds):
    """Run a check, and read what it measured.

    :param float seconds: that it may take
    :return: its figures
    :rtype: list[Figure]
    :raises UserError: if it fails, or takes longer
    """
    log = folder / f"{check.name}.txt"
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, *check.words], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(seconds)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)  # with all processes that it has started
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                raise UserError(f"not done after {seconds:.0f} s") from error
            raise
    lines = log.read_text(errors="replace").splitlines() or [""]
    if code:
        raise UserError(lines[-1])
    metrics = folder / check.name / "metrics.json"
    if metrics.is_file():
        return check.read(json.loads(metrics.read_text()))
    return check.read(json.loads(lines[-1].removeprefix("RESULT ")))


def describe_machine(device):
    """Name the card, its driver and torch, for the head of the table."""
    torch_version = f"torch {torch.__version__}"
    if device.type != "cuda":
        return f"a rehearsal on a CPU, {torch_version}: these numbers mean nothing"
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    return (f"{torch.cuda.get_device_name(device)}, driver {driver}, {torch_version} with CUDA "
            f"{torch.version.cuda}")  # fmt: skip


def write_table(path, head, rows):
    """Write the table as it is so far; atomically."""
    lines = [head, "", "| check | measured | goal |", "|---|---|---|", *rows]
    with replacing(path) as part:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")


def get_parser():
    """Build the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, in small")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the checks, not all")
    parser.add_argument("--out", help="new folder (default: runs/gpu-DATE-TIME)")
    return parser


def main(argv=None):
    """Run all checks, and print the table line by line and a RESULT line.

    :param list[str] argv: the command line; None for sys.argv
    :return: figures by name
    :rtype: dict[str, float]
    :raises UserError: if there is no GPU
    """
    args = get_parser().parse_args(argv)
    if not args.rehearse and not torch.cuda.is_available():
        raise UserError("torch sees no GPU: nothing to measure (--rehearse tries it all on a CPU)")
    started = time.monotonic()
    device = set_up(not args.rehearse, seed=0)
    now = datetime.datetime.now()
    folder = Path(args.out or ROOT / f"runs/gpu-{now:%Y%m%d-%H%M%S}").resolve()
    folder.mkdir(parents=True)
    make_photos(folder / "photos", 6 if args.rehearse else PHOTOS)
    head = f"{describe_machine(device)}, {now:%Y-%m-%d %H:%M}"
    print(head, flush=True)
    rows = []
    figures = []
    for check in [*make_checks(folder, args.rehearse), None]:
        name = check.name if check else "tf32"
        if args.only and name not in args.only:
            continue
        left = LIMIT - (time.monotonic() - started)
        try:
            if left < 10:
                raise UserError(f"no time left of {LIMIT} s")
            found = run(check, folder, min(left, check.seconds)) if check else compare_tf32(device)
        except UserError as error:
            added = [f"| {name} | failed: {error} | |"]
        else:
            figures += found
            added = [figure.row() for figure in found]
        rows += added
        print("\n".join(added), flush=True)
        write_table(folder / "table.md", head, rows)
    goals = [figure.reached() for figure in figures if figure.reached() is not None]
    print(f"{sum(goals)} of {len(goals)} goals reached in {time.monotonic() - started:.0f} s")
    print(f"look at  {folder}/table.md")
    result = {figure.name: round(figure.value, 5) for figure in figures}
    print("RESULT", json.dumps(result))
    return result


if __name__ == "__main__":
    sys.exit(exit_code(main))
