"""Images per second of train_dcgan.py beside the loop that people copy, on the same two networks.

    python benchmarks/dcgan_speed.py --data-dir data --dataset mnist

(A) the copied loop: a DataLoader with two workers over torchvision's dataset of PIL pictures,
nn.Linear, channels first, Adam as it comes, three .item() a step, and D's gradients computed once
more in the generator step. (B) ours: train_step() and update_ema() of train_dcgan.py, on batches
that are slices of one tensor.

Both train in turn, round after round in one process, so that a machine that slows down slows down
both. The ratio is taken within each round; its median is what counts. Our memory settings
(keep_memory in common/fast.py) hold for the whole process, so (A) gains from them as well;
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
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common.device
import train_dcgan
from common.data import load_dataset, open_with_torchvision
from common.device import make_rng
from common.fast import FastLinear, captured_step

CHANGES = ("no CUDA graph", "nn.Linear", "channels first", "unfused Adam", "D not frozen for G",
           "biases before BatchNorm", "no EMA", "bfloat16")  # fmt: skip


class RandomPictures(Dataset):
    """Read pictures as torchvision's MNIST does: from a tensor, by way of Pillow.

    :param torch.Tensor images: uint8, (N, 1, 28, 28)
    """

    def __init__(self, images):
        self.data = images.squeeze(1)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.data[i].numpy())), 0


def make_networks(args, device):
    """Build G and D as train_dcgan.py does, always with the same weights."""
    torch.manual_seed(0)
    generator, discriminator = train_dcgan.make_networks(args, 1, 10)
    return generator.to(device), discriminator.to(device)


def use_plain_linear(networks):
    """Let linear layers multiply as nn.Linear does."""
    for network in networks:
        for module in network.modules():
            if isinstance(module, FastLinear):
                module.__class__ = nn.Linear


def add_biases(networks):
    """Give the layers before a BatchNorm the biases that it subtracts again."""
    for network in networks:
        for module in network.modules():
            if getattr(module, "bias", 0) is None:
                n = module.weight.shape[1 if isinstance(module, nn.ConvTranspose2d) else 0]
                module.bias = nn.Parameter(torch.zeros(n, device=module.weight.device))


def copied_loop(pictures, args, device):
    """Build the loop that people copy.

    :return: a function that trains n batches and returns the seconds that they took
    :rtype: Callable[[int], float]
    """
    batch = args.batch_size
    generator, discriminator = make_networks(args, device)
    use_plain_linear([generator, discriminator])
    generator.to(memory_format=torch.contiguous_format)
    discriminator.to(memory_format=torch.contiguous_format)
    g_optimizer = torch.optim.Adam(generator.parameters(), lr=2e-4, betas=(0.5, 0.999))
    d_optimizer = torch.optim.Adam(discriminator.parameters(), lr=2e-4, betas=(0.5, 0.999))
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


def our_loop(images, args, device, change=None):
    """Build the loop of train() in train_dcgan.py, of any number of batches.

    :param str change: one of CHANGES, for what to add or to take back; None for ours as it is
    :return: as for :func:`copied_loop`
    :rtype: Callable[[int], float]
    """
    generator, discriminator = networks = make_networks(args, device)
    if change == "nn.Linear":
        use_plain_linear(networks)
    if change == "biases before BatchNorm":
        add_biases(networks)
    amp = change == "bfloat16"
    if change == "channels first" or (device.type == "cuda" and not amp):
        for network in networks:
            network.to(memory_format=torch.contiguous_format)
    if change == "D not frozen for G":
        discriminator.requires_grad_ = lambda _: discriminator
    optimizers = train_dcgan.make_optimizers(networks, args)
    if change == "unfused Adam":
        for optimizer in optimizers:
            optimizer.param_groups[0]["fused"] = False
    ema = copy.deepcopy(generator)
    images = images.to(device)
    labels = torch.zeros(args.batch_size, dtype=torch.int64, device=device)  # which nothing reads
    rng = make_rng(device, 0)
    share = torch.tensor(1 - args.ema, device=device)
    totals = torch.zeros(4, device=device)

    def step(chosen, z):
        real = images[chosen].float().div_(255)
        totals.add_(
            train_dcgan.train_step(generator, discriminator, optimizers, real, labels, z, amp)
        )
        if change != "no EMA":
            train_dcgan.update_ema(ema, generator, share)

    if change != "no CUDA graph":
        step = captured_step(step, device, optimizers)

    def run(n):
        started = time.perf_counter()
        order = torch.randperm(len(images)).to(device)
        for chosen in order.split(args.batch_size)[:n]:
            step(chosen, train_dcgan.draw_z(args.batch_size, args, rng))
        totals.tolist()  # waits for the GPU
        return time.perf_counter() - started

    return run


def get_parser():
    """Build the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    datasets = ("mnist", "fashion", "emnist", "random")
    parser.add_argument("--dataset", default="mnist", choices=datasets,
                        help="what to train on; random pixels need no file")  # fmt: skip
    parser.add_argument("--data-dir", default="data", help="where it is")
    parser.add_argument("--batch-size", type=int, default=128, help="images per step")
    parser.add_argument("--batches", type=int, default=20, help="steps per loop and round")
    parser.add_argument("--rounds", type=int, default=9, help="how often both loops take turns")
    parser.add_argument("--cuda", action="store_true", help="on the GPU")
    parser.add_argument("--changes", nargs="*", choices=CHANGES, metavar="CHANGE",
                        help=f"time ours with each of these too: {', '.join(CHANGES)}")  # fmt: skip
    parser.add_argument("--plain-memory", action="store_true", help="without keep_memory()")
    return parser


