"""What the tests of several files compare, call and write."""

import json
import os
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import train_classifier
from common.errors import UserError
from common.run import load_checkpoint, save_checkpoint

# Pipes, devices, links without privileges, users and locks as Linux and macOS have them.
POSIX = pytest.mark.skipif(os.name != "posix", reason="Windows has no such files, users or locks")


def assert_same(a, b):
    """Compare two trees of plain values and tensors bit for bit, and the types of all in them."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            assert_same(left, right)
    elif torch.is_tensor(a):
        assert a.dtype == b.dtype  # which torch.equal doesn't compare
        assert torch.equal(a, b)
    else:
        assert a == b


def same(a, b):
    """Compare two trees of plain values and tensors bit for bit."""
    try:
        assert_same(a, b)
    except AssertionError:
        return False
    return True


def refusal(function, *arguments, **options):
    """Call what must refuse to go on, for a reason that the user can mend."""
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def read_metrics(folder, metrics):
    """Read metrics.json, and hold it against what main returned.

    :param pathlib.Path folder: of the run
    :param dict metrics: what main returned
    :return: what the file holds
    :rtype: dict
    """
    saved = json.loads((folder / "metrics.json").read_text())
    assert saved == json.loads(json.dumps(metrics))
    assert {"script", "command", "args", "dataset", "device", "versions", "seconds"} <= set(saved)
    return saved


def learnt(folder, script, leave_out=()):
    """Read all that a training has learnt: its checkpoint without what is about time.

    :param pathlib.Path folder: of the run
    :param str script: name of the script
    :param tuple leave_out: columns of the history that don't matter either
    :rtype: dict
    """
    state = dict(load_checkpoint(folder, script))
    leave_out = {"images_per_second", *leave_out}
    state["history"] = [
        {name: value for name, value in row.items() if name not in leave_out}
        for row in state["history"]
    ]
    return {key: value for key, value in state.items() if key not in ("args", "seconds", "floor")}


def save_classifier(folder, classes, shape, width=0.1, seed=0):
    """Write the checkpoint of a run of train_classifier.py whose weights are random.

    :param pathlib.Path folder: of the run
    :param list[str] classes: their names
    :param list[int] shape: of an image: channels, height, width
    :return: the network, in eval mode
    :rtype: torch.nn.Module
    """
    torch.manual_seed(seed)
    network = train_classifier.make_network(shape[0], len(classes), width).eval()
    with torch.no_grad():
        network[-1].weight *= 10  # so that the classes' probabilities differ
    state = {
        "script": "train_classifier",
        "args": {"width": width},
        "shape": shape,
        "classes": list(classes),
        "mean": [0.5] * shape[0],
        "std": [0.25] * shape[0],
        "network": network.state_dict(),
    }
    save_checkpoint(folder / "checkpoint.pt", state)
    return network


def make_training_network():
    """Build a network as it is amid its training, for images of 3 x 16 x 16 pixels, 5 classes.

    In train mode with BatchNorm and dropout, but for one layer; frozen in part; with gradients and
    a hook of its owner's.
    """
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5),
        nn.Conv2d(6, 6, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(294, 5),
    )  # fmt: skip
    network(torch.rand(4, 3, 16, 16)).sum().backward()
    network[0].bias.requires_grad_(False)
    network[4].eval()
    network[2].register_forward_hook(lambda *_: None)
    return network


@contextmanager
def left_alone(network):
    """Hold a network against what it was before a block: weights, gradients, modes, hooks."""
    before = inspect(network)
    yield
    assert_same(inspect(network), before)


def inspect(network):
    """Copy all that a function might leave behind in a network."""
    weights = [value.clone() for value in network.state_dict().values()]
    gradients = [p.grad if p.grad is None else p.grad.clone() for p in network.parameters()]
    frozen = [p.requires_grad for p in network.parameters()]
    modes = [module.training for module in network.modules()]
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
        for m in network.modules()
    ]
    return weights, gradients, frozen, modes, hooks


def with_buffers(step, device, optimizers):
    """Call a step as a CUDA graph replays it: its arguments lie where those of the first call did.

    In place of :func:`common.fast.captured_step`; what else a step reads must not move either.
    """
    buffers = []

    def replay(*tensors):
        if not buffers:
            buffers.extend(tensor.clone() for tensor in tensors)
        for buffer, tensor in zip(buffers, tensors, strict=True):
            buffer.copy_(tensor)
        step(*buffers)

    return replay


def halves(folder):
    """List what a process was writing when it ended, and should have been removed."""
    return [f"{file} is left" for file in folder.rglob("*.part*")]


def find_unreadable(folder, script):
    """List what is wrong with the checkpoints in a folder: they are whole, or not there."""
    lines = []
    for file in folder.rglob("[!.]*.pt"):
        try:
            load_checkpoint(file, script.SCRIPT)
        except UserError as error:
            lines.append(str(error))
    return lines


def write_photos(folder, count, rng):
    """Write pictures of noise, and in their midst a file that is none."""
    folder.mkdir()
    for i in range(count):
        noise = np.frombuffer(rng.randbytes(16 * 16 * 3), np.uint8).reshape(16, 16, 3)
        Image.fromarray(noise).save(folder / f"{i:03d}.png")
    (folder / f"{count // 2:03d}.png").write_bytes(b"no picture")


def find_hole(page, template):
    """Say what is wrong with a page, or None: it is a template around its data, JSON."""
    text = page.read_text(encoding="utf-8")
    before, after = template.read_text(encoding="utf-8").split("{{data}}")
    data = text.removeprefix(before).removesuffix(after)
    if len(before) + len(data) + len(after) != len(text) or set("<>&") & set(data):
        return "its data end their element"
    json.loads(data)
    return None
