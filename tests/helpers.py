"""What the tests of several files compare, call and write."""

import json
import os

import pytest
import torch

import train_classifier
from common.errors import UserError
from common.run import save_checkpoint

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


def refusal(function, *arguments, **options):
    """Call what must refuse to go on, for a reason that the user can mend.

    :return: the message, which is one line, as every message to a user is
    :rtype: str
    """
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
