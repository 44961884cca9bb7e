"""Show which pixels a classifier looks at: SmoothGrad (Smilkov et al. 2017, arXiv 1706.03825).

The gradient M of a class score S says which pixels matter, but from point to point it flickers.
So average it over noisy copies of the photo x:

    M(x) = dS/dx,    SmoothGrad(x) = 1/n sum_i M(x + e_i),    e_i ~ N(0, sigma^2)

with sigma = noise * (max x - min x), in pixels from 0 to 1, the space that noise is added in.

    python smoothgrad.py --image sample:coffee

M may also be Guided Backpropagation (Springenberg et al. 2014, arXiv 1412.6806), which lets only
positive gradients pass a ReLU, or Integrated Gradients IG (Sundararajan et al. 2017, arXiv
1703.01365):

    IG(x) = (x - b) * integral from 0 to 1 of M(b + a (x - b)) da,    sum IG = S(x) - S(b)

A noisy map of 100 samples takes 1.3 seconds on two cores of an AMD EPYC, 2.6 on those of an Intel
Xeon (benchmarks/README.md).

Differences from the paper: samples are kept as running means of M, |M| and M^2, so that memory
doesn't grow with n; each map comes with its reliability, the correlation of two maps of n samples.
"""

import sys
import time
from functools import partial

import numpy as np
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from common.checkpoint import resume_args
from common.classifiers import find_class, load_classifier
from common.deletion import blur, deletion_test
from common.device import fit_memory, is_first, make_rng, ranks, set_up
from common.errors import Interrupted, UserError, exit_code, make_parser, number
from common.gallery import explain_photos, finish_photos, load_arguments, save_arguments, say
from common.images import add_caption, save_gif, save_png
from common.panels import draw_panel, to_picture
from common.photos import find_photos, read_photo
from common.run import open_run, replacing, watching_signals

SCRIPT = "smoothgrad"
METHODS = ("gradient", "gradient-x-input", "integrated", "guided")
REDUCE = ("signed", "abs", "squared", "variance")
FREE = {"image", "cuda", "chunk", "resume", "html"}  # what --resume may change


# ----------------------------------------------------------------- the gradient and its relatives


def class_score(logits, target, kind):
    """Say how much each image looks like its class.

    :param torch.Tensor logits: (N, classes)
    :param torch.Tensor target: class indices, (N,)
    :param str kind: "logit"; "probability", flat close to 1; or "loss", which falls as they rise
    :return: (N,)
    :rtype: torch.Tensor
    """
    if kind == "loss":
        return F.cross_entropy(logits, target, reduction="none")
    scores = logits.softmax(1) if kind == "probability" else logits
    return scores.gather(1, target[:, None])[:, 0]


def input_gradient(network, x, target, kind="logit"):
    """Differentiate the class score with respect to the pixels: M(x).

    :param torch.nn.Module network: from pixels to logits, in eval mode: images are independent
    :param torch.Tensor x: images, (N, C, H, W), in [0, 1]
    :param torch.Tensor target: class indices, (N,)
    :param str kind: as in :func:`class_score`
    :return: signed, (N, C, H, W); parameters get no gradient
    :rtype: torch.Tensor
    """
    with torch.enable_grad():
        x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        return torch.autograd.grad(class_score(network(x), target, kind).sum(), x)[0]


