"""explain_perturb.py beside the PyTorch port of its paper that people copy, and beside TorchRay.

    python benchmarks/against_perturbation_ports.py --image data/photos

(A) The port's objective and optimiser, written anew: 28 x 28 cells, bilinear to 224 pixels, 500
iterations of Adam with learning rate 0.1, clamped to [0, 1]; 0.01 mean|1 - m|, 0.2 mean|grad m|^3,
the class's probability; the reference is a median filter of 11 pixels; noise of 0.2 (in units of
the normalised picture) in the first channel alone, which is what ``cv2.randn`` makes of a scalar.

(B) Ours on (A)'s objective, with (A)'s noise. (C) explain_perturb.py with its defaults.

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
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import median_filter
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import explain_perturb
from benchmarks.perturbation_quality import AREAS, learn, measure_areas
from common.classifiers import load_classifier, load_lite0
from common.device import make_rng, set_up
from common.errors import HelpFormatter
from common.masks import total_variation
from common.photos import find_photos, read_photo

L1, L2, BETA, NOISE, ITERATIONS = 0.01, 0.2, 3, 0.2, 500
MEAN, STD = 127 / 255, 128 / 255  # of the classifier's normalisation


def median(x):
    """Filter each channel of a photo with a median of 11 x 11 pixels."""
    return torch.from_numpy(median_filter(x.numpy(), (1, 1, 11, 11), mode="nearest"))


def port_terms(m):
    """Give the port's regularisation of masks, (..., 28, 28) to (...)."""
    return L1 * (1 - m).abs().mean((-2, -1)) + L2 * total_variation(m, BETA)


def port(model, x, target, seed):
    """Learn a mask as the port does.

    :return: (28, 28)
    :rtype: torch.Tensor
    """
    rng = np.random.default_rng(seed)
    x, r = ((v - MEAN) / STD for v in (x, median(x)))
    m = torch.ones(1, 1, 28, 28, requires_grad=True)
    upsample = torch.nn.UpsamplingBilinear2d(size=x.shape[-2:])
    optimizer = torch.optim.Adam([m], lr=0.1)
    for _ in range(ITERATIONS):
        large = upsample(m).expand(1, 3, -1, -1)
        noise = np.zeros((*x.shape[-2:], 3), np.float32)
        noise[..., 0] = rng.normal(0, NOISE, noise.shape[:2])
        z = x * large + r * (1 - large) + torch.from_numpy(noise.transpose(2, 0, 1))[None]
        loss = port_terms(m[0, 0]) + model(z).softmax(1)[0, target]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        m.data.clamp_(0, 1)
    return m.detach()[0, 0]


