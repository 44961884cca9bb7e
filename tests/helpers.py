"""What the tests of several files compare, call and write."""

import json
import os

import pytest
import torch

from common.checkpoint import save_checkpoint
from common.errors import UserError
from common.layers import to_plain

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
    """Read metrics.json, and hold it against the run folder and against what main returned.

    :param pathlib.Path folder: of the run
    :param dict metrics: what main returned
    :return: what the file holds
    :rtype: dict
    """
    saved = json.loads((folder / "metrics.json").read_text())
    assert saved == json.loads(json.dumps(metrics))
    assert {"command", "args", "dataset", "device", "versions", "seconds", "files"} <= set(saved)
    on_disk = {f.relative_to(folder).as_posix() for f in folder.rglob("[!.]*") if f.is_file()}
    assert set(saved["files"]) == on_disk
    return saved


def save_classifier(folder, network, classes, shape, std=0.25):
    """Write a checkpoint as train_classifier.py does.

    :param pathlib.Path folder: of the run
    :param torch.nn.Sequential network: from pictures to logits
    :param list[int] shape: of a picture: channels, height, width
    """
    mean, std = ([value] * shape[0] for value in (0.5, std))
    state = {"script": "train_classifier", "layers": to_plain(network), "shape": shape}
    state |= {"network": network.state_dict(), "classes": list(classes), "mean": mean, "std": std}
    save_checkpoint(folder / "checkpoint.pt", state)
