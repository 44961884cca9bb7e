"""Train a DCGAN (Radford et al. 2015, arXiv 1511.06434) that draws handwriting, 28 x 28 pixels.

Two networks play against each other. The discriminator D tells data x from drawings G(z), the
generator G turns noise z into drawings that D takes for data (Goodfellow et al. 2014,
arXiv 1406.2661, the non-saturating form of section 3):

    D:  min  -E_x[log D(x)] - E_z[log(1 - D(G(z)))]
    G:  min  -E_z[log D(G(z))]

    python train_dcgan.py --epochs 100 --cuda

What this script's ancestor learnt: without BatchNorm1d after the linear layers (--no-linear-bn) G
never catches up, and all its drawings collapse into one; results/README.md shows both.

On two CPU cores an epoch of MNIST takes two minutes (AMD) or four (Intel); most digits can be read
after three. What makes drawings better, as --fid scores them, is measured in benchmarks/README.md.

Differences from the paper: 28 x 28 pixels, hence linear layers up to 5 x 5 and other kernels;
sigmoid and [0, 1] in place of tanh and [-1, 1], the first drawings as bright as the data; normal
z (--latent uniform for the paper's); a larger learning rate and smaller batches than the paper's;
samples come from a moving average of G's weights (--ema 0 turns it off).
"""

import copy
import sys
import time
from argparse import BooleanOptionalAction

import numpy as np
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from tqdm import tqdm

from common.checkpoint import load_checkpoint, restore, resume_args, save_checkpoint
from common.data import EMNIST_SPLITS, NAMES, load_dataset
from common.device import average_gradients, average_over_ranks, is_first, make_rng, ranks, set_up
from common.errors import Interrupted, UserError, exit_code, make_parser, number
from common.fid import PANELS, SCORES, make_judge
from common.images import add_caption, interpolate, plot_curves, save_gif, save_png, to_grid
from common.layers import Linear, linear_layer, make_layer
from common.report import gan_page, make_walks
from common.run import finish, open_run, replacing, watching_signals, write_csv

SCRIPT = "train_dcgan"
SIDE = 28  # pixels
COLUMNS = ("d_loss", "g_loss", "d_real", "d_fake")
PLOTS = (COLUMNS[:2], COLUMNS[2:], *PANELS)  # which of them are drawn together
# What --resume may change: nothing here touches what the run has already learnt.
FREE = {"epochs", "cuda", "compile", "fid", "gif_every", "checkpoint_every", "data_dir", "resume",
        "n", "tensorboard", "html"}  # fmt: skip
START = {"done": 0, "totals": [0.0] * 4}  # of an epoch: batches behind us, sums over them


# ---------------------------------------------------------------------------------------- model


def scaled(width):
    """Scale the four sizes of both networks: the linear layer's and the convolutions'."""
    return (max(1, round(width * size)) for size in (1024, 256, 128, 64))


class Generator(nn.Sequential):
    """Turn noise into pictures.

    :param int z_dim: length of the noise z, (N, z_dim)
    :param int channels: of the pictures, (N, channels, 28, 28), in [0, 1]
    :param float width: scales the channels of every layer
    :param bool linear_bn: BatchNorm1d after the linear layers
    """

    def __init__(self, z_dim=100, channels=1, width=1.0, linear_bn=True):
        hidden, c256, c128, c64 = scaled(width)
        super().__init__(
            *linear_layer(z_dim, hidden, nn.ReLU(inplace=True), linear_bn),  # (N, 1024)
            *linear_layer(hidden, c256 * 5 * 5, nn.ReLU(inplace=True), linear_bn),  # (N, 6400)
            nn.Unflatten(1, (c256, 5, 5)),  # (N, 256, 5, 5)
            make_layer(c256, c128, kernel=3, stride=1, padding=0, deconv=True),  # (N, 128, 7, 7)
            make_layer(c128, c64, kernel=4, stride=2, deconv=True),  # (N, 64, 14, 14)
            nn.ConvTranspose2d(c64, channels, kernel_size=4, stride=2, padding=1),
            nn.Sigmoid(),  # (N, C, 28, 28)
        )


class Discriminator(nn.Sequential):
    """Tell data from drawings: the generator, mirrored.

    :param int channels: of the pictures, (N, channels, 28, 28), in [0, 1]
    :param float width: scales the channels of every layer
    :param bool linear_bn: BatchNorm1d after the linear layer
    """

    def __init__(self, channels=1, width=1.0, linear_bn=True):
        hidden, c256, c128, c64 = scaled(width)
        super().__init__(
            # No BatchNorm on the pictures themselves (section 3 of the paper): it oscillates.
            make_layer(channels, c64, kernel=4, stride=2, use_batchnorm=False),  # (N, 64, 14, 14)
            make_layer(c64, c128, kernel=4, stride=2),  # (N, 128, 7, 7)
            make_layer(c128, c256, kernel=3, stride=1, padding=0),  # (N, 256, 5, 5)
            nn.Flatten(),  # (N, 6400)
            *linear_layer(c256 * 5 * 5, hidden, nn.LeakyReLU(0.2, inplace=True), linear_bn),
            Linear(hidden, 1),  # (N, 1), a logit: the sigmoid is in the loss, where it is exact
        )


def init_weights(module):
    """Draw weights from N(0, 0.02), as section 4 of the paper does; for ``Module.apply``."""
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        nn.init.normal_(module.weight, 1.0, 0.02)


@torch.no_grad()
def init_output(generator, images):
    """Let drawings begin as bright as the data, uint8: from mid-grey, some seeds never recover."""
    generator[-2].bias.fill_(torch.logit(images.float().mean() / 255, eps=1e-3))


# --------------------------------------------------------------------------------------- method


def draw_z(n, z_dim, latent, rng):
    """Draw noise, (n, z_dim), on rng's device; latent "normal" is N(0, 1), "uniform" U(-1, 1)."""
    if latent == "normal":
        return torch.randn(n, z_dim, generator=rng, device=rng.device)
    return torch.rand(n, z_dim, generator=rng, device=rng.device) * 2 - 1


def bce(logits, target):
    """Mean binary cross-entropy of logits against one label for all, 1 data or 0 drawing."""
    return binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


@torch.no_grad()
def update_ema(ema, generator, decay):
    """Move the averaged generator towards the current one: ema <- decay ema + (1 - decay) G."""
    for mean, value in zip(ema.state_dict().values(), generator.state_dict().values(), strict=True):
        if mean.is_floating_point():  # all but BatchNorm's counter of batches, which nobody reads
            mean.lerp_(value, 1 - decay)


def train(generator, discriminator, ema, g_optimizer, d_optimizer, images, args, stop, progress,
          epoch):  # fmt: skip
    """Train for one epoch, or for what is left of it.

    All randomness is a function of (seed, epoch, rank), so that a resumed run needs no saved
    state of any generator, and looking at samples can't change the weights.

    :param torch.nn.Module generator: G
    :param torch.nn.Module discriminator: D
    :param torch.nn.Module ema: moving average of G, updated in place
    :param torch.optim.Optimizer g_optimizer: of G's parameters
    :param torch.optim.Optimizer d_optimizer: of D's parameters
    :param torch.Tensor images: the data, uint8, (N, C, 28, 28), on the device
    :param argparse.Namespace args: seed, batch_size, z_dim, latent, ema, amp, dry_run
    :param Callable stop: asked between two batches; true to leave early
    :param dict progress: "done", batches of this epoch that are behind us, and "totals", the sums
        over them of D's loss, G's loss, D(x) and D(G(z)), averaged over the processes; updated in
        place, and "whole" set: whether the epoch was finished
    :param int epoch: from 1
    """
    (rank, world), device, batch = ranks(), images.device, args.batch_size
    steps = 1 if args.dry_run else len(images) // (batch * world)
    order = torch.randperm(len(images), generator=make_rng("cpu", args.seed, epoch)).to(device)
    rng = make_rng(device, args.seed, epoch, rank + 1)
    # The sums stay on the device: reading one number per batch would make the GPU wait for us.
    totals = torch.tensor(progress["totals"], device=device)
    for step in tqdm(range(steps), f"epoch {epoch}", leave=False, disable=rank > 0 or None):
        z = draw_z(batch, args.z_dim, args.latent, rng)
        if step < progress["done"]:
            continue  # resumed within an epoch: only the noise has to be drawn again
        first = (step * world + rank) * batch
        real = images[order[first : first + batch]].float().div_(255)

        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            # ----------------------------------------------------------------------------- (1) D
            # Data is 1, drawings are 0. Data and drawings go through D one after the other, since
            # BatchNorm would give away a mixed batch.
            fake = generator(z)
            real_logits, fake_logits = discriminator(real), discriminator(fake.detach())
            d_loss = bce(real_logits, 1.0) + bce(fake_logits, 0.0)
        d_optimizer.zero_grad()
        d_loss.backward()
        average_gradients(discriminator)
        d_optimizer.step()

        # --------------------------------------------------------------------------------- (2) G
        # The same drawings should pass for data with the D just improved. D's own gradients would
        # be thrown away: frozen, they aren't computed.
        discriminator.requires_grad_(False)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            g_loss = bce(discriminator(fake), 1.0)
        g_optimizer.zero_grad()
        g_loss.backward()
        average_gradients(generator)
        g_optimizer.step()
        discriminator.requires_grad_(True)

        # A fixed decay would remember the random first weights of a short run for too long.
        seen = (epoch - 1) * steps + step
        update_ema(ema, generator, min(args.ema, (1 + seen) / (10 + seen)))
        d_real, d_fake = (x.float().sigmoid().mean() for x in (real_logits, fake_logits))
        totals += torch.stack([d_loss, g_loss, d_real, d_fake]).detach()
        progress["done"] = step + 1
        if stop():
            break
    average_over_ranks(totals)
    progress |= {"totals": totals.tolist(), "whole": progress["done"] == steps}


@torch.no_grad()
def draw(ema, z):
    """Turn noise into pictures, 500 at once: yield (n, C, 28, 28) in [0, 1] for (N, z_dim)."""
    ema.eval()  # in train mode BatchNorm would make each sample depend on the others
    for chunk in z.split(500):
        yield ema(chunk.to(ema[0].weight.device))


def test(ema, z, latent, epoch):
    """Draw the same 64 samples as in every other epoch, and a walk from the first to the last.

    :param torch.nn.Module ema: the generator to look at
    :param torch.Tensor z: the fixed noise, (64, z_dim)
    :return: the picture, uint8, (H, W, 3)
    :rtype: numpy.ndarray
    """
    grid = to_grid(next(draw(ema, z)), columns=8)
    walk = to_grid(next(draw(ema, interpolate(z[0], z[-1], 8, latent))), columns=8)
    text = f"epoch {epoch}      last row: a walk from the first sample to the last"
    return add_caption(np.concatenate([grid, np.full_like(grid[:12], 64), walk]), text)


def load_data(args, train=True):
    """Load one half of the data, as the arguments say."""
    return load_dataset(args.dataset, args.data_dir, train, args.split, SIDE, glyphs=args.glyphs)


def score(ema, judge, args):
    """Score a generator, on the same noise each time; the noise is of no other use."""
    rng = make_rng("cpu", args.seed, 0)  # training's begin with epoch 1
    return judge.score(draw(ema, draw_z(judge.samples, args.z_dim, args.latent, rng)))


