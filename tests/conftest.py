"""What the tests of several files need."""

import signal
import socket
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image

# So that their assertions say what they compared, as those of a test do.
pytest.register_assert_rewrite("tests.helpers", "tests.processes")
from tests.helpers import save_classifier  # noqa: E402 (only now)

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
        try:
            code = script.exit_code(script.main)
        except SystemExit as stop:  # argparse's own way
            code = stop.code
        assert code == 2
        error = capsys.readouterr().err
        assert "error: " in error
        assert error.count("\n") == 1
        return error

    return call


@pytest.fixture
def no_network(monkeypatch):
    """Let every attempt at a connection fail at once, as without a cable, and note who tries."""
    tried = []

    def refuse(*args, **kwargs):
        tried.append(args)
        raise socket.gaierror(-2, "Name or service not known")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    return tried


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Give a run folder as train_classifier.py leaves it, of a tiny network with random weights.

    It tells red, green and blue images of 16 x 16 pixels apart no better than chance, but in an
    instant, and without the weights of ImageNet.
    """
    folder = tmp_path_factory.mktemp("trained")
    save_classifier(folder, ["red", "green", "blue"], [3, 16, 16])
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Give a folder of three photos, which no test may change: noise with a bright square."""
    folder = tmp_path_factory.mktemp("photos")
    for seed, name in enumerate(("ant", "bee", "cat")):
        pixels = np.random.default_rng(seed).integers(0, 200, (20, 24, 3), np.uint8)
        pixels[5:12, 6:14, seed] = 255
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder
