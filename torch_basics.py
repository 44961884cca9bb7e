"""From tensors to nn.Module: a tour that runs, and one net trained three ways.

The network is x W1 -> relu -> W2, its loss L the summed squared error.
Forwards, with shapes:

    h = x W1                  (100, 1000) = (100, 100) (100, 1000)
    a = max(h, 0)             (100, 1000)
    p = a W2                  (100, 10)   = (100, 1000) (1000, 10)
    L = sum((p - y)^2)        a number

Backwards, from L to the weights. A small change dp changes L by sum(dL/dp *
dp). Put in dp = a dW2, then dp = da W2, and so on: a gradient has the shape of
what it belongs to, and the shapes alone decide which factor is transposed and
on which side it stands.

    dL/dp  = 2 (p - y)        (100, 10)
    dL/dW2 = a^T dL/dp        (1000, 10)  = (1000, 100) (100, 10)
    dL/da  = dL/dp W2^T       (100, 1000) = (100, 10) (10, 1000)
    dL/dh  = dL/da * [h > 0]  (100, 1000), as relu passes back what it let pass
    dL/dW1 = x^T dL/dh        (100, 1000) = (100, 100) (100, 1000)

    python torch_basics.py

Three ways to train it are checked against each other; then loss_transition.png
shows how much of a better descent is the initialisation and how much the
momentum. 20 seconds on one CPU core.

Differences from the post: no biases, so that all three ways train the same
network; float64, since float32 would round away the lower half of the figure.
"""

import argparse
import math
import sys
import textwrap
import time
import warnings
from functools import partial
from pathlib import Path

import common  # isort: skip # noqa: F401 (Ctrl-C while torch is imported: one line)

import numpy as np
import torch
from torch import nn
from torch.func import grad_and_value, vmap

from common.device import describe_device, make_rng, set_up
from common.errors import UserError, exit_code, number, positive_int, seed_int
from common.images import save_figure
from common.run import open_run, write_csv, write_metrics

SCRIPT = Path(__file__).stem
SHAPES = {"x": (100, 100), "y": (100, 10), "W1": (100, 1000), "W2": (1000, 10)}
HALVE_EVERY = 200  # epochs
ROUNDS, STEPS = 5, 20  # of the timing


# ------------------------------------------------------------------------------------ 1: the tour
# Every line is run as it stands, and what today's torch answers is printed beside it.
TOUR = """
## Tensors have a class, a shape, a dtype and a device
x = torch.arange(6.0)
type(x), x.shape, x.dtype
torch.zeros(2, dtype=torch.int64, device=device)
# -1 is worked out from the rest; None makes a new dimension of length 1.
x.reshape(2, -1).shape, x[None, :].shape
x.reshape(2, 3).reshape(-1)
## Products and broadcasting
a, b = torch.ones(2, 3), torch.ones(3, 4)
torch.mm(a, b).shape, (a @ b).shape
torch.mm(a, a)
# mm wants two matrices; @ takes vectors and stacks of matrices, too.
torch.mm(a, torch.ones(3))
a @ torch.ones(3), (torch.ones(5, 2, 3) @ b).shape
# Broadcasting: a dimension of length 1, or none, is stretched to fit.
(torch.ones(3, 1) + torch.ones(4)).shape
## Backwards
torch.arange(4)[::-1]
torch.arange(4).flip(0)
# NumPy turns an array round without copying: it walks the same memory with a negative stride.
# A tensor can't have one, so it needs a copy, whose memory is laid out anew.
n = np.arange(4)[::-1]
n.strides, n.copy().strides
torch.from_numpy(n)
torch.from_numpy(n.copy())
## Who shares memory with whom
n = np.zeros(4); t = torch.from_numpy(n)
# A method whose name ends in _ works in place; without the _ it makes a new tensor.
t.add_(1); t.add(10)
n
# A reshape is a view where that is possible; torch.tensor always copies.
t.reshape(2, 2)[0, 0] = 7; torch.tensor(n)[1] = 9
n
## Gradients
w = torch.ones(2, requires_grad=True)
(3 * w).sum().backward(); (3 * w).sum().backward()
# The derivative is 3, but two backward passes add up, until someone zeroes the gradient.
w.grad.clone(), w.grad.zero_()
# Updates belong under no_grad, or autograd would have to differentiate them, too.
w.sub_(1)
with torch.no_grad(): w.sub_(1)
# e^w has the gradient e^0 = 1. Overwritten through .data it gets another, without a word;
# detach() shares the memory, too, but lets autograd notice.
e = w.exp(); e.data.zero_(); e.sum().backward()
w, w.grad
e = w.exp(); e.detach().zero_()
e.sum().backward()
## What changed with torch 0.4, and since
type(Variable(x))               # 0.4: just x
Variable(x, volatile=True)      # 0.4: torch.no_grad()
x.sum().data[0]                 # 0.4: x.sum().item()
nn.MSELoss(size_average=False)  # 0.4.1: reduction="sum"
(x > 0).dtype                   # 1.2: was torch.uint8
torch.tensor([1, 2]) / 2        # 1.7: an error in 1.6, [0, 1] before
l = nn.Linear(1, 1); l(torch.ones(1)).backward(); l.zero_grad()
l.weight.grad is None           # 2.0: was zeros
"""


