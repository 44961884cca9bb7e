"""make_layer: its layers, its sides, its gradients."""

import inspect

import pytest
import torch
from torch import nn

from common.layers import make_layer


def test_defaults():
    """Who calls it with two numbers gets what the post's make_layer gave."""
    parameters = inspect.signature(make_layer).parameters
    assert list(parameters)[:2] == ["in_channels", "out_channels"]
    assert {name: p.default for name, p in list(parameters.items())[2:]} == {
        "kernel": 2, "stride": 2, "padding": 1, "use_batchnorm": True, "deconv": False,
    }  # fmt: skip
    convolution = make_layer(3, 4)[0]
    assert convolution.kernel_size == convolution.stride == (2, 2)
    assert convolution.padding == (1, 1)


@pytest.mark.parametrize("use_batchnorm", [True, False])
@pytest.mark.parametrize("deconv", [True, False])
def test_layers(deconv, use_batchnorm):
    """Convolution, BatchNorm, activation; a bias just where no BatchNorm undoes it; all learn."""
    torch.manual_seed(0)
    block = make_layer(3, 4, use_batchnorm=use_batchnorm, deconv=deconv)
    kinds = [nn.ConvTranspose2d if deconv else nn.Conv2d]
    kinds += [nn.BatchNorm2d] * use_batchnorm
    kinds += [nn.ReLU if deconv else nn.LeakyReLU]
    assert [type(layer) for layer in block] == kinds
    assert (block[0].bias is None) == use_batchnorm
    assert (block[0].in_channels, block[0].out_channels) == (3, 4)
    if use_batchnorm:
        assert (block[1].num_features, block[1].eps, block[1].momentum) == (4, 1e-5, 0.1)
    if not deconv:
        assert block[-1].negative_slope == 0.2
    (block(torch.randn(4, 3, 6, 6)) ** 2).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in block.parameters())


@pytest.mark.parametrize(
    ("deconv", "kernel", "stride", "padding", "before", "after"),
    [
        (True, 3, 1, 0, 5, 7),
        (True, 4, 2, 1, 7, 14),
        (True, 4, 2, 1, 14, 28),
        (False, 4, 2, 1, 28, 14),
        (False, 4, 2, 1, 14, 7),
        (False, 3, 1, 0, 7, 5),
    ],
)
def test_sides(deconv, kernel, stride, padding, before, after):
    """The sides of a DCGAN for 28 pixels, up and down."""
    block = make_layer(2, 3, kernel, stride, padding, deconv=deconv)
    assert block(torch.randn(2, 2, before, before)).shape == (2, 3, after, after)