class PortGame(explain_perturb.Game):
    """The port's objective, for our optimiser and for our faster classifier."""

    def draw(self, rng, progress=1.0):
        """Draw noise in the first channel alone."""
        draw = super().draw(rng, progress)
        noise = torch.zeros(len(self.keeps), *self.x.shape[1:])
        noise[:, 0] = torch.randn(noise[:, 0].shape, generator=rng) * NOISE * STD
        return draw._replace(noise=noise)

    def objective(self, theta, draw):
        """Compute the port's objective, averaged over the draws of noise."""
        m = self.regions(theta, None)
        return port_terms(m)[:, 0] + self.scores(m, draw).mean()

    def scores(self, m, draw):
        """Give the class's probability under each draw."""
        large = 1 - F.interpolate(1 - m, self.x.shape[-2:], mode="bilinear", align_corners=True)
        z = torch.lerp(self.reference, self.x, large) + draw.noise
        logits = self.network(z.contiguous(memory_format=torch.channels_last))
        return logits.softmax(1)[:, self.target[0]]

    @torch.no_grad()
    def value(self, m, seed=1):
        """Average the objective of a mask, (28, 28), over 200 draws; and give the clean one."""
        rng, terms = make_rng("cpu", seed), port_terms(m)
        count = -(-200 // len(self.keeps))
        noisy = torch.cat([self.scores(m[None, None], self.draw(rng)) for _ in range(count)])
        clean = self.scores(m[None, None], self.draw(rng)._replace(noise=torch.zeros(1)))
        return float(terms + noisy.mean()), float(clean[0])


def ours_on_port(network, x, target, iterations, pictures):
    """Minimise the port's objective with our optimiser.

    :return: (28, 28)
    :rtype: torch.Tensor
    """
    args = explain_perturb.get_parser().parse_args(["--regularizer", "tv", "--lr", "0.3"])
    vars(args).update(iterations=iterations, pictures=pictures)
    game = PortGame(network, x, median(x), torch.tensor([target]), args)
    theta = game.start()
    theta[..., : 28 * 28] = 1  # as the port, rather from a photo that is there than from a blur
    for _ in explain_perturb.optimise(game, theta, args, make_rng("cpu", 0)):
        pass
    return game.regions(theta.detach(), None)[0, 0]


def ours(network, x, target):
    """Explain one photo with the script's defaults.

    :return: the mask, a ranking of the pixels, the masked photo, facts
    :rtype: tuple
    """
    args = explain_perturb.get_parser().parse_args([])
    game, theta, _ = learn(network, x, torch.tensor([target]), args)
    before = float(network(x).softmax(1)[0, target])
    return explain_perturb.find_answer(game, 0, theta, before)


def torchray(model, x, target, iterations):
    """Run TorchRay's extremal perturbation for four areas, one after the other.

    :return: a ranking of the pixels, (H, W): the mean of the masks
    :rtype: torch.Tensor
    """
    from torchray.attribution.extremal_perturbation import extremal_perturbation

    masks = extremal_perturbation(model, (x - MEAN) / STD, target, max_iter=iterations,
                                  areas=[0.05, 0.1, 0.2, 0.4])[0]  # fmt: skip
    return masks.mean((0, 1))


def get_parser():
    """Build the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    samples = ["sample:coffee", "sample:cat", "sample:rocket"]
    parser.add_argument("--image", nargs="+", default=samples, help="photos or folders of them")
    parser.add_argument("--every", type=int, default=1, help="take only every so many-th photo")
    parser.add_argument("--iterations", type=int, default=30, help="(B): steps")
    parser.add_argument("--pictures", type=int, default=2, help="(B): pictures in a step")
    parser.add_argument("--torchray", type=int, default=0, metavar="ITERATIONS",
                        help="(D): of its 800; 0 leaves it out")  # fmt: skip
    return parser


def main():
    """Let all take turns on each photo, and print a table and a RESULT line."""
    args = get_parser().parse_args()
    set_up(False, 0)
    classifier, rows = load_classifier(), {}
    network = classifier.network
    # The same network as a port loads it: BatchNorm not folded, channels first.
    model = load_lite0()[0].eval().requires_grad_(False)
    for number, photo in enumerate(find_photos(args.image)[:: args.every]):
        x = read_photo(photo, classifier.resize, classifier.size)
        before, y = network(x).softmax(1).max(1)
        target = int(y)
        settings = explain_perturb.get_parser().parse_args([])
        judge = PortGame(network, x, median(x), y, settings)
        turns = {
            "port": partial(port, model, x, target, number),
            "ours, port's objective": partial(
                ours_on_port, network, x, target, args.iterations, args.pictures),
            "ours, defaults": partial(ours, network, x, target),
        }  # fmt: skip
        if args.torchray:
            turns["TorchRay"] = partial(torchray, model, x, target, args.torchray)
        for name, turn in turns.items():
            began = time.perf_counter()
            found = turn()
            seconds = time.perf_counter() - began
            row = [np.nan] * 3
            if name == "ours, defaults":
                _, found, _, facts = found
                row = [np.nan, facts["probability_after"], facts["area"]]
            elif name == "TorchRay":
                seconds *= 800 / args.torchray
            else:
                row = [*judge.value(found), float(1 - found.mean())]
                found = F.interpolate(1 - found[None, None], x.shape[-2:], mode="bilinear")[0, 0]
            row[1] /= float(before)
            row += measure_areas(network, x, target, found)
            rows.setdefault(name, []).append([seconds, *row])
            print(f"{photo:40s} {name:24s} {seconds:6.1f} s", flush=True)

    print(f"\n{'':24s} {'s':>6s} {'ratio':>6s} {'objective':>9s} {'left':>6s} {'deleted':>7s}"
          f" {'del. blur':>9s} {'ins. blur':>9s} {'del. grey':>9s} {'ins. grey':>9s}")  # fmt: skip
    result = {"photos": len(rows["port"])}
    for name, values in rows.items():
        seconds = [row[0] for row in values]
        ratio = statistics.median(p[0] / s for p, s in zip(rows["port"], seconds, strict=True))
        mean = np.mean(values, 0)
        numbers = f"{mean[1]:9.4f} {mean[2]:6.1%} {mean[3]:7.1%}"
        numbers += "".join(f" {v:9.3f}" for v in mean[4:])
        print(f"{name:24s} {statistics.median(seconds):6.1f} {ratio:6.2f} {numbers}")
        key = name.replace(",", "").replace("'s", "").replace(" ", "_")
        result[f"ratio_{key}"] = round(ratio, 2)
        names = ("objective", "left", "deleted", *AREAS)
        result |= {f"{k}_{key}": round(float(v), 4)
                   for k, v in zip(names, mean[1:], strict=True) if v == v}  # fmt: skip
    print("RESULT", json.dumps(result))


if __name__ == "__main__":
    main()
