"""The building blocks: make_layer, a Linear that is nn.Linear, and networks as plain values."""

import inspect
import json

import pytest
import torch
from torch import nn

from common.checkpoint import load_checkpoint, save_checkpoint
from common.errors import UserError
from common.layers import Linear, Residual, from_plain, make_layer, to_plain

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


# ------------------------------------------------------------------------- Residual, plain values


def small_network():
    """Make a network of many kinds of layers, with arguments that are not the defaults.

    :rtype: torch.nn.Sequential
    """
    torch.manual_seed(0)
    return nn.Sequential(
        make_layer(3, 4, kernel=(3, 1), stride=1, padding=(1, 0), use_batchnorm=False),
        nn.Conv2d(4, 6, 3, padding="same", groups=2, padding_mode="reflect", bias=False),
        nn.BatchNorm2d(6, eps=1e-3, momentum=None, affine=False),
        nn.MaxPool2d(2, ceil_mode=True),
        Residual(make_layer(6, 6, kernel=3, stride=1), nn.Sequential(nn.Identity(), nn.GELU())),
        nn.ConvTranspose2d(6, 5, 2, stride=2),
        nn.AdaptiveAvgPool2d((2, None)),
        nn.Flatten(),
        nn.Dropout(0.25),
        nn.LayerNorm(2 * 8 * 5, bias=False),
        Linear(2 * 8 * 5, 7, bias=False),
        nn.Linear(7, 3),
    ).eval()


def test_residual_adds_its_input():
    """x + f(x), with x itself left alone."""
    x = torch.randn(2, 3)
    before = x.clone()
    assert torch.equal(Residual(nn.Linear(3, 3), nn.ReLU())(x) >= x, torch.ones(2, 3).bool())
    assert torch.equal(Residual(nn.Identity())(x), 2 * before)
    assert torch.equal(x, before)


def test_a_network_survives_plain_values_and_a_checkpoint(tmp_path):
    """Described, saved, loaded and built on "meta": the same layers, keys, weights and outputs."""
    network, x = small_network(), torch.randn(4, 3, 8, 8)
    state = {"script": "x", "layers": to_plain(network), "network": network.state_dict()}
    assert json.loads(json.dumps(state["layers"])) == state["layers"]
    save_checkpoint(tmp_path / "checkpoint.pt", state)
    loaded = load_checkpoint(tmp_path, "x")
    with torch.device("meta"):
        again = from_plain(loaded["layers"]).eval()
    assert all(p.is_meta for p in again.parameters())
    again.load_state_dict(loaded["network"], assign=True)
    assert repr(again) == repr(network)  # every layer and argument
    assert to_plain(again) == state["layers"]
    torch.testing.assert_close(again(x), network(x), **CLOSE)


def test_a_subclass_of_sequential_is_known_by_its_layers():
    """A script may name its network; what is described are the layers in it."""

    class Net(nn.Sequential):
        def __init__(self):
            super().__init__(nn.ReLU(), nn.Flatten())

    assert to_plain(Net()) == to_plain(nn.Sequential(nn.ReLU(), nn.Flatten()))


def test_layers_that_occur_twice_or_have_names_are_kept():
    """An activation used twice stays twice, and a named layer keeps its name."""
    relu, named = nn.ReLU(), nn.Sequential()
    named.add_module("first", relu)
    named.add_module("second", relu)
    again = from_plain(to_plain(named))
    assert list(dict(again.named_children())) == ["first", "second"]


class Swish(nn.Module):
    """A layer that only this file knows."""


class Doubled(nn.Sequential):
    """A sequence with a forward of its own."""

    def forward(self, x):
        """Twice what the layers give."""
        return 2 * super().forward(x)


class ReLU(nn.ReLU):
    """Called as one of torch.nn's, but another."""


@pytest.mark.parametrize(
    "layer",
    [Swish(), Doubled(nn.ReLU()), ReLU(), nn.MultiheadAttention(4, 2),
     nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2), 1)],
    ids=lambda layer: type(layer).__name__,
)  # fmt: skip
def test_layers_that_cannot_be_described_are_refused(layer):
    """What from_plain could not build again is refused before the training, by its name."""
    with pytest.raises(UserError, match=type(layer).__name__):
        to_plain(nn.Sequential(nn.ReLU(), layer))


DEEP = ["ReLU", {}]
for _ in range(100_000):
    DEEP = ["Sequential", {"0": DEEP}]


@pytest.mark.parametrize(
    "layers",
    [
        None,
        "ReLU",
        ["ReLU"],
        ["Swish", {}],
        ["Parameter", {}],  # in torch.nn, but no layer
        ["os.system", {"command": "true"}],
        ["Linear", {"in_features": 3}],
        ["Linear", {"in_features": -3, "out_features": 3}],
        ["Linear", {"in_features": 3, "out_features": 3, "device": "cpu"}],
        ["Conv2d", {"in_channels": 3, "out_channels": 3, "kernel_size": {}}],
        ["Conv2d", {"in_channels": 3, "out_channels": 3, "kernel_size": 1, "groups": 0}],
        ["Sequential", [["ReLU", {}]]],
        ["Sequential", {"a.b": ["ReLU", {}]}],
        ["Sequential", {"0": ["ReLU", {}], "1": ["Swish", {}]}],
        ["ModuleList", {"modules": [["ReLU", {}]]}],
        DEEP,
    ],
    ids=range(16),
)
def test_what_is_no_description_is_refused(layers):
    """A damaged or hostile file ends in a UserError, whatever it says."""
    with pytest.raises(UserError, match="layers can't be built"), torch.device("meta"):
        from_plain(layers)


def test_an_absurd_size_costs_nothing_on_meta():
    """A file can't fill the memory: its weights have to be in it."""
    arguments = {"in_channels": 10**6, "out_channels": 10**6, "kernel_size": 3}
    with torch.device("meta"):
        network = from_plain(["Conv2d", arguments])
    state = {"weight": torch.zeros(1), "bias": torch.zeros(1)}
    with pytest.raises(RuntimeError, match="size mismatch"):
        network.load_state_dict(state, assign=True)
