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
from common.layers import Linear


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
        started = time.perf_counter()  # after the workers have been started
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


def our_loop(images, batch, device, **changes):
    """Wrap train() of train_dcgan.py in the same way.

    :param bool changes: amp or compile
    """
    generator, discriminator = make_networks(device, torch.channels_last)
    ema = copy.deepcopy(generator)
    settings = {"batch_size": batch, **changes}
    args = train_dcgan.get_parser().parse_args([])
    vars(args).update(settings)
    optimizers = [train_dcgan.make_optimizer(n, args) for n in (generator, discriminator)]
    networks = [torch.compile(n) if args.compile else n for n in (generator, discriminator)]
    images = images.to(device)

    def run(n):
        progress = {"done": 0, "totals": [0.0] * 4}
        started = time.perf_counter()
        train_dcgan.train(*networks, ema, *optimizers, images[: n * batch], args, lambda: False,
                          progress, 1)  # fmt: skip
        return time.perf_counter() - started

    return run


def main():
    """Time both loops in turn, and print a table and a RESULT line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", default="mnist", choices=("mnist", "fashion", "emnist"))
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--batches", type=int, default=20, help="per loop and round")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--compile", action="store_true", help="time ours with --compile as well")
    parser.add_argument("--amp", action="store_true", help="time ours with --amp as well")
    parser.add_argument("--plain-memory", action="store_true", help="without keep_memory()")
    args = parser.parse_args()

    if args.plain_memory:
        common.device.keep_memory = lambda: None
    device = common.device.set_up(args.cuda, seed=0)
    images = load_dataset(args.dataset, args.data_dir, split="mnist").images
    pictures = open_with_torchvision(args.dataset, args.data_dir, "train", "mnist")
    pictures.transform = transforms.ToTensor()
    loops = {"copied": copied_loop(pictures, args.batch_size, device)}
    loops["ours"] = our_loop(images, args.batch_size, device)
    if args.compile:
        loops["ours --compile"] = our_loop(images, args.batch_size, device, compile=True)
    if args.amp:
        loops["ours --amp"] = our_loop(images, args.batch_size, device, amp=True)
    for run in loops.values():
        run(3)  # warm up: memory, kernels, compilation
    seconds = {name: [] for name in loops}
    for _ in range(args.rounds):
        for name, run in loops.items():
            seconds[name].append(run(args.batches))

    print(
        f"\n{'loop':16s} {'images/s':>9s} {'(min - max)':>15s} {'ratio':>6s} {'(min - max)':>13s}"
    )
    count, result = args.batches * args.batch_size, {}
    for name, times in seconds.items():
        speeds = sorted(count / t for t in times)
        ratios = sorted(a / b for a, b in zip(seconds["copied"], times, strict=True))
        ratio = statistics.median(ratios)
        print(f"{name:16s} {statistics.median(speeds):9,.0f} "
              f"{f'({speeds[0]:,.0f} - {speeds[-1]:,.0f})':>15s} {ratio:6.2f} "
              f"{f'({ratios[0]:.2f} - {ratios[-1]:.2f})':>13s}")  # fmt: skip
        key = name.replace(" --", "_")
        result |= {f"images_per_second_{key}": round(statistics.median(speeds), 1)}
        result |= {f"ratio_{key}": round(ratio, 3)}
    result.pop("ratio_copied")
    print("RESULT", json.dumps(result))


if __name__ == "__main__":
    main()