def integrated_gradients(gradient, baseline, steps, chunk, x, target):
    """Integrate the gradient along the line from a baseline to the image, by the midpoint rule.

    :param Callable gradient: M, from (N, C, H, W) and (N,) to (N, C, H, W)
    :param torch.Tensor baseline: the image without information, (1, C, H, W)
    :param int steps: points on the line
    :param int chunk: points that are computed at once
    :param torch.Tensor x: images, (N, C, H, W)
    :param torch.Tensor target: class indices, (N,)
    :return: signed, (N, C, H, W)
    :rtype: torch.Tensor
    """
    total = torch.zeros_like(x)
    for some in torch.arange(steps * len(x), device=x.device).split(chunk):
        which, a = some % len(x), (some // len(x) + 0.5) / steps
        points = baseline + a.view(-1, 1, 1, 1) * (x[which] - baseline)
        total.index_add_(0, which, gradient(points, target[which]))
    return total / steps * (x - baseline)


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
CUTS = {"hardtanh", "hardtanh_", "clamp", "clamp_", "clamp_min", "clamp_min_", "clip", "clip_"}


class Guided(TorchFunctionMode):
    """Guided Backpropagation: while it is active, every ReLU passes back positive gradients only.

    Functions are watched, not modules: ``F.relu`` and ``x.relu_()`` are found as ``nn.ReLU`` is.
    """

    count = 0  # of ReLUs that were guided

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Call the function; guide the gradient of its output if it is a ReLU."""
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        low = kwargs.get("min_val", kwargs.get("min", args[1] if len(args) > 1 else None))
        name = getattr(function, "__name__", None)
        cuts_at_0 = name in CUTS and type(low) in (int, float) and low == 0
        if (name in RELUS or cuts_at_0) and output.requires_grad:
            output.register_hook(lambda gradient: gradient.clamp_min(0))
            self.count += 1
        return output


def guided_backprop(gradient, x, target):
    """Compute the gradient with every ReLU guided.

    It shows edges: its maps hardly change with random weights (Adebayo 2018, arXiv 1810.03292).

    :raises UserError: if the network has no ReLU
    """
    with Guided() as guided:
        found = gradient(x, target)
    if not guided.count:
        raise UserError("this network has no ReLU to guide: choose another --method or --model")
    return found


# ------------------------------------------------------------------------------------- SmoothGrad


class Maps:
    """Running means of M, |M| and M^2, of odd and even samples apart.

    :param torch.Tensor x: the images, (N, C, H, W): the shape of the maps
    """

    def __init__(self, x):
        self.n, self.counts = 0, [0, 0]
        # Signed gradients cancel out, so that single precision would show after some thousands.
        self.sums = torch.zeros(2, 3, *x.shape, dtype=torch.float64, device=x.device)

    def add(self, samples):
        """Add samples of M, (n, N, C, H, W)."""
        for half in (0, 1):
            some = samples[(self.n + half) % 2 :: 2]
            for total, values in zip(self.sums[half], (some, some.abs(), some**2), strict=True):
                total += values.sum(0)
            self.counts[half] += len(some)
        self.n += len(samples)

    def get(self, reduce, half=None):
        """Give one map for each image.

        :param str reduce: "signed", the mean of M as in the paper; "abs", the mean of |M|;
            "squared", that of M^2; "variance", that of (M - mean M)^2, called VarGrad
        :param int half: 0 or 1 for the even or odd samples only
        :return: (N, C, H, W), float64
        :rtype: torch.Tensor
        """
        n = self.n if half is None else self.counts[half]
        means = (self.sums.sum(0) if half is None else self.sums[half]) / n
        if reduce == "variance":
            return (means[2] - means[0] ** 2).clamp_min(0)
        return means[REDUCE.index(reduce)]

    def reliability(self, reduce):
        """Estimate how well a second map of as many samples would agree with this one.

        The correlation r of the maps of the odd and of the even samples, as they are drawn, is
        that of n/2 samples; for n it is 2r / (1 + r) (Spearman and Brown, 1910).

        :param str reduce: as in :meth:`get`
        :return: from 0 to 1, of each image, (N,)
        :rtype: torch.Tensor
        """
        if min(self.counts) == 0:
            return torch.zeros(self.sums.shape[2])
        a, b = (over_channels(self.get(reduce, half)).flatten(1) for half in (0, 1))
        a, b = (m - m.mean(1, keepdim=True) for m in (a, b))
        r = F.cosine_similarity(a, b, eps=1e-30).clamp(0, 1)
        return 2 * r / (1 + r)


def smoothgrad(explain, x, target, noise, samples, chunk, rng):
    """Average the maps of noisy copies, some copies at a time, for as long as the caller asks.

    :param Callable explain: M, from (N, C, H, W) and (N,) to (N, C, H, W)
    :param torch.Tensor x: images, (N, C, H, W), in [0, 1]
    :param torch.Tensor target: class indices, (N,)
    :param float noise: sigma in parts of each image's own range; at 0 one sample is enough
    :param int samples: how many copies of each image
    :param int chunk: how many copies are computed at once: memory and speed, not the result
    :param torch.Generator rng: for the noise, which is the same for all images
    :return: after each chunk the same, growing :class:`Maps`
    :rtype: Iterator[Maps]
    """
    maps = Maps(x)
    samples = samples if noise else 1
    sigma = noise * (x.amax((1, 2, 3), keepdim=True) - x.amin((1, 2, 3), keepdim=True))
    while maps.n < samples:
        count = min(max(1, chunk // len(x)), samples - maps.n)
        # Drawn one by one: how many there are in a chunk doesn't change which they are.
        e = [torch.randn(x.shape[1:], generator=rng, device=x.device) for _ in range(count)]
        copies = (x + sigma * torch.stack(e)[:, None]).flatten(0, 1)  # (count * N, C, H, W)
        maps.add(explain(copies, target.repeat(count)).unflatten(0, (count, len(x))))
        yield maps


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


def average_maps(explain, x, target, noise, args, chunk, stop):
    """Run :func:`smoothgrad` until there are enough samples.

    :return: the :class:`Maps`, unfinished if a signal came; the frames of the animation
    """
    limit = (args.max_samples if args.converge else args.samples) if noise else 1
    rng, frames = make_rng(x.device, args.seed, 0), []
    with tqdm(total=limit, unit="sample", leave=False, disable=not is_first() or None) as bar:
        for maps in smoothgrad(explain, x, target, noise, limit, chunk, rng):
            bar.update(maps.n - bar.n)
            enough = args.converge and maps.n >= 16  # of fewer, r itself is uncertain
            enough = enough and maps.reliability(args.reduce).min() >= args.converge
            last = enough or maps.n == limit or stop.signum
            if args.gif and noise and (last or maps.n >= 1.3 ** len(frames)):
                picture = to_picture(to_heatmap(maps.get(args.reduce))[0])
                frames.append(add_caption(picture, f"{noise * 100:g} % noise, n = {maps.n}"))
            if last:
                break
    return maps, frames


def explain_photo(classifier, args, folder, stop, photo, stem, chunk):
    """Classify one photo, make its maps and write its pictures.

    :param Stop stop: its ``signum`` is the signal that came, if one did
    :param str photo: a file or ``sample:NAME``
    :param str stem: what the files of this photo are called
    :param int chunk: how many copies are computed at once
    :return: its record in metrics.json
    :rtype: dict
    :raises Interrupted: if a signal came
    """
    started, network, classes = time.time(), classifier.network, classifier.classes
    x = read_photo(photo, classifier.resize, classifier.size, classifier.channels)
    x = x.to(classifier.device)
    with torch.no_grad():
        probabilities = network(x).softmax(1)[0]
    best = probabilities.argsort(descending=True)[:5].tolist()
    top5 = [(classes[i], float(probabilities[i])) for i in best]
    say(f"{photo}: " + ", ".join(f"{name} {p:.1%}" for name, p in top5))
    label = best[0] if args.target is None else find_class(classes, args.target)
    probability, target = float(probabilities[label]), torch.tensor([label], device=x.device)

    gradient = partial(input_gradient, network, kind=args.score)
    baseline = make_baseline(args.baseline, x, make_rng(x.device, args.seed, 1))
    explain = {
        "gradient": gradient,
        "gradient-x-input": lambda x, target: gradient(x, target) * x,
        "guided": partial(guided_backprop, gradient),
        "integrated": partial(integrated_gradients, gradient, baseline, args.steps, chunk),
    }[args.method]
    points, copies = (args.steps, 1) if args.method == "integrated" else (1, chunk)
    lead = "  " if ranks()[1] == 1 else f"{photo}: "  # other processes print between our lines
    records, heats, captions, arrays = [], {}, [], {"photo": x[0].cpu().numpy()}
    for noise in args.noise:
        maps, frames = average_maps(explain, x, target, noise, args, copies, stop)
        if stop.signum:
            raise Interrupted(f"stopped; go on: python {SCRIPT}.py --resume {folder}", stop.signum)
        values = maps.get(args.reduce if noise else "signed")  # one sample has no variance
        reliability = float(maps.reliability(args.reduce)) if noise else 1.0
        order, rng = over_channels(values)[0], make_rng(x.device, args.seed, 2)
        left, chance = deletion_test(network, x, label, order, rng)
        records.append({"noise": noise, "samples": maps.n, "reliability": reliability,
                        "probability_left": left, "probability_left_random": chance})  # fmt: skip
        title = f"{noise * 100:g} % noise, n = {maps.n}" if noise else args.method
        trust = f"reliability {reliability:.2f}" if noise else "no noise, the same each time"
        say(f"{lead}{title}: {trust}; {left:.1%} are left without its top 10 % of pixels, "
            f"{chance:.1%} without a random 10 %")  # fmt: skip
        if args.converge and reliability < args.converge:
            say(f"warning: {photo}: not converged: raise --max-samples", sys.stderr)
        if args.method == "integrated" and not noise:
            with torch.no_grad():
                pair = torch.cat([x, baseline])
                high, low = class_score(network(pair), target.repeat(2), args.score).tolist()
            gap = float(values.sum()) - (high - low)
            records[-1] |= {"completeness_gap": gap, "score": high, "baseline_score": low}
            say(f"{lead}its sum misses the score's change of {high - low:.3f} by {gap:.3f}")
        name = f"noise_{noise * 100:g}"
        arrays[name], heat = values[0].float().cpu().numpy(), to_heatmap(values)[0]
        save_png(folder / f"{stem}_{name}.png", to_picture(heat))
        save_gif(folder / f"{stem}_{name}.gif", frames, seconds=5)
        heats[title] = heat.cpu().numpy()
        captions.append(f"{left:.1%} ({chance:.1%})\n{trust}")
    with replacing(folder / f"{stem}.npz") as part:
        np.savez_compressed(part, **arrays)
    panel, pixels = f"{stem}_panel.png", x[0].permute(1, 2, 0).cpu().numpy()
    draw_panel(folder / panel, pixels, heats, captions, f"{classes[label]}, {probability:.1%}")
    return {"path": photo, "target": label, "class_name": classes[label],
            "probability": probability, "seconds": round(time.time() - started, 2),
            "evaluations": points * sum(r["samples"] for r in records),
            "top5": top5, "maps": records, "panel": panel}  # fmt: skip


# ------------------------------------------------------------------------------------ the script


# fmt: off
def get_parser():
    """Build the command line."""
    parser = make_parser(SCRIPT, __doc__)
    some, part, seed = number(int, 1), number(float, 0.01, 0.9999), number(int, 0, 2**32 - 1)

    group = parser.add_argument_group("data")
    group.add_argument("--image", nargs="+", default=["sample:coffee"], metavar="PATH", help=(
        "pictures, or folders of them; sample:coffee, :cat, :rocket, :astronaut need no file"))
    group = parser.add_argument_group("model")
    group.add_argument("--model", default="efficientnet_lite0", help=(
        "this needs no download; or a torchvision.models, timm/NAME, a run of train_classifier.py"))
    group.add_argument("--target", help="class to explain, index or name; by default the top one")
    group = parser.add_argument_group("method")
    group.add_argument("--method", default="gradient", choices=METHODS, help="what is averaged")
    group.add_argument("--noise", nargs="+", type=number(float, 0, 10), default=[0.0, 0.1, 0.3],
                       help="sigma in parts of the photo's range of values; one map for each")
    group.add_argument("--samples", type=some, default=100, help="noisy copies per map")
    group.add_argument("--converge", type=part, metavar="R", help=(
        "instead of --samples, go on until the map's reliability is R, for example 0.95"))
    group.add_argument("--max-samples", type=some, default=5000, help="where --converge gives up")
    group.add_argument("--reduce", default="signed", choices=REDUCE, help=(
        "mean of the gradient, as in the paper; of its absolute value; of its square; variance"))
    group.add_argument("--score", default="logit", choices=("logit", "probability", "loss"),
                       help="what is differentiated")
    group.add_argument("--baseline", default="black", choices=("black", "mean", "blurred", "noise"),
                       help="where Integrated Gradients starts")
    group.add_argument("--steps", type=number(int, 1, 100_000), default=128, help=(
        "of Integrated Gradients; averaged over noisy copies, 8 are enough"))
    group.add_argument("--seed", type=seed, default=0, help="same seed, same machine, same result")
    group.add_argument("--cuda", action="store_true", help="use the GPU, if there is one")
    group.add_argument("--chunk", type=some, help=(
        "copies at once: memory and speed, not the result (default: CPU 8, GPU 64)"))
    group = parser.add_argument_group("output")
    group.add_argument("--out", help=f"new run folder (default: runs/{SCRIPT}/DATE-TIME)")
    group.add_argument("--resume", metavar="RUN", help="go on with the photos that a run lacks")
    group.add_argument("--gif", action="store_true", help="show the maps forming")
    group.add_argument("--html", action="store_true", help="write report.html, to play with")
    group.add_argument("--dry-run", action="store_true", help="two samples, to see if all works")
    return parser
# fmt: on


def main(argv=None):
    """Explain every photo.

    :param list[str] argv: the command line; None for sys.argv
    :return: what metrics.json holds
    :rtype: dict
    :raises UserError: for a mistake in the arguments, or photos that can't be read
    """
    parser, started = get_parser(), time.time()
    args = parser.parse_args(argv)
    if args.resume:
        args = resume_args(parser, argv, load_arguments(args.resume, SCRIPT), FREE)
    elif args.dry_run:
        args.samples = args.max_samples = args.steps = 2
    args.noise = list({f"{100 * noise:g}": noise for noise in args.noise}.values())
    photos = find_photos(args.image)
    device = set_up(args.cuda, args.seed)
    classifier = load_classifier(args.model, device)
    if args.target is not None:
        find_class(classifier.classes, args.target)  # a mistake in it is no single photo's fault
    if args.method == "guided":  # nor is a network without ReLU
        blank = torch.zeros(1, classifier.channels, classifier.size, classifier.size, device=device)
        guided_backprop(lambda x, _: classifier.network(x.requires_grad_()), blank, None)
    folder = open_run(SCRIPT, args.out, args.resume)
    save_arguments(folder, SCRIPT, args)
    chunk = args.chunk or (64 if device.type == "cuda" else 8)

    def explain(pairs):
        nonlocal chunk
        one = partial(explain_photo, classifier, args, folder, stop, *pairs[0])
        record, chunk = fit_memory(one, chunk)
        return [record]

    with watching_signals() as stop:
        images, failed = explain_photos(photos, folder, explain)
    return finish_photos(folder, SCRIPT, args, argv, device, started, images, failed, 640,
                         args.html and get_parser())  # fmt: skip


if __name__ == "__main__":
    sys.exit(exit_code(main))