def tour(device):
    """Run the tour, and yield each line with its value, error or warning as text."""
    names = {"torch": torch, "np": np, "nn": nn, "Variable": torch.autograd.Variable}
    names["device"] = device
    for line in TOUR.strip().splitlines():
        try:
            code = compile(line, "tour", "eval")
        except SyntaxError:  # a statement, or a remark
            code = compile(line, "tour", "exec")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            try:
                value = eval(code, names)
            except Exception as error:  # whichever it is: errors are what we came to see
                value = error
        value = caught[0].message if caught else value
        text = f"{type(value).__name__}: {value}" if isinstance(value, Exception) else repr(value)
        yield line, "" if value is None else " ".join(text.split())


# ------------------------------------------------------------------ 2: one network, three ways


def draw(seed, device):
    """Draw x, y and two starts [W1, W2], from N(0, 1) and as nn.Linear, U(-1, 1) / sqrt(fan_in)."""
    make = {"generator": make_rng("cpu", seed), "dtype": torch.float64}  # the same on every device
    x, y, *randn = (torch.randn(shape, **make).to(device) for shape in SHAPES.values())
    uniform = [(torch.rand(w.shape, **make) * 2 - 1).to(w) / math.sqrt(len(w)) for w in randn]
    return x, y, {"randn": randn, "uniform": uniform}


def squared_error(x, y, w1, w2):
    """Compute L; x and y may also be one sample, (100,) and (10,)."""
    return ((x @ w1).relu() @ w2 - y).square().sum()


def by_hand(x, y, w1, w2):
    """(1) By hand: compute L, dL/dW1 and dL/dW2 by the formulas at the top, line by line."""
    h = x @ w1
    a = h.relu()
    p = a @ w2
    dp = 2 * (p - y)
    dw2 = a.T @ dp
    da = dp @ w2.T
    dh = da * (h > 0)
    dw1 = x.T @ dh
    return (p - y).square().sum(), dw1, dw2