def sample(args, argv):
    """Draw ``args.n`` pictures from the run ``args.sample``, without training."""
    state, started = load_checkpoint(args.sample, SCRIPT), time.time()
    typed = FREE | {"sample", "out", "seed"}  # the rest is the run's own
    vars(args).update({k: v for k, v in state["args"].items() if k not in typed})
    device = set_up(args.cuda, args.seed)
    ema = Generator(args.z_dim, state["shape"][1], args.width, args.linear_bn)
    restore({"ema": ema.to(device, memory_format=torch.channels_last)}, state)
    judge = args.fid and make_judge(args.fid, load_data(args), load_data(args, False), device)
    fid = judge and judge.report(score(ema, judge, args))
    folder = open_run(SCRIPT, args.out)
    if not is_first():
        return {}
    z = draw_z(args.n, args.z_dim, args.latent, make_rng("cpu", args.seed))
    images = torch.cat([pictures.cpu() for pictures in draw(ema, z)])
    print(f"{args.n} samples of {args.sample}, trained for {len(state['history'])} epochs")
    save_png(folder / "samples.png", to_grid(images[:1024], columns=8 if args.n <= 64 else 32))
    with replacing(folder / "samples.npz") as part:
        np.savez_compressed(part, images=(images * 255).round().byte().numpy())
    if args.html:
        walks = torch.cat([*draw(ema, make_walks(z[:16], args.latent))])
        levels = state.get("floor") and {"fid": state["floor"]}
        gan_page(folder, SCRIPT, args, get_parser(), state["history"], PLOTS, levels, walks)
    return finish(folder, SCRIPT, args, argv, args.dataset, device, started, fid=fid)


# ------------------------------------------------------------------------------------ the script


def make_optimizer(model, args):
    """Make the optimizer of one network: Adam as in the paper, or the ancestor's SGD."""
    if args.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), args.lr or 0.01, momentum=0.9, nesterov=True)
    # Fused: one pass over the weights instead of a dozen, on a CPU too.
    return torch.optim.Adam(model.parameters(), args.lr or 1e-3, (args.beta1, 0.999), fused=True)


# fmt: off
def get_parser():
    """Build the command line."""
    parser = make_parser(SCRIPT, __doc__)
    some, positive, seed = number(int, 1), number(float, 1e-12), number(int, 0, 2**32 - 1)

    group = parser.add_argument_group("data")
    group.add_argument("--dataset", default="auto", choices=NAMES, help=(
        "auto: EMNIST, from disk or downloaded, else glyphs; folder: your own, in class folders"))
    group.add_argument("--data-dir", default="data", help="where datasets are, or go to")
    group.add_argument("--split", default="balanced", choices=EMNIST_SPLITS, help="EMNIST's split")
    group.add_argument("--glyphs", type=some, default=20_000, help="how many glyphs to make")
    group = parser.add_argument_group("model")
    group.add_argument("--width", type=number(float, 0.02, 16), default=1.0,
                       help="scale of all channels; 0.5 suits a small CPU")
    group.add_argument("--z-dim", type=some, default=100, help="length of the noise z")
    group.add_argument("--latent", default="normal", choices=("normal", "uniform"), help="noise")
    group.add_argument("--linear-bn", action=BooleanOptionalAction, default=True,
                       help="BatchNorm after the linear layers; without it G collapses")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=some, default=20, help="passes over the data")
    group.add_argument("--batch-size", type=number(int, 2), default=64, help="of each process")
    group.add_argument("--optimizer", default="adam", choices=("adam", "sgd"),
                       help="adam, or SGD with Nesterov momentum 0.9")
    group.add_argument("--lr", type=positive, help="default: 1e-3 for adam, 0.01 for sgd")
    group.add_argument("--beta1", type=number(float, 0, 0.999), default=0.5, help="Adam's momentum")
    group.add_argument("--ema", type=number(float, 0, 0.99999), default=0.999,
                       help="decay of the moving average of G that is sampled; 0 for G itself")
    group.add_argument("--seed", type=seed, default=0, help="same seed, same machine, same result")
    group.add_argument("--cuda", action="store_true", help="use the GPU, if there is one")
    group.add_argument("--amp", action="store_true", help="mixed precision, bfloat16")
    group.add_argument("--compile", action="store_true", help="torch.compile both networks")
    group = parser.add_argument_group("output")
    group.add_argument("--out", help=f"new run folder (default: runs/{SCRIPT}/DATE-TIME)")
    either = group.add_mutually_exclusive_group()
    either.add_argument("--resume", metavar="RUN", help="go on from a run's last checkpoint")
    either.add_argument("--sample", metavar="RUN", help="draw from a run's generator, no training")
    group.add_argument("-n", type=number(int, 1, 1_000_000), default=64,
                       help="how many to draw with --sample; the grid shows at most 1,024")
    group.add_argument("--fid", metavar="CLASSIFIER", help=(
        "score 10,000 samples each epoch, or with --sample; a checkpoint of train_classifier.py"))
    group.add_argument("--gif-every", type=some, default=1, help="epochs from frame to frame")
    group.add_argument("--checkpoint-every", type=some, default=1, help="epochs per checkpoint")
    group.add_argument("--tensorboard", action="store_true", help="show it while it goes on")
    group.add_argument("--html", action="store_true", help="write report.html, to play with")
    group.add_argument("--dry-run", action="store_true", help="one batch, to see if all works")
    return parser
# fmt: on


def main(argv=None):
    """Train, and look at what comes out.

    :param list[str] argv: the command line; None for sys.argv
    :return: what metrics.json holds
    :rtype: dict
    :raises UserError: for a mistake in the arguments or the data
    """
    parser = get_parser()
    args = parser.parse_args(argv)
    if args.sample:
        return sample(args, argv)
    state = load_checkpoint(args.resume, SCRIPT) if args.resume else None
    if state:
        args = resume_args(parser, argv, state["args"], FREE)
    elif args.dry_run:
        args.epochs, args.batch_size, args.glyphs = 1, min(args.batch_size, 16), 64
        args.dataset = "glyphs" if args.dataset == "auto" else args.dataset

    device, world = set_up(args.cuda, args.seed), ranks()[1]
    say = print if is_first() else lambda *_, **__: None
    data = load_data(args)
    args.dataset = data.name  # "auto" is decided once: a resumed run must find the same data
    images, channels = data.images.to(device), data.images.shape[1]
    if len(images) < args.batch_size * world:
        raise UserError(f"{len(images)} images don't fill one batch: lower --batch-size")

    generator = Generator(args.z_dim, channels, args.width, args.linear_bn)
    discriminator = Discriminator(channels, args.width, args.linear_bn)
    for network in (generator, discriminator):
        # Channels last: the layout in which convolutions and BatchNorm are fastest.
        network.apply(init_weights).to(device, memory_format=torch.channels_last)
    init_output(generator, images)
    ema = copy.deepcopy(generator)
    judge = args.fid and make_judge(args.fid, data, load_data(args, False), device,
                                    args.dry_run, state and state.get("floor"))  # fmt: skip
    ceiling = judge and score(ema, judge, args)  # of the untrained generator
    folder = open_run(SCRIPT, args.out, args.resume, args.tensorboard)
    g_optimizer, d_optimizer = make_optimizer(generator, args), make_optimizer(discriminator, args)
    parts = {"generator": generator, "discriminator": discriminator, "ema": ema,
             "g_optimizer": g_optimizer, "d_optimizer": d_optimizer}  # fmt: skip
    epoch, history, progress, started = 1, [], dict(START), time.time()
    if state:
        if state["shape"] != list(images.shape):
            raise UserError(f"{args.data_dir} isn't the data of this run: give another --data-dir")
        restore(parts, state)
        epoch, history, progress = state["epoch"], state["history"], state["progress"]
        started -= state["seconds"]
        if epoch > args.epochs + 1:
            raise UserError(f"{args.resume} has {epoch - 1} epochs: ask for more --epochs")
        if progress["done"] and state["world"] != world:
            say(f"another number of processes: epoch {epoch} begins anew")
            progress = dict(START)
    networks = [torch.compile(n) if args.compile else n for n in (generator, discriminator)]
    fixed_z = draw_z(64, args.z_dim, args.latent, make_rng("cpu", args.seed)).to(device)

    def look(epoch):
        if is_first():
            picture = test(ema, fixed_z, args.latent, epoch)
            save_png(folder / f"samples/epoch_{epoch:03d}.png", picture)

    def save():
        if is_first():
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"script": SCRIPT, "args": vars(args), "shape": list(images.shape)}
            state |= {"epoch": epoch, "history": history, "progress": progress, "world": world}
            state |= {"seconds": time.time() - started, "floor": judge and judge.floor["fid"]}
            write_csv(folder / "metrics.csv", history)
            save_checkpoint(folder / "checkpoint.pt", state)

    with watching_signals() as stop:
        if not state:
            save()  # from here on a run that is killed can be resumed
        if epoch == 1 and not progress["done"]:
            look(0)
        while epoch <= args.epochs and not stop():
            before, began = progress["done"], time.time()
            train(*networks, ema, g_optimizer, d_optimizer, images, args, stop, progress, epoch)
            steps = progress["done"]
            row = {k: total / steps for k, total in zip(COLUMNS, progress["totals"], strict=True)}
            if not np.isfinite(list(row.values())).all():
                raise UserError(f"no finite loss in epoch {epoch}: start again, smaller --lr")
            if not progress["whole"]:
                break  # a signal came
            speed = (steps - before) * args.batch_size * world / (time.time() - began)
            look(epoch)
            found = score(ema, judge, args) if judge else {}
            scores = {name: value for name, value in found.items() if name in SCORES}
            history.append({"epoch": epoch, **row, "images_per_second": round(speed, 1), **scores})
            say(f"epoch {epoch:3d}   D loss {row['d_loss']:.3f}   G loss {row['g_loss']:.3f}   "
                f"D(x) {row['d_real']:.2f}   D(G(z)) {row['d_fake']:.2f}   {speed:,.0f} images/s"
                + (f"   FID {found['fid']:.3f}" if found else ""), flush=True)  # fmt: skip
            if row["d_real"] > 0.9 and row["d_fake"] < 0.1:
                say("warning: the discriminator has won: smaller --lr, more data?", file=sys.stderr)
            epoch, progress = epoch + 1, dict(START)
            if epoch > args.epochs or (epoch - 1) % args.checkpoint_every == 0:
                save()
        if stop.signum:
            save()
            raise Interrupted(f"stopped in epoch {epoch} and saved; go on with: python {SCRIPT}.py "
                              f"--resume {folder}", stop.signum)  # fmt: skip
    if not is_first():
        return {}
    save_png(folder / "data.png", to_grid(images[:: len(images) // 64 or 1][:64] / 255, columns=8))
    levels = judge and {"fid": judge.floor["fid"]}
    plot_curves(folder / "losses.png", history, PLOTS, levels)
    shown = sorted({*range(0, epoch, args.gif_every), epoch - 1})
    save_gif(folder / "epochs.gif", [folder / f"samples/epoch_{e:03d}.png" for e in shown])
    if args.html:
        walks = torch.cat([*draw(ema, make_walks(fixed_z[:16], args.latent))])
        gan_page(folder, SCRIPT, args, get_parser(), history, PLOTS, levels, walks)
    fid = judge and judge.report(score(ema, judge, args), ceiling)
    return finish(folder, SCRIPT, args, argv, data.name, device, started, epochs=history, fid=fid)


if __name__ == "__main__":
    sys.exit(exit_code(main))
