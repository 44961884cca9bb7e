"""explain_perturb.py beside the PyTorch port of its paper that people copy, and beside TorchRay.

    python benchmarks/against_perturbation_ports.py --image data/photos

(A) The port's objective and optimiser, written anew: 28 x 28 cells, bilinear to 224 pixels, 500
iterations of Adam with learning rate 0.1, clamped to [0, 1]; 0.01 mean|1 - m|, 0.2 mean|grad m|^3,
the class's probability; the reference is a median filter of 11 pixels; noise of 0.2 (in units of
the normalised picture) in the first channel alone, which is what ``cv2.randn`` makes of a scalar.

(B) (A)'s objective and noise with the maps, the step size and the faster classifier of ours: 30
steps of two pictures. (C) explain_perturb.py with its defaults.

(D) TorchRay's extremal perturbation, where it is installed; it is timed over a part of its 800
iterations, and scaled up.

All take turns, photo by photo. The objective is a mean over 200 new draws of the noise. Deletion
and insertion areas are those of perturbation_quality.py.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import median_filter
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import explain_perturb
from benchmarks.perturbation_quality import AREAS, explain, measure_areas, read_photos
from common.classifiers import load_classifier, load_lite0
from common.device import make_rng, set_up, wait_for

SIDE = 28  # cells
L1 = 0.01
L2 = 0.2
BETA = 3
NOISE = 0.2
ITERATIONS = 500
MEAN = 127 / 255  # of the classifier's normalisation
STD = 128 / 255
TORCHRAY_ITERATIONS = 800
NAMES = {  # in the RESULT line, and in the table
    "port": "port",
    "ours_port_objective": "ours, port's objective",
    "ours_defaults": "ours, defaults",
    "TorchRay": "TorchRay",
}
COLUMNS = ("objective", "left", "deleted", *AREAS)


# ------------------------------------------------------------------------- the port's objective


def median(x):
    """Filter each channel of a photo with a median of 11 x 11 pixels."""
    filtered = median_filter(x.cpu().numpy(), (1, 1, 11, 11), mode="nearest")
    return torch.from_numpy(filtered).to(x.device)


def upsample(m):
    """Enlarge a mask, (28, 28), to (1, 1, 224, 224), by torch.nn.UpsamplingBilinear2d."""
    return F.interpolate(m.view(1, 1, SIDE, SIDE), (224, 224), mode="bilinear", align_corners=True)


def port_terms(m):
    """Return the port's regularisation of a mask, (28, 28)."""
    area = (1 - m).abs().mean()
    return L1 * area + L2 * explain_perturb.total_variation(m, BETA)


class PortObjective:
    """The port's objective for the faster classifier, whose pixels are in [0, 1].

    :param torch.nn.Module network: from pixels to logits
    :param Photo photo: to explain
    :param torch.Generator rng: for the noise
    """

    def __init__(self, network, photo, rng):
        self.network = network
        self.x = photo.x
        self.reference = median(photo.x)
        self.target = photo.target
        self.rng = rng

    def draw_noise(self, count):
        """Draw noise for some pictures, in the first channel alone, (count, 3, 224, 224)."""
        noise = self.x.new_zeros(count, *self.x.shape[1:])
        drawn = torch.randn(noise[:, 0].shape, generator=self.rng, device=self.x.device)
        noise[:, 0] = drawn * NOISE * STD
        return noise

    def probabilities(self, m, noise):
        """Return the class's probability under a mask, (28, 28), and each noise, (N,)."""
        z = torch.lerp(self.reference, self.x, upsample(m)) + noise
        logits = self.network(z.contiguous(memory_format=torch.channels_last))
        return logits.softmax(1)[:, self.target]

    def __call__(self, m, count):
        """Return the objective of a mask, averaged over ``count`` draws of the noise."""
        return port_terms(m) + self.probabilities(m, self.draw_noise(count)).mean()


@torch.no_grad()
def judge(network, photo, m):
    """Measure a mask, (28, 28), of the port's kind.

    :return: figures by name
    :rtype: dict
    """
    objective = PortObjective(network, photo, make_rng(m.device, 1))
    values = [float(objective(m, 8)) for _ in range(25)]
    clean = objective.probabilities(m, m.new_zeros(1))
    return {
        "objective": float(np.mean(values)),
        "left": float(clean) / photo.probability,
        "deleted": float(1 - m.mean()),
    }


# -------------------------------------------------------------------------- who minimises what


def port(model, photo, seed):
    """Learn a mask as the port does.

    :param torch.nn.Module model: from normalised pixels to logits
    :return: (28, 28)
    :rtype: torch.Tensor
    """
    rng = np.random.default_rng(seed)
    x = (photo.x - MEAN) / STD
    reference = (median(photo.x) - MEAN) / STD
    m = torch.ones(SIDE, SIDE, device=x.device, requires_grad=True)
    optimizer = torch.optim.Adam([m], lr=0.1)
    for _ in range(ITERATIONS):
        large = upsample(m).expand(1, 3, -1, -1)
        noise = np.zeros((224, 224, 3), np.float32)
        noise[..., 0] = rng.normal(0, NOISE, (224, 224))
        noise = torch.from_numpy(noise.transpose(2, 0, 1)).to(x.device)
        z = x * large + reference * (1 - large) + noise
        loss = port_terms(m) + model(z).softmax(1)[0, photo.target]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        m.data.clamp_(0, 1)
    return m.detach()


def ours_on_port(network, photo, steps=30, pictures=2):
    """Minimise the port's objective as explain_perturb.py minimises its own.

    :return: (28, 28)
    :rtype: torch.Tensor
    """
    device = photo.x.device
    objective = PortObjective(network, photo, make_rng(device, 0))
    maps = explain_perturb.start_maps(1, 1, SIDE, device)
    maps[0].data.fill_(1)  # as the port, rather from a photo that is there than from its blur
    optimizer = torch.optim.Adam(maps, 0.3, betas=(0.8, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        m = explain_perturb.sum_levels(maps).sigmoid()[0, 0]
        optimizer.zero_grad()
        objective(m, pictures).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return explain_perturb.sum_levels(maps).sigmoid()[0, 0]


def torchray(model, photo, iterations):
    """Run TorchRay's extremal perturbation for four areas, one after the other.

    :return: a ranking of the pixels, (224, 224): the mean of the masks
    :rtype: torch.Tensor
    """
    from torchray.attribution.extremal_perturbation import extremal_perturbation

    x = (photo.x - MEAN) / STD
    areas = [0.05, 0.1, 0.2, 0.4]
    masks, _ = extremal_perturbation(model, x, photo.target, max_iter=iterations, areas=areas)
    return masks.mean((0, 1))


def take_turns(network, model, photo, number, iterations):
    """Let all explain one photo.

    :param torch.nn.Module network: ours, from pixels to logits
    :param torch.nn.Module model: the plain one, from normalised pixels to logits
    :param int number: of the photo, for the port's noise
    :param int iterations: of TorchRay; 0 leaves it out
    :return: by method its figures
    :rtype: dict[str, dict]
    """
    rows = {}
    for name, learn in (
        ("port", lambda: port(model, photo, number)),
        ("ours_port_objective", lambda: ours_on_port(network, photo)),
    ):
        began = time.perf_counter()
        m = learn()
        wait_for(photo.x.device)
        seconds = time.perf_counter() - began
        ranking = upsample(1 - m)[0, 0]
        areas = measure_areas(network, photo.x, photo.target, ranking)
        rows[name] = {
            "seconds": seconds,
            **judge(network, photo, m),
            **dict(zip(AREAS, areas, strict=True)),
        }
    ((_, rows["ours_defaults"]),) = explain(network, [photo], explain_perturb.Settings())
    if iterations:
        began = time.perf_counter()
        ranking = torchray(model, photo, iterations)
        wait_for(photo.x.device)
        seconds = (time.perf_counter() - began) * TORCHRAY_ITERATIONS / iterations
        areas = measure_areas(network, photo.x, photo.target, ranking)
        rows["TorchRay"] = {"seconds": seconds, **dict(zip(AREAS, areas, strict=True))}
    return rows


# ------------------------------------------------------------------------------------- the script


def report(rows):
    """Print the table.

    :param list[dict] rows: of each photo, as from :func:`take_turns`
    :return: what the RESULT line holds: means over the photos, and medians of the ratios
    :rtype: dict
    """
    widths = {column: max(9, len(column)) for column in COLUMNS}
    header = "".join(f" {column:>{width}s}" for column, width in widths.items())
    print(f"\n{'':24s} {'s':>6s} {'ratio':>6s}{header}")
    result = {"photos": len(rows)}
    for key in rows[0]:
        seconds = [row[key]["seconds"] for row in rows]
        ratio = statistics.median(row["port"]["seconds"] / row[key]["seconds"] for row in rows)
        result[f"ratio_{key}"] = round(ratio, 2)
        line = f"{NAMES[key]:24s} {statistics.median(seconds):6.1f} {ratio:6.2f}"
        for column, width in widths.items():
            cell = ""
            if column in rows[0][key]:
                mean = float(np.mean([row[key][column] for row in rows]))
                result[f"{column}_{key}"] = round(mean, 4)
                cell = f"{mean:.4f}"
            line += f" {cell:>{width}s}"
        print(line)
    return result


def get_parser():
    """Build the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    samples = ["sample:coffee", "sample:cat", "sample:rocket"]
    parser.add_argument("--image", nargs="+", default=samples, metavar="PATH",
                        help="photos or folders of them (default: three samples)")  # fmt: skip
    parser.add_argument("--cuda", action="store_true", help="on the GPU")
    parser.add_argument("--torchray", type=int, default=0, metavar="ITERATIONS",
                        help="(D): of its 800; 0 leaves it out (default: %(default)s)")  # fmt: skip
    return parser


def main():
    """Let all take turns on each photo, and print a table and a RESULT line."""
    args = get_parser().parse_args()
    device = set_up(args.cuda, 0)
    classifier = load_classifier(device=device)
    # The same network as a port loads it: BatchNorm not folded, channels first.
    model = load_lite0()[0].eval().requires_grad_(False).to(device)
    photos = read_photos(args.image, classifier)
    if device.type == "cuda":  # which chooses its kernels when they are first called
        take_turns(classifier.network, model, photos[0], 0, min(args.torchray, 1))
    rows = []
    for number, photo in enumerate(photos):
        row = take_turns(classifier.network, model, photo, number, args.torchray)
        for key, found in row.items():
            print(f"{photo.name:30s} {NAMES[key]:24s} {found['seconds']:6.1f} s", flush=True)
        rows.append(row)
    print("RESULT", json.dumps(report(rows)))


if __name__ == "__main__":
    main()
