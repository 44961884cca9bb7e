"""Images per second of train_dcgan.py beside the loop that people copy, on the same two networks.

    python benchmarks/dcgan_speed.py --data-dir data --dataset mnist

(A) the copied loop: a DataLoader with two workers over torchvision's dataset of PIL pictures,
nn.Linear, channels first, Adam as it comes, three .item() a step, and D's gradients computed once
more in the generator step. (B) ours: train() of train_dcgan.py as it is.

Both train in turn, round after round in one process, so that a machine that slows down slows down
both. The ratio is taken within each round; its median is what counts. Our memory settings
(common/device.py, keep_memory) hold for the whole process, so (A) gains from them as well;
--plain-memory leaves them out for both.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common.device
import train_dcgan
from common.data import load_dataset, open_with_torchvision
from common.errors import HelpFormatter
from common.layers import Linear

CHANGES = ("nn.Linear", "channels first", "unfused Adam", "D not frozen for G",
           "biases before BatchNorm", "no EMA", "torch.compile", "bfloat16")  # fmt: skip


def make_networks(device, memory_format):
    """Build G and D as train_dcgan.py does."""
    torch.manual_seed(0)
    networks = train_dcgan.Generator(), train_dcgan.Discriminator()
    return [n.apply(train_dcgan.init_weights).to(device, memory_format=memory_format)
            for n in networks]  # fmt: skip


def copied_loop(pictures, batch, device):
    """Build the loop that people copy.

    :return: a function that trains n batches and returns the seconds that they took
    :rtype: Callable[[int], float]
    """
    generator, discriminator = make_networks(device, torch.contiguous_format)
    for module in (*generator, *discriminator):
        if isinstance(module, Linear):
            module.__class__ = nn.Linear
    g_optimizer, d_optimizer = (
        torch.optim.Adam(network.parameters(), lr=2e-4, betas=(0.5, 0.999))
        for network in (generator, discriminator)
    )
    loader = DataLoader(
        pictures, batch, shuffle=True, num_workers=2, drop_last=True,
        pin_memory=device.type == "cuda",
    )  # fmt: skip
    criterion = nn.BCEWithLogitsLoss()

    def run(n):
        batches = iter(loader)
        next(batches)  # the workers have started
        started = time.perf_counter()
        for _, (real, _label) in zip(range(n), batches, strict=False):
            real = real.to(device)
            ones = torch.ones(batch, 1, device=device)

            discriminator.zero_grad()
            real_loss = criterion(discriminator(real), ones)
            real_loss.backward()
            fake = generator(torch.randn(batch, 100, device=device))
            fake_loss = criterion(discriminator(fake.detach()), torch.zeros_like(ones))
            fake_loss.backward()
            d_optimizer.step()

            generator.zero_grad()
            g_loss = criterion(discriminator(fake), ones)
            g_loss.backward()
            g_optimizer.step()
            real_loss.item(), fake_loss.item(), g_loss.item()
        seconds = time.perf_counter() - started
        del batches  # its workers must not go on loading while the other loop is timed
        return seconds

    return run


def our_loop(images, batch, device, change=None):
    """Wrap train() of train_dcgan.py in the same way.

    :param str change: one of CHANGES, for what to add or to take back; None for ours as it is
    """
    layout = torch.contiguous_format if change == "channels first" else torch.channels_last
    generator, discriminator = networks = make_networks(device, layout)
    args = train_dcgan.get_parser().parse_args([])
    vars(args).update(batch_size=batch, amp=change == "bfloat16")
    for module in (m for network in networks for m in network.modules()):
        if change == "nn.Linear" and isinstance(module, Linear):
            module.__class__ = nn.Linear
        if change == "biases before BatchNorm" and getattr(module, "bias", 0) is None:
            n = module.weight.shape[isinstance(module, nn.ConvTranspose2d)]
            module.bias = nn.Parameter(torch.zeros(n, device=device))
    if change == "D not frozen for G":
        discriminator.requires_grad_ = lambda _: discriminator
    ema = copy.deepcopy(generator)
    optimizers = [train_dcgan.make_optimizer(n, args) for n in networks]
    if change == "unfused Adam":
        for optimizer in optimizers:
            optimizer.param_groups[0]["fused"] = False
    if change == "torch.compile":
        networks = [torch.compile(n) for n in networks]
    images, update_ema = images.to(device), train_dcgan.update_ema

    def run(n):
        progress = {"done": 0, "totals": [0.0] * 4}
        train_dcgan.update_ema = (lambda *_: None) if change == "no EMA" else update_ema
        started = time.perf_counter()
        train_dcgan.train(*networks, ema, *optimizers, images, args,
                          lambda: progress["done"] == n, progress, 1)  # fmt: skip
        return time.perf_counter() - started

    return run


def get_parser():
    """Build the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    datasets = ("mnist", "fashion", "emnist")
    parser.add_argument("--dataset", default="mnist", choices=datasets, help="what to train on")
    parser.add_argument("--data-dir", default="data", help="where it is")
    parser.add_argument("--batch-size", type=int, default=128, help="images per step")
    parser.add_argument("--batches", type=int, default=20, help="steps per loop and round")
    parser.add_argument("--rounds", type=int, default=9, help="how often both loops take turns")
    parser.add_argument("--cuda", action="store_true", help="on the GPU")
    parser.add_argument("--changes", nargs="*", choices=CHANGES, metavar="CHANGE",
                        help=f"time ours with each of these too: {', '.join(CHANGES)}")  # fmt: skip
    parser.add_argument("--plain-memory", action="store_true", help="without keep_memory()")
    return parser


def main():
    """Time both loops in turn, and print a table and a RESULT line."""
    args = get_parser().parse_args()
    if args.plain_memory:
        common.device.keep_memory = lambda: None
    device = common.device.set_up(args.cuda, seed=0)
    images = load_dataset(args.dataset, args.data_dir, split="mnist").images
    pictures = open_with_torchvision(args.dataset, args.data_dir, "train", "mnist")
    pictures.transform = transforms.ToTensor()
    loops = {"copied": copied_loop(pictures, args.batch_size, device)}
    loops["ours"] = our_loop(images, args.batch_size, device)
    for change in args.changes or ():
        loops[change] = our_loop(images, args.batch_size, device, change)
    for run in loops.values():
        run(3)  # warm up: memory, kernels, compilation
    seconds = {name: [] for name in loops}
    for _ in range(args.rounds):
        for name, run in loops.items():
            seconds[name].append(run(args.batches))

    print(
        f"\n{'loop':24s} {'images/s':>9s} {'(min - max)':>15s} {'ratio':>6s} {'(min - max)':>13s}"
    )
    count, result = args.batches * args.batch_size, {}
    for name, times in seconds.items():
        speeds = sorted(count / t for t in times)
        ratios = sorted(a / b for a, b in zip(seconds["copied"], times, strict=True))
        ratio = statistics.median(ratios)
        print(f"{name:24s} {statistics.median(speeds):9,.0f} "
              f"{f'({speeds[0]:,.0f} - {speeds[-1]:,.0f})':>15s} {ratio:6.2f} "
              f"{f'({ratios[0]:.2f} - {ratios[-1]:.2f})':>13s}")  # fmt: skip
        key = name.replace(" ", "_")
        result |= {f"images_per_second_{key}": round(statistics.median(speeds), 1)}
        result |= {f"ratio_{key}": round(ratio, 3)}
    result.pop("ratio_copied")
    print("RESULT", json.dumps(result))


if __name__ == "__main__":
    main()