def descend(gradients, x, y, weights, lr, epochs):
    """Train by plain gradient descent, whoever computes the gradients.

    :param Callable gradients: like :func:`by_hand`
    :param torch.Tensor x: (100, 100), and y, (100, 10)
    :param list weights: W1 and W2 to start from; they stay as they are
    :param float lr: learning rate, halved every 200 epochs
    :param int epochs: steps, each on all the data
    :return: L before each step, (epochs,); on the device, since reading L would mean waiting for it
    :rtype: torch.Tensor
    """
    w1, w2 = (w.clone() for w in weights)
    losses = []
    for epoch in range(epochs):
        loss, dw1, dw2 = gradients(x, y, w1, w2)
        step = lr * 0.5 ** (epoch // HALVE_EVERY)
        w1 -= step * dw1
        w2 -= step * dw2
        losses.append(loss)
    return torch.stack(losses)


def descend_with_autograd(x, y, weights, lr, epochs):
    """(2) autograd: PyTorch notes every operation, and ``backward`` walks back along its notes."""
    w1, w2 = (w.clone().requires_grad_() for w in weights)
    losses = []
    for epoch in range(epochs):
        loss = squared_error(x, y, w1, w2)
        loss.backward()
        step = lr * 0.5 ** (epoch // HALVE_EVERY)
        with torch.no_grad():
            for w in (w1, w2):
                w -= step * w.grad
                w.grad.zero_()  # or the next backward adds to it
        losses.append(loss.detach())
    return torch.stack(losses)


class SimpleNNModel(nn.Module):
    """(3) nn.Module and optim: the network, (N, 100) -> (N, 10), knows its weights."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(*SHAPES["W1"], bias=False)
        self.second = nn.Linear(*SHAPES["W2"], bias=False)

    def forward(self, x):
        """Compute p."""
        return self.second(self.first(x).relu())


def descend_with_optim(x, y, weights, lr, epochs, **options):
    """(3) nn.Module and optim: SGD knows how to change them, and its options make it do more."""
    model, criterion = SimpleNNModel().to(x), nn.MSELoss(reduction="sum")
    with torch.no_grad():
        for layer, w in zip(model.children(), weights, strict=True):
            layer.weight.copy_(w.T)  # nn.Linear multiplies by its weight's transpose
    optimizer = torch.optim.SGD(model.parameters(), lr, **options)
    halving = torch.optim.lr_scheduler.StepLR(optimizer, HALVE_EVERY, gamma=0.5)
    losses = []
    for _ in range(epochs):
        loss = criterion(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        halving.step()
        losses.append(loss.detach())
    return torch.stack(losses)


# ------------------------------------------------------ 3: the initialisation or the momentum?


def curvature(x, weights):
    """Compute the largest second derivative of L in any direction of W2: 2 |a|^2, spectral norm.

    A step multiplies the way to the valley's floor there by 1 - lr * curvature, so lr * curvature,
    unlike lr, means the same at every start; beyond 2, each step leads further away.
    """
    return 2 * torch.linalg.matrix_norm((x @ weights[0]).relu(), 2).item() ** 2


def train_all(x, y, starts, lr, epochs):
    """Train in three ways from randn, then with the other optimizer, start and learning rate.

    :param dict starts: W1 and W2 by name
    :return: the losses by name; "fitted" has the lr that makes lr * curvature the same as for randn
    :rtype: dict[str, list[float]]
    :raises UserError: if a loss grows instead of falling
    """
    bend = {name: curvature(x, weights) for name, weights in starts.items()}
    fitted = lr * bend["randn"] / bend["uniform"]
    curves = {}
    nesterov = partial(descend_with_optim, momentum=0.9, nesterov=True)
    plans = {
        "randn_by_hand": (partial(descend, by_hand), lr),
        "randn_autograd": (descend_with_autograd, lr),
        "randn_plain": (descend_with_optim, lr),
        "randn_nesterov": (nesterov, lr),
        "uniform_plain": (descend_with_optim, lr),
        "uniform_nesterov": (nesterov, lr),
        "uniform_plain_fitted": (descend_with_optim, fitted),
        "uniform_nesterov_fitted": (nesterov, fitted),
        "uniform_nesterov_weight_decay_fitted": (partial(nesterov, weight_decay=1e-4), fitted),
    }
    print(f"\n  {'':<36} {'lr':>8} {'lr x curvature':>15} {'first loss':>11} {'last loss':>10}")
    for name, (method, rate) in plans.items():
        start = name.split("_")[0]
        losses = method(x, y, starts[start], rate, epochs).tolist()
        for epoch, loss in enumerate(losses, 1):
            if not loss < 1000 * losses[0]:  # true of NaN, too
                raise UserError(f"{name} diverges, its loss is {loss:.1e} in epoch {epoch}: try a "
                                f"smaller --lr, {min(lr / 2, 1 / bend['randn']):.0e}")  # fmt: skip
        print(f"  {name:<36} {rate:8.1e} {rate * bend[start]:15.4f} {losses[0]:11.1e} "
              f"{losses[-1]:10.1e}", flush=True)  # fmt: skip
        curves[name] = losses
    return curves


def explain(curves):
    """Answer the post's question: by how many decades does each cause lower the last loss?"""
    names = ("randn_plain", "randn_nesterov", "uniform_plain_fitted", "uniform_nesterov_fitted")
    a, b, c, d, e = (math.log10(curves[name][-1]) for name in (*names, list(curves)[-1]))
    print("\n3. THE INITIALISATION OR THE MOMENTUM?\n"
          "  At one lr x curvature, all else equal, the uniform initialisation lowers the last\n"
          f"  loss by {a - c:.1f} decades with plain SGD, {b - d:.1f} with Nesterov; momentum\n"
          f"  lowers it by {a - b:.1f} from randn, {c - d:.1f} from uniform; weight decay, on\n"
          f"  top of both, raises it by {e - d:.1f}.", flush=True)  # fmt: skip
    return {"initialisation": [a - c, b - d], "momentum": [a - b, c - d], "weight_decay": d - e}


def plot(path, curves):
    """Draw the post's figure, and the two that take it apart."""
    randn, uniform = ["randn_plain", "randn_nesterov"], ["uniform_plain", "uniform_nesterov"]
    panels = {
        "The post's two, which differ in three things": ["randn_by_hand", list(curves)[-1]],
        "One learning rate for all": randn + uniform,
        "One learning rate × curvature for all": randn + [f"{name}_fitted" for name in uniform],
    }
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.5, 4.2), layout="constrained")
    figure.subplots(1, 3, sharey=True)
    for axes, (title, names) in zip(figure.axes, panels.items(), strict=True):
        for name in names:
            style = ("C0" if "randn" in name else "C1") + ("-" if "nesterov" in name else "--")
            label = name.removesuffix("_fitted").replace("_", " ").replace("nest", "Nest")
            axes.semilogy(range(1, len(curves[name]) + 1), curves[name], style, label=label)
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.axes[0].set_ylabel("loss: summed squared error")
    save_figure(path, figure, dpi=120)


