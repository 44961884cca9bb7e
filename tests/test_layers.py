"""The building blocks: make_layer's exact layers and shapes, and a Linear that is nn.Linear."""

import inspect

import pytest
import torch
from torch import nn

from common.layers import Linear, make_layer

CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # float32, summed in another order


def pair(n_in=7, n_out=5, bias=True):
    """Make our layer and PyTorch's, with the same weights.

    :rtype: tuple[Linear, torch.nn.Linear]
    """
    torch.manual_seed(0)
    ours, theirs = Linear(n_in, n_out, bias=bias), nn.Linear(n_in, n_out, bias=bias)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


# -------------------------------------------------------------------------------------- make_layer


def test_make_layer_defaults():
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
def test_make_layer_is_exactly_this(deconv, use_batchnorm):
    """Convolution, BatchNorm, activation; and a bias just where no BatchNorm would undo it."""
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
def test_make_layer_sides(deconv, kernel, stride, padding, before, after):
    """The sides of a DCGAN for 28 pixels, up and down."""
    block = make_layer(2, 3, kernel, stride, padding, deconv=deconv)
    assert block(torch.randn(2, 2, before, before)).shape == (2, 3, after, after)


def test_make_layer_has_a_gradient():
    """A block of each kind learns: every parameter gets a gradient that is not zero."""
    torch.manual_seed(0)
    for deconv in (True, False):
        block = make_layer(2, 3, deconv=deconv)
        (block(torch.randn(4, 2, 6, 6)) ** 2).sum().backward()
        assert all(p.grad.abs().sum() > 0 for p in block.parameters())


# ------------------------------------------------------------------------------------------ Linear


def test_linear_uses_the_faster_product():
    """On a CPU, float32 matrices do go through oneDNN; else the tests below would be of nothing."""
    x = torch.randn(3, 7, requires_grad=True)
    with torch.profiler.profile() as profile:
        Linear(7, 5)(x).sum().backward()
    called = [event.name for event in profile.events() if "_linear_pointwise" in event.name]
    assert len(called) == 3  # the output, and the gradients of the input and the weight


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", ["rows", "transposed", "sliced", "expanded", "one row"])
def test_linear_equals_torch(layout, bias):
    """Values and every gradient are nn.Linear's, however the input lies in memory."""
    ours, theirs = pair(bias=bias)
    x = {
        "rows": torch.randn(6, 7),
        "transposed": torch.randn(7, 6).t(),
        "sliced": torch.randn(6, 14)[:, ::2],
        "expanded": torch.randn(1, 7).expand(6, 7),
        "one row": torch.randn(1, 7),
    }[layout]
    results = []
    for layer in (ours, theirs):
        leaf = x.detach().requires_grad_()
        y = layer(leaf)
        (y.sigmoid() * torch.arange(y.numel()).view_as(y)).sum().backward()
        results.append([y, leaf.grad, *(p.grad for p in layer.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_linear_sums_gradients_like_torch():
    """The gradient of a plain sum is spread out by expand, not stored: it works as well."""
    ours, theirs = pair()
    x = torch.randn(6, 7)
    for layer in (ours, theirs):
        layer(x).sum().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, **CLOSE)


def test_linear_differentiates_twice():
    """A gradient penalty, which differentiates the gradient, gives nn.Linear's."""
    ours, theirs = pair()
    x, results = torch.randn(6, 7), []
    for layer in (ours, theirs):
        leaf = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(layer(leaf).tanh().sum(), leaf, create_graph=True)
        penalty = (slope.norm(dim=1) - 1).pow(2).sum()
        results.append(torch.autograd.grad(penalty, [leaf, layer.weight, layer.bias]))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_linear_leaves_frozen_weights_alone():
    """A frozen layer passes the gradient through, and gets none."""
    ours, theirs = pair()
    x, results = torch.randn(6, 7), []
    for layer in (ours, theirs):
        layer.requires_grad_(False)
        leaf = x.clone().requires_grad_()
        layer(leaf).pow(2).sum().backward()
        assert layer.weight.grad is layer.bias.grad is None
        results.append(leaf.grad)
    torch.testing.assert_close(*results, **CLOSE)


@pytest.mark.parametrize("shape", [(7,), (2, 3, 7), (0, 7)], ids=["vector", "3-D", "empty"])
def test_linear_takes_every_shape(shape):
    """Other shapes, no rows included, give exactly what nn.Linear gives, gradients too."""
    ours, theirs = pair()
    x = torch.randn(shape)
    for layer in (ours, theirs):
        layer(x).sum().backward()
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.weight.grad, theirs.weight.grad)


def test_linear_takes_float64_and_autocast():
    """Other precisions are left to PyTorch: float64 stays exact, autocast gives bfloat16."""
    ours, theirs = pair()
    x = torch.randn(6, 7)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16
        assert torch.equal(ours(x), theirs(x))
    ours.double()
    x = x.double().requires_grad_()
    assert torch.equal(ours(x), theirs.double()(x))
    assert torch.autograd.gradcheck(ours, x)


def test_linear_refuses_a_wrong_size_as_torch_does():
    """A wrong number of features is told in PyTorch's words, which name both shapes."""
    with pytest.raises(RuntimeError, match="2x5 and 7x5"):
        Linear(7, 5)(torch.randn(2, 5))


def test_linear_compiles():
    """torch.compile sees one plain linear layer, without a break in the graph."""
    ours, theirs = pair()
    x = torch.randn(6, 7)
    graphs = []

    def keep(graph, _):  # generating code would need a C++ compiler and a minute
        graphs.append(graph)
        return graph

    compiled = torch.compile(ours, backend=keep, fullgraph=True)
    torch.testing.assert_close(compiled(x), theirs(x))
    (graph,) = graphs
    calls = [node.target for node in graph.graph.nodes if node.op.startswith("call")]
    assert calls == [nn.functional.linear]
