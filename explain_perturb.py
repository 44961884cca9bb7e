"""Learn what to delete from a photo so that a classifier no longer sees its class.

Meaningful Perturbation (Fong & Vedaldi 2017, arXiv 1704.03296) learns a mask m: where it is 1 the
photo x stays, where it is 0 a reference r (its blur, noise, one colour) takes its place.

    min_m  l1 mean(1 - m) + l2 mean|grad m|^b + E_tau[S(z)],    z = m x(. - tau) + (1 - m) r

with S the score of the class: the game of deletion. In that of preservation, as little of the photo
as possible has to keep the score.

    python explain_perturb.py --image sample:coffee

How much goes then hangs on l1 and l2. Fong, Patrick & Vedaldi (2019, arXiv 1910.08485) fix the
area instead and learn a mask for each of several areas: --regularizer area. Our default, nested,
learns one map s, whose level sets are the masks of all areas a:

    1 - m_a = sigmoid(s - q_a),    with the threshold q_a for which mean(1 - m_a) = a

Each step draws some areas, deletes one half of them and keeps the other half, with half the weight
(--keep-weight). What comes out ranks the photo's parts; reported is the smallest area that takes
95 % of the class's probability (--suppress). The map is the sum of maps of 28, 14, 7 and 3 cells a
side, so that few steps move large parts: from one map alone, half as much again is deleted.

On two cores a photo takes two seconds (AMD EPYC) or four (Intel Xeon), for 100 pictures evaluated.

Differences from the paper: masks are sigmoids, as L-BFGS needs; the score is log odds, as a
probability near 1 has no gradient; l1 and l2 weigh means, not sums.
"""

import sys
import time
from typing import NamedTuple

import torch
from torch.nn import functional as F
from tqdm import tqdm

from common import masks
from common.checkpoint import resume_args
from common.classifiers import find_class, load_classifier
from common.deletion import make_reference
from common.device import fit_memory, is_first, make_rng, set_up
from common.errors import Interrupted, UserError, exit_code, make_parser, number
from common.gallery import explain_photos, finish_photos, load_arguments, save_arguments, say
from common.images import add_caption
from common.outcome import write_mask
from common.panels import to_picture
from common.photos import find_photos, read_photo
from common.run import open_run, watching_signals

SCRIPT = "explain_perturb"
FLOOR = 0.02  # of the odds: from this far from 0 or 1 on, a probability has little left to win
PARTS = (0.8, 0.9, 0.95, 0.99)  # of the probability: the areas that take them are reported
FREE = {"image", "cuda", "batch", "tensorboard", "resume", "html"}  # what --resume may change


# ------------------------------------------------------------------------------------- the score


def class_score(logits, target, kind):
    """Say how much each picture looks like its class.

    :param torch.Tensor logits: (N, classes)
    :param torch.Tensor target: class indices, (N,)
    :param str kind: "logit"; "probability", without a gradient near 1 and 0; "odds", the logarithm
        of its odds, which has one
    :return: (N,)
    :rtype: torch.Tensor
    """
    scores = logits if kind == "logit" else logits.softmax(1)
    score = scores.gather(1, target[:, None])[:, 0]
    return ((score + FLOOR) / (1 - score + FLOOR)).log() if kind == "odds" else score


# ------------------------------------------------------------------------------------- the method


class Draw(NamedTuple):
    """What differs from step to step. The same for all photos, so that a batch changes no result.

    ``shifts`` of the photo under the mask, [down, across] for each of P pictures; ``areas``, (P,);
    ``noise``, (P, C, H, W), or of one pixel; ``progress``, 1 in the last step.
    """

    shifts: list
    areas: torch.Tensor
    noise: torch.Tensor
    progress: float