# ------------------------------------------------------ 4: what the post couldn't do, and speed


def by_func(x, y, w1, w2):
    """Do what :func:`by_hand` does: torch.func turns a function into that of its gradients."""
    gradients, loss = grad_and_value(squared_error, argnums=(2, 3))(x, y, w1, w2)
    return loss, *gradients


def by_sample(x, y, w1, w2):
    """Do it for each sample alone, gradients (N, 100, 1000) and (N, 1000, 10), and add up."""
    return tuple(part.sum(0) for part in vmap(by_func, (0, 0, None, None))(x, y, w1, w2))


def time_steps(x, y, weights, lr, dry_run):
    """Time a step of each way to train, taking turns: the median milliseconds by name."""
    ways = {
        "by hand": partial(descend, by_hand),
        "autograd": descend_with_autograd,
        "nn.Module and optim": descend_with_optim,
        "torch.func.grad": partial(descend, by_func),
        "torch.func.grad, vmap per sample": partial(descend, by_sample),
    }
    if not dry_run:
        try:
            compiled = torch.compile(by_func)
            compiled(x, y, *weights)
            ways["torch.func.grad, torch.compile"] = partial(descend, compiled)
        except Exception as error:  # no C++ compiler, a Python that is too new, an old GPU, ...
            print(f"  no torch.compile: {type(error).__name__}: {error}".split("\n")[0][:200])
    # A GPU is still at work when Python goes on: without waiting, we'd time the asking.
    wait = torch.cuda.synchronize if x.is_cuda else lambda: None
    times = {name: [] for name in ways}
    for _ in range(2 if dry_run else ROUNDS + 1):  # the first one warms up
        for name, way in ways.items():
            wait()
            began = time.perf_counter()
            way(x, y, weights, lr, STEPS)
            wait()
            times[name].append((time.perf_counter() - began) / STEPS * 1000)
    return {name: float(np.median(values[1:])) for name, values in times.items()}


# ------------------------------------------------------------------------------------ the script


def check(what, found, expected, limit=1e-10):
    """Print and return the largest |found - expected| / |expected|; exit if it is too large."""
    gaps = [(f - e).norm() / e.norm() for f, e in zip(found, expected, strict=True)]
    gap = torch.stack(gaps).max().item()  # Python's max would pass over NaN
    print(f"  {what:<60} {gap:7.1e}, limit {limit:.0e}")
    if not gap <= limit:
        line = f"verification failed: {what}: {gap:.1e}, limit {limit:.0e}"
        raise UserError(line, code=1)
    return gap


