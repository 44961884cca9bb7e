"""What the tests of several files need."""

import signal
import sys
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from common.layers import to_plain

# So that their assertions say what they compared, as those of a test do.
pytest.register_assert_rewrite("tests.helpers", "tests.processes")
# Who starts the tests in the background of a shell has them, and their children, ignore SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)
# The tests' networks are tiny: a second thread would only wait for the first.
torch.set_num_threads(1)


@pytest.fixture
def full_disk():
    """Give a context manager in which a file can't grow past 1,000 bytes, as on a full disk.

    File permissions would do for most users, but don't bind root, as which many containers run.
    """

    resource = pytest.importorskip("resource", reason="Windows has no limit on the size of files")

    @contextmanager
    def limit():
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit


@pytest.fixture
def refused(monkeypatch, capsys):
    """Give a function that calls a script with what it must refuse: exit code 2, one line.

    It takes the script and its command line, word by word, and returns the line.
    """

    def call(script, *words):
        monkeypatch.setattr(sys, "argv", [f"{script.SCRIPT}.py", *words])
        assert script.exit_code(script.main) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        return error

    return call


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Give a run folder as train_classifier.py leaves it, of a tiny network with random weights.

    It tells red, green and blue pictures of 16 x 16 pixels apart no better than chance, but in an
    instant, and without the weights of ImageNet.
    """
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 7 * 7, 3),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("trained")
    state = {"script": "train_classifier", "layers": to_plain(network), "shape": [3, 16, 16]}
    state |= {"network": network.state_dict(), "classes": ["red", "green", "blue"]}
    torch.save(state | {"mean": [0.5] * 3, "std": [0.1] * 3}, folder / "checkpoint.pt")
    return folder
