"""Networks that users bring: weights of their own, and a look at what a network gives."""

import os
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import nn

from common.classifiers import load_timm, load_torchvision, prepare
from common.device import is_first
from common.errors import UserError, plain
from common.run import read_tensors, read_text

WRAPPERS = ("state_dict", "model_state_dict", "model", "network", "net")  # keys of training scripts
PREFIXES = ("module.", "_orig_mod.")  # of nn.DataParallel and torch.compile


@contextmanager
def eval_mode(network):
    """Put a network into eval mode for a block, whatever each of its modules was in before.

    In train mode BatchNorm would couple the images of a batch, and dropout make each call differ.

    :param torch.nn.Module network: in its own modes again after the block, also after an error
    """
    training = [module for module in network.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


# ----------------------------------------------------------------------------- weights of one's own


def load_weights(path, arch, classes=None, device="cpu"):
    """Load weights of one's own, a state dict, into an architecture of torchvision or timm.

    :param str path: the file, see :func:`read_state_dict`
    :param str arch: a classifier of torchvision.models, or "timm/NAME"; its preprocessing is taken
    :param str classes: names of the classes: a file with one a line, or a list with commas; None
        for numbers
    :param torch.device device: where to
    :return: ready to be explained, as from :func:`common.classifiers.load_classifier`
    :rtype: common.classifiers.Classifier
    :raises UserError: if the file holds no state dict, or another architecture's
    """
    values = read_state_dict(Path(path))
    count = len(list(values.values())[-1])  # a classifier's last parameter has an entry per class
    load = (
        partial(load_timm, arch[5:])
        if arch.startswith("timm/")
        else partial(load_torchvision, arch)
    )
    network, mean, std, names, size, transform = load(classes=count)
    wanted = network.state_dict()
    missing = [key for key in wanted if key not in values and not key.endswith("batches_tracked")]
    unexpected = [key for key in values if key not in wanted]
    other = [k for k in wanted if k in values and wanted[k].shape != values[k].shape]
    for keys, what in (
        (missing, "lacks"),
        (unexpected, "also holds"),
        (other, "has other sizes in"),
    ):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise UserError(
                f"{path} isn't a {arch}: it {what} {keys[0]}{more}; give another --arch"
            )
    network.load_state_dict(values, strict=False)
    if classes:
        names = read_names(classes)
    elif count != len(names):
        names = [str(i) for i in range(count)]
    return prepare(path, device, network, mean, std, names, size, transform)


def read_state_dict(path):
    """Read a state dict, executing nothing that the file may hold.

    :param pathlib.Path path: written by torch.save: a state dict, or a dict that has one under one
        of WRAPPERS; names may begin with one of PREFIXES
    :return: tensors by name
    :rtype: dict[str, torch.Tensor]
    :raises UserError: if it holds anything else
    """
    if not path.is_file():
        raise UserError(f"no weights at {path}: give a file that torch.save wrote")
    try:
        values = read_tensors(path)
    except Exception as error:  # whatever damage, or a whole module, sets off in torch
        save = "torch.save(network.state_dict(), 'my.pth')"
        raise UserError(f"{path} holds no plain weights ({type(error).__name__}): save them by "
                        f"{save}") from error  # fmt: skip
    for key in WRAPPERS:
        if isinstance(values, dict) and isinstance(values.get(key), dict):
            values = values[key]
            break
    for prefix in PREFIXES:
        if isinstance(values, dict) and all(str(key).startswith(prefix) for key in values):
            values = {key.removeprefix(prefix): value for key, value in values.items()}
    if not (isinstance(values, dict) and values and all(map(torch.is_tensor, values.values()))):
        raise UserError(f"{path} holds no state dict: save network.state_dict()")
    last = list(values.values())[-1]
    if not last.ndim or not last.numel():  # of no width, it may seem to have any number of classes
        raise UserError(f"{path} ends in a number, not in a layer of a classifier: give another")
    return values


def read_names(text):
    """Read names of classes: a file with one a line, or a list with commas."""
    if not os.path.isfile(text):
        return [plain(name.strip()) for name in text.split(",")]
    try:
        lines = read_text(Path(text)).splitlines()
        return [plain(line.strip()) for line in lines if line.strip()]
    except ValueError as error:
        raise UserError(
            f"{text} is no UTF-8 text: give a file with one class name a line"
        ) from error


# --------------------------------------------------------------------------- what a network gives


class LogProbabilities(nn.Module):
    """Turn probabilities, (N, K), into logits: softmax of their logarithms gives them back."""

    def forward(self, probabilities):
        """Take the logarithm; a probability of 0 becomes the smallest float."""
        return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()


@torch.no_grad()
def check_classifier(classifier):
    """Look once, before the first photo, at what a network gives, and say what is wrong with it.

    :param Classifier classifier: loaded, or put together by a user
    :return: the same; if the network gives probabilities, another one whose softmax gives those
    :rtype: Classifier
    :raises UserError: if these aren't logits, (N, K), of as many classes as there are names, 2 or
        more
    """
    network, size = classifier.network, classifier.size
    if classifier.channels not in (1, 3):
        raise UserError(f"the network wants {classifier.channels} channels: photos have 1 or 3")
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(2, classifier.channels, size, size, generator=rng).to(classifier.device)
    try:
        with eval_mode(network):
            y = network(x)
    except Exception as error:  # whatever other types and shapes set off in torch
        kinds = {str(p.dtype) for p in network.parameters()} - {"torch.float32"}
        if kinds:
            raise UserError(
                f"the network's weights are {kinds.pop()}: call its .float()"
            ) from error
        why = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise UserError(f"the network fails on images {tuple(x.shape)} ({why})") from error
    if not torch.is_tensor(y):
        raise UserError(describe_parts(y))
    count = len(classifier.classes)
    if y.ndim != 2 or len(y) != 2:
        raise UserError(
            f"the network gives {tuple(y.shape)} for 2 images: make it logits (2, {count})"
        )
    if y.shape[1] == 1:
        raise UserError(
            "the network gives one logit z: make it two classes, torch.cat([-z, z], 1) / 2"
        )
    if y.shape[1] != count:
        raise UserError(f"the network gives {y.shape[1]} logits, but there are {count} class names")
    if not y.is_floating_point() or not y.isfinite().all():
        raise UserError(
            f"the network gives {y.dtype}, not all of it finite numbers: mend its weights"
        )
    if y.dtype != torch.float32:
        raise UserError(f"the network gives {y.dtype}: call its .float()")
    if y.min() < 0 or y.max() > 1:
        return classifier
    if (y.sum(1) - 1).abs().max() < 1e-3:
        warn("the network gives probabilities: read as such, softmax isn't applied a second time")
        network = nn.Sequential(network, LogProbabilities()).eval()
        return classifier._replace(network=network)
    warn("the network gives numbers from 0 to 1, as of a sigmoid: probabilities are their softmax; "
         "better leave the sigmoid out, and --score logit explains one class alone")  # fmt: skip
    return classifier


def describe_parts(y):
    """Say what a network gives in place of logits, and how to choose a part of it."""
    if isinstance(y, dict):
        parts = {repr(key): value for key, value in y.items()}
    elif isinstance(y, (tuple, list)):
        parts = {str(i): value for i, value in enumerate(y)}
    else:
        return f"the network gives a {type(y).__name__}: make it give logits, (N, K)"
    shapes = [f"[{k}] {tuple(getattr(value, 'shape', ()))}" for k, value in parts.items()]
    first = next(iter(parts), 0)
    return (f"the network gives a {type(y).__name__} with {', '.join(shapes)}: wrap it, so that it "
            f"gives one of them, such as y[{first}]")  # fmt: skip


def warn(line):
    """Print a warning once, whatever the number of processes."""
    if is_first():
        print(f"warning: {line}", file=sys.stderr)