# fmt: off
def get_parser():
    """Build the command line."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,  # so that an error is one line
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=positive_int, default=500,
                       help="steps, each on all data (default: %(default)s)")
    group.add_argument("--lr", type=number(float, 1e-30), default=3e-7,
                       help="learning rate, halved every 200 epochs (default: %(default)s)")
    group.add_argument("--seed", type=seed_int, default=0,
                       help="same seed, same machine, same losses (default: %(default)s)")
    group.add_argument("--cuda", action="store_true", help="use the GPU, if any, and time both")
    group.add_argument("--device", metavar="NAME", help="any other device that knows float64: xpu")

    group = parser.add_argument_group("output")
    group.add_argument("--out", help=f"new run folder (default: runs/{SCRIPT}/DATE-TIME)")
    group.add_argument("--dry-run", action="store_true", help="quick: 5 epochs, no torch.compile")
    return parser
# fmt: on


def main(argv=None):
    """Run the four parts, and verify what they teach.

    :param list[str] argv: the command line; None for sys.argv
    :return: what metrics.json holds
    :rtype: dict
    :raises UserError: for a mistake in the arguments, such as a learning rate that diverges
    """
    started = time.time()
    args = get_parser().parse_args(argv)
    if args.dry_run:
        args.epochs = min(args.epochs, 5)
    device = set_up(args.cuda, args.seed, args.device)
    folder = open_run(SCRIPT, args.out)

    print("\n1. TENSORS: what you type, and what torch answers")
    for line, found in tour(device):
        both = f"\n{line[3:]}" if line.startswith("##") else f"  {line:<57} {found}".rstrip()
        if len(both) > 99:
            both = f"  {line}\n" + textwrap.indent(textwrap.fill(found, 92), " " * 6)
        print(both)

    print("\n2. ONE NETWORK, THREE WAYS:", *(f" {name} {shape}" for name, shape in SHAPES.items()))
    for name, layer in SimpleNNModel().named_children():
        print(f"  SimpleNNModel.{name}: {layer}, weight {tuple(layer.weight.shape)}")
    x, y, starts = draw(args.seed, device)
    leaves = [w.clone().requires_grad_() for w in starts["randn"]]
    squared_error(x, y, *leaves).backward()
    hand, samples = by_hand(x, y, *starts["randn"]), by_sample(x, y, *starts["randn"])
    few = (x[:8, :6], y[:8, :4], leaves[0][:6, :5], leaves[1][:5, :4])
    passed = torch.autograd.gradcheck(squared_error, few, raise_exception=False)
    print("\n  relative difference of")
    gaps = {
        "autograd": check("gradients, by hand and by autograd", hand[1:], [w.grad for w in leaves]),
        "samples": check("gradients, by hand and summed over each sample's", samples, hand),
        "gradcheck": check("autograd and finite differences, 0 where gradcheck passes",
                           [torch.tensor(float(passed))], [torch.tensor(1.0)]),
    }  # fmt: skip
    curves = train_all(x, y, starts, args.lr, args.epochs)
    by_hand_losses, *others = (torch.tensor(v, dtype=x.dtype) for v in list(curves.values())[:3])
    ratios = (torch.stack(others) / by_hand_losses).flatten()
    gaps["losses"] = check("losses, by hand, by autograd and by plain SGD", ratios, ratios**0, 1e-8)

    effects = explain(curves)
    plot(folder / "loss_transition.png", curves)
    rows = [{"epoch": i + 1} | {k: v[i] for k, v in curves.items()} for i in range(args.epochs)]
    write_csv(folder / "metrics.csv", rows)

    print("\n4. MILLISECONDS PER STEP: float32, median")
    times = {}
    for place in dict.fromkeys((torch.device("cpu"), device)):
        x, y, *weights = (t.to(place, torch.float32) for t in (x, y, *starts["randn"]))
        times[describe_device(place)] = time_steps(x, y, weights, args.lr, args.dry_run)
        for way, milliseconds in times[describe_device(place)].items():
            print(f"  {way:<36} {milliseconds:10.3f}   {describe_device(place)}")
    print(f"look at  {folder}/loss_transition.png")
    return write_metrics(folder, args, argv, started, device, script=SCRIPT,
                         dataset=f"randn, seed {args.seed}", gaps=gaps, decades=effects,
                         milliseconds=times,
                         losses={name: [c[0], c[-1]] for name, c in curves.items()})  # fmt: skip


if __name__ == "__main__":
    sys.exit(exit_code(main))
