"""What the tests of several files compare and write."""

import torch


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