def report(seconds, count):
    """Print the table and the RESULT line.

    :param dict seconds: by loop, its time in each round
    :param int count: images in a round
    """
    print(
        f"\n{'loop':24s} {'images/s':>9s} {'(min - max)':>15s} {'ratio':>6s} {'(min - max)':>13s}"
    )
    result = {}
    for name, times in seconds.items():
        speeds = sorted(count / t for t in times)
        ratios = sorted(a / b for a, b in zip(seconds["copied"], times, strict=True))
        speed = statistics.median(speeds)
        ratio = statistics.median(ratios)
        print(f"{name:24s} {speed:9,.0f} "
              f"{f'({speeds[0]:,.0f} - {speeds[-1]:,.0f})':>15s} {ratio:6.2f} "
              f"{f'({ratios[0]:.2f} - {ratios[-1]:.2f})':>13s}")  # fmt: skip
        key = name.replace(" ", "_")
        result[f"images_per_second_{key}"] = round(speed, 1)
        if name != "copied":
            result[f"ratio_{key}"] = round(ratio, 3)
    print("RESULT", json.dumps(result))


def main():
    """Time both loops in turn, and print a table and a RESULT line."""
    options = get_parser().parse_args()
    if options.plain_memory:
        common.device.keep_memory = lambda: None
    device = common.device.set_up(options.cuda, seed=0)
    if options.dataset == "random":
        images = torch.randint(0, 256, (60_000, 1, 28, 28), dtype=torch.uint8)
        pictures = RandomPictures(images)
    else:
        images = load_dataset(options.dataset, options.data_dir, split="mnist").images
        pictures = open_with_torchvision(options.dataset, options.data_dir, "train", "mnist")
    pictures.transform = transforms.ToTensor()
    if options.batches > len(images) // options.batch_size - 1:
        sys.exit(f"error: {len(images)} images are too few: lower --batches")
    # The settings of train_dcgan.py: its defaults, but for the size of a batch.
    args = train_dcgan.get_parser().parse_args(["--batch-size", str(options.batch_size)])
    loops = {"copied": copied_loop(pictures, args, device)}
    loops["ours"] = our_loop(images, args, device)
    for change in options.changes or ():
        loops[change] = our_loop(images, args, device, change)
    for run in loops.values():
        run(3)  # warm up: memory, kernels
    seconds = {name: [] for name in loops}
    for _ in range(options.rounds):
        for name, run in loops.items():
            seconds[name].append(run(options.batches))
    report(seconds, options.batches * options.batch_size)


if __name__ == "__main__":
    main()