class Game:
    """The objective of N photos, of each on its own.

    Regions are learned, 1 where the class is: deletion takes them away, preservation keeps nothing
    else. "both" does the one and the other with the same regions, picture by picture in turn.

    :param torch.nn.Module network: from pixels to logits
    :param torch.Tensor x: photos, (N, C, H, W), in [0, 1]
    :param torch.Tensor reference: what takes the place of what is deleted, (N, C, H, W)
    :param torch.Tensor target: class indices, (N,)
    :param argparse.Namespace args: what was asked for
    """

    def __init__(self, network, x, reference, target, args):
        self.network, self.x, self.reference, self.target = network, x, reference, target
        self.args, self.size = args, x.shape[-1]
        self.areas = torch.tensor(args.areas, device=x.device)
        both, fixed = args.game == "both", args.regularizer == "area"
        args.iterations = args.iterations or (80 if fixed else 25)
        args.lr = args.lr or (0.5 if fixed else 1.0)
        self.mask_count = len(args.areas) if fixed else 1
        count = self.mask_count * (1 + both) if fixed else args.pictures
        self.keeps = torch.full((count,), args.game == "preservation", device=x.device)
        self.keeps[1::2] |= both
        # The areas reported are those of deletion: it counts more than preservation.
        self.signs = torch.where(self.keeps, -args.keep_weight if both else -1.0, 1.0)
        self.jitter = max(1, round(args.jitter * self.size / 224))
        self.padded = F.pad(torch.cat([x, reference], 1), (0, self.jitter - 1) * 2, "replicate")

    def start(self):
        """Give the parameters to start from, (N, K, cells): no cell is better than another."""
        cells = masks.count_cells(self.args.mask_size)
        return torch.zeros(len(self.x), self.mask_count, cells, device=self.x.device)

    def draw(self, rng, progress=1.0):
        """Draw what is random in a step, a :class:`Draw`."""
        on, count = {"generator": rng, "device": rng.device}, len(self.keeps)
        shifts = torch.randint(self.jitter, (count, 2), **on).tolist()
        # Small and large areas have their turn in every step, and in both games.
        turns = 2 if self.args.game == "both" else 1
        place = (torch.arange(count, device=rng.device) // turns + torch.rand(count, **on)) * turns
        low, high = self.areas.log()[[0, -1]]
        areas = (low + (high - low) * place / (count + count % turns)).exp()
        shape = (count, *self.x.shape[1:]) if self.args.image_noise else (count, 1, 1, 1)
        return Draw(shifts, areas, torch.randn(shape, **on) * self.args.image_noise, progress)

    def regions(self, theta, areas):
        """Turn parameters into regions.

        :param torch.Tensor theta: (N, K, cells)
        :param torch.Tensor areas: (P,); nested: one for each region
        :return: in [0, 1], (N, P, s, s) for nested, else (N, K, s, s)
        :rtype: torch.Tensor
        """
        values = masks.sum_levels(theta, self.args.mask_size)
        if self.args.regularizer == "nested":
            return masks.level_sets(values, areas)
        found = values.sigmoid()
        return masks.smooth_max(found) if self.args.regularizer == "area" else found

    def perturb(self, m, draw):
        """Put the reference where m is 0, after shifting the photo under the mask.

        :param torch.Tensor m: (N, P, H, W)
        :param Draw draw: as from :meth:`draw`
        :return: (N, P, C, H, W)
        :rtype: torch.Tensor
        """
        shifted = [self.padded[..., i : i + self.size, j : j + self.size] for i, j in draw.shifts]
        x, reference = torch.stack(shifted, 1).chunk(2, 2)  # (N, P, C, H, W) each
        return torch.lerp(reference, x, m[:, :, None]) + draw.noise

    def objective(self, theta, draw):
        """Compute what is minimised, from theta, (N, K, cells), for each photo, (N,)."""
        args, count = self.args, len(self.keeps)
        found = self.regions(theta, draw.areas)
        u = found.repeat_interleave(count // found.shape[1], 1)  # (N, P, s, s)
        m = masks.enlarge(torch.where(self.keeps[:, None, None], u, 1 - u), self.size)
        z = self.perturb(m, draw).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        score = class_score(self.network(z), self.target.repeat_interleave(count), args.score)
        value = (score.view(-1, count) * self.signs).mean(1)
        if args.regularizer == "area":
            # Masks of the right area from the start never find the class: it comes to count.
            weight = args.area_weight * draw.progress**2
            value = value + weight * masks.area_penalty(found, self.areas).mean(1)
        if args.regularizer == "tv":
            smooth = masks.total_variation(found, args.beta)
            value = value + (args.l1 * found.mean((2, 3)) + args.l2 * smooth)[:, 0]
        return value


def optimise(game, theta, args, rng):
    """Minimise the objective of each photo, step by step, for as long as the caller asks.

    :param torch.Tensor theta: where to start, (N, K, cells); changed in place
    :param torch.Generator rng: for the draws
    :return: after each step the objectives before it, (N,), and the pictures evaluated so far, for
        each photo
    :rtype: Iterator[tuple[torch.Tensor, int]]
    """
    theta.requires_grad_()
    adam = torch.optim.Adam([theta], args.lr, betas=(0.8, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, args.iterations)
    use_lbfgs, history, evaluations = args.optimizer == "lbfgs", [], 0
    finished = torch.zeros(len(theta), dtype=torch.bool)

    def closure():
        theta.grad = None
        value = game.objective(theta, draw)
        value.sum().backward(inputs=[theta])
        values.append(value.detach().cpu())
        return value.sum()

    for step in range(1, args.iterations + 1):
        draw, before, values = game.draw(rng, step / args.iterations), theta.detach().clone(), []
        if use_lbfgs:  # its line search compares values, so that draws are fixed within a step
            lbfgs = torch.optim.LBFGS([theta], max_iter=args.inner, line_search_fn="strong_wolfe")
            lbfgs.step(closure)
            if not theta.isfinite().all():
                say("warning: L-BFGS led to NaN: going on with Adam", sys.stderr)
                use_lbfgs = False
                theta.data.copy_(before)
        else:
            closure()
            adam.step()
            schedule.step()
        theta.data[finished] = before[finished]  # they rest, whoever else is in the batch
        if not theta.isfinite().all():
            raise UserError("the mask is no longer finite: choose a smaller --lr")
        evaluations += len(values) * len(game.keeps)
        history.append(values[0])
        yield values[0], evaluations
        if args.tolerance and len(history) >= 20:
            old, new = torch.stack(history[-20:]).view(2, 10, -1).mean(1)
            finished |= (old - new).abs() <= args.tolerance * old.abs()
            if finished.all():
                return


@torch.no_grad()
def find_answer(game, i, theta, before):
    """Find the smallest region that is enough for one photo, on pictures as they will be saved.

    :param int i: the photo
    :param torch.Tensor theta: what was learned, (N, K, cells)
    :param float before: the class's probability in the photo
    :return: the mask m, (H, W); a ranking of the pixels, (H, W), large where the class is; the
        masked photo, uint8, (C, H, W); what metrics.json says about them
    :rtype: tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict]
    """
    keeping, suppress = game.args.game == "preservation", game.args.suppress

    def look(areas):
        u = masks.enlarge(game.regions(theta[i : i + 1], areas)[0], game.size)  # (K, H, W)
        m = u if keeping else 1 - u
        pictures = (torch.lerp(game.reference[i], game.x[i], m[:, None]) * 255).round()
        logits = torch.cat([game.network(some / 255) for some in pictures.split(8)])
        return u, m, pictures, logits.softmax(1)[:, game.target[i]]

    def enough(left, part):
        return left >= part * before if keeping else left <= (1 - part) * before

    areas = torch.linspace(0.1, 0.98, 24, device=theta.device) ** 2
    seen = look(areas)
    ranking, first = seen[0].mean(0), int(enough(seen[-1], suppress).int().argmax())
    if first and game.args.regularizer == "nested":  # a closer look below the first that is enough
        ends = areas[first - 1 : first + 1].tolist()
        closer = look(torch.linspace(*ends, 9, device=theta.device)[1:-1])
        seen = [torch.cat([a[:first], b, a[first:]]) for a, b in zip(seen, closer, strict=True)]
    u, m, pictures, left = seen
    areas, smallest = u.mean((1, 2)), {}
    for part in sorted({*PARTS, suppress}):
        ok = enough(left, part)
        smallest[part] = int(areas.where(ok, torch.inf).argmin()) if ok.any() else None
    reached = smallest[suppress] is not None
    best = smallest[suppress] if reached else int(left.argmax() if keeping else left.argmin())
    facts = {
        "probability_after": float(left[best]),
        "area": float(1 - m[best].mean()),
        "reached": reached,
        "smallest_areas": {f"{100 * part:g}%": None if k is None else float(areas[k])
                           for part, k in smallest.items()},
        "curve": torch.stack([1 - m.mean((1, 2)), left], 1).tolist(),  # over the deleted area
    }  # fmt: skip
    return m[best], ranking, pictures[best].byte(), facts


def explain_group(classifier, args, folder, stop, pairs):
    """Explain some photos at once, and write their pictures.

    :param Stop stop: holds the signal that came, if one did
    :param list[tuple[str, str]] pairs: photos, and what their files are called
    :return: their records in metrics.json
    :rtype: list[dict]
    :raises Interrupted: if a signal came
    """
    network, size, device = classifier.network, classifier.size, classifier.device
    x = [read_photo(photo, classifier.resize, size, classifier.channels) for photo, _ in pairs]
    started, x = time.time(), torch.cat(x).to(device)
    with torch.no_grad():
        probabilities = network(x).softmax(1)
    target = probabilities.argmax(1)
    if args.target is not None:
        target[:] = find_class(classifier.classes, args.target)
    before = probabilities.gather(1, target[:, None])[:, 0].tolist()

    rng = make_rng(device, args.seed)
    reference = make_reference(args.reference, x, args.blur * size / 224, rng)
    game = Game(network, x, reference, target, args)
    theta, traces, frames = game.start(), [[] for _ in pairs], [[] for _ in pairs]
    steps = optimise(game, theta, args, rng)
    quiet = not is_first() or None  # None: off where there is no terminal
    for values, evaluations in tqdm(steps, total=args.iterations, leave=False, disable=quiet):
        for i, value in enumerate(values.tolist()):
            traces[i].append({"evaluations": evaluations, "objective": value})
            if args.gif:
                u = game.regions(theta[i : i + 1].detach(), game.areas)
                picture = to_picture(masks.enlarge(u, size)[0].mean(0))
                frames[i].append(add_caption(picture, f"{evaluations} evaluations"))
        if stop.signum:
            raise Interrupted(f"stopped; go on: python {SCRIPT}.py --resume {folder}", stop.signum)
    answers = [find_answer(game, i, theta, before[i]) for i in range(len(pairs))]
    seconds, records = round((time.time() - started) / len(pairs), 2), []
    for i, (photo, stem) in enumerate(pairs):
        m, ranking, perturbed, facts = answers[i]
        record = {"path": photo, "panel": f"{stem}_panel.png", "target": int(target[i]),
                  "class_name": classifier.classes[target[i]], "probability": before[i],
                  "seconds": seconds, "evaluations": evaluations, **facts,
                  "trace": traces[i]}  # fmt: skip
        write_mask(folder, stem, x[i], m, ranking, perturbed, record, frames[i])
        say(f"{photo}: {record['class_name']} {before[i]:.2%}, after the mask "
            f"{record['probability_after']:.2%}; deleted {record['area']:.1%}")  # fmt: skip
        if not record["reached"]:
            say(f"warning: {photo}: no area is enough: --reference mean?", sys.stderr)
        records.append(record)
    return records


# ------------------------------------------------------------------------------------ the script


# fmt: off
def get_parser():
    """Build the command line."""
    parser = make_parser(SCRIPT, __doc__)
    some, weight, part = number(int, 1), number(float, 0), number(float, 0.001, 0.999)

    group = parser.add_argument_group("data")
    group.add_argument("--image", nargs="+", default=["sample:coffee"], metavar="PATH", help=(
        "pictures, or folders of them; sample:coffee, sample:cat, sample:rocket and "
        "sample:astronaut need no file"))
    group = parser.add_argument_group("model")
    group.add_argument("--model", default="efficientnet_lite0", help=(
        "efficientnet_lite0 needs no download; a name of torchvision.models, timm/NAME, or a run "
        "of train_classifier.py"))
    group.add_argument("--target", help="class to explain, index or name; by default the top one")
    group = parser.add_argument_group("method")
    group.add_argument("--game", default="both", choices=("deletion", "preservation", "both"),
                       help="delete little to lose the class, keep little to keep it, or both")
    group.add_argument("--keep-weight", type=weight, default=0.5,
                       help="both: of preservation, where deletion has 1")
    group.add_argument("--regularizer", default="nested", choices=("nested", "area", "tv"),
                       help="one map for all areas, one mask for each, or weights l1 and l2")
    group.add_argument("--areas", nargs="+", type=part, default=[0.1, 0.2, 0.4, 0.6, 0.8],
                       help="area: parts of the picture; nested: areas are drawn between the ends")
    group.add_argument("--suppress", type=part, default=0.95, help=(
        "report the smallest area that takes this part of the probability (preservation: keeps)"))
    group.add_argument("--score", default="odds", choices=("odds", "probability", "logit"),
                       help="what deletion lowers and preservation raises")
    group.add_argument("--reference", default="blur", choices=("blur", "mean", "noise"),
                       help="what takes the place of what is deleted")
    group.add_argument("--blur", type=number(float, 0.1, 70), default=10.0,
                       help="its sigma, in pixels of 224")
    group.add_argument("--mask-size", type=number(int, 2, 224), default=28, help="cells a side")
    group.add_argument("--jitter", type=number(int, 0, 64), default=4, help=(
        "shift the photo under the mask by less than so many pixels of 224, right and down"))
    group.add_argument("--image-noise", type=weight, default=0.0,
                       help="standard deviation of noise on each perturbed picture, in [0, 1]")
    group.add_argument("--l1", type=weight, default=0.1, help="tv: weight of the mean of 1 - m")
    group.add_argument("--l2", type=weight, default=1.0, help="tv: weight of mean |grad m|^beta")
    group.add_argument("--beta", type=number(float, 1, 10), default=3.0, help="tv: its exponent")
    group.add_argument("--area-weight", type=weight, default=300.0, help="area: of its penalty")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--optimizer", default="adam", choices=("adam", "lbfgs"), help=(
        "lbfgs: with a line search, random draws fixed within a step"))
    group.add_argument("--iterations", type=some, help="steps (default: 25; area: 80)")
    group.add_argument("--inner", type=some, default=5, help="lbfgs: iterations in a step")
    group.add_argument("--pictures", type=number(int, 2), default=4, help="pictures in a step")
    group.add_argument("--lr", type=number(float, 1e-12), help="of adam (default: 1; area: 0.5)")
    group.add_argument("--tolerance", type=weight, default=0.0, help=(
        "stop when ten steps have changed the objective by less than this part of it"))
    group.add_argument("--batch", type=some, default=1, help="photos at once")
    group.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0,
                       help="same seed, same machine, same result")
    group.add_argument("--cuda", action="store_true", help="use the GPU, if there is one")
    group = parser.add_argument_group("output")
    group.add_argument("--out", help=f"new run folder (default: runs/{SCRIPT}/DATE-TIME)")
    group.add_argument("--resume", metavar="RUN", help="go on with the photos that a run lacks")
    group.add_argument("--gif", action="store_true", help="show the mask forming")
    group.add_argument("--html", action="store_true", help="write report.html, to play with")
    group.add_argument("--tensorboard", action="store_true", help="show masks while it goes on")
    group.add_argument("--dry-run", action="store_true", help="two steps, to see if all works")
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
        args.iterations = args.pictures = 2
    args.areas = sorted(set(args.areas))
    if args.optimizer == "lbfgs" and args.batch > 1:
        raise UserError("--optimizer lbfgs takes one photo at a time: leave out --batch")
    photos = find_photos(args.image)
    device = set_up(args.cuda, args.seed)
    classifier = load_classifier(args.model, device)
    if args.target is not None:
        find_class(classifier.classes, args.target)  # a mistake in it is no single photo's fault
    folder = open_run(SCRIPT, args.out, args.resume, args.tensorboard)
    save_arguments(folder, SCRIPT, args)

    def explain(pairs):
        def in_groups(size):
            groups = [pairs[i : i + size] for i in range(0, len(pairs), size)]
            return [r for g in groups for r in explain_group(classifier, args, folder, stop, g)]

        records, args.batch = fit_memory(in_groups, args.batch, "--batch")
        return records

    with watching_signals() as stop:
        images, failed = explain_photos(photos, folder, explain, args.batch)
    return finish_photos(folder, SCRIPT, args, argv, device, started, images, failed, 900,
                         args.html and get_parser())  # fmt: skip


if __name__ == "__main__":
    sys.exit(exit_code(main))
