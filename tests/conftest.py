"""What the tests of several files need."""

import resource
from contextlib import contextmanager

import pytest
import torch

# The tests' networks are tiny: a second thread would only wait for the first.
torch.set_num_threads(1)


@pytest.fixture
def full_disk():
    """Give a context manager in which a file can't grow past 1,000 bytes, as on a full disk.

    File permissions would do for most users, but don't bind root, as which many containers run.
    """

    @contextmanager
    def limit():
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit
