"""Folding: the same logits and gradients, fewer layers; what can't be folded is left right."""

import copy

import pytest
import torch
from timm.layers import Conv2dSame
from torch import nn
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode
from torchvision import models

from common.folding import NORMS, ConvReLU, fold


class Wired(nn.Module):
    """Layers by name, and a function of them and of the input."""

    def __init__(self, function, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.function = function

    def forward(self, x):
        """Do what the function says."""
        return self.function(self, x)


class Standardised(nn.Conv2d):
    """A convolution whose weights are not those that it holds."""

    def forward(self, x):
        """Standardise the weights, then convolve."""
        weight = (self.weight - self.weight.mean()) / self.weight.std()
        return self._conv_forward(x, weight, self.bias)


class Pair(nn.Linear):
    """A layer that gives two tensors."""

    def forward(self, x):
        """Give the output twice."""
        y = super().forward(x)
        return y, y


def randomise(network):
    """Give BatchNorm statistics and weights as after training: folding 0 and 1 proves nothing."""
    rng = torch.Generator().manual_seed(1)
    for m in network.modules():
        if isinstance(m, NORMS) and m.running_mean is not None:
            m.running_mean.normal_(0, 0.3, generator=rng)
            m.running_var.uniform_(0.5, 2, generator=rng)
        if isinstance(m, NORMS) and m.affine:
            nn.init.uniform_(m.weight, 0.7, 1.3, generator=rng)
            nn.init.normal_(m.bias, 0, 0.3, generator=rng)
    return network.eval()


def count(network, kind):
    """Count the layers of a kind."""
    return sum(isinstance(m, kind) for m in network.modules())


def check(network, x, tolerance=1e-4):
    """Hold a folded network against the original: logits, gradient, and the original itself.

    :return: the folded network
    :rtype: torch.nn.Module
    """
    randomise(network)
    before = copy.deepcopy(network.state_dict())
    layers = str(network)
    folded = fold(network, x[:1])
    assert str(network) == layers
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    folded.requires_grad_(False)  # only frozen convolutions take the short way

    inputs = [x.clone().requires_grad_() for _ in range(2)]
    wanted, got = network(inputs[0]), folded(inputs[1])
    assert wanted.abs().max() > 0
    assert (got - wanted).abs().max() < tolerance * wanted.abs().max()
    direction = torch.linspace(-1, 1, wanted[0].numel()).view_as(wanted[0])
    a = torch.autograd.grad((wanted * direction).sum(), inputs[0])[0]
    b = torch.autograd.grad((got * direction).sum(), inputs[1])[0]
    # Rounding may push a ReLU's input to the other side of 0, and all gradients behind it: in one
    # picture by chance, in most of them by mistake.
    errors = (a - b).abs().flatten(1).amax(1)
    assert errors.median() < 10 * tolerance * a.abs().max()
    with torch.no_grad():
        torch.testing.assert_close(folded(x), got.detach())
    return folded


@pytest.mark.parametrize(
    ("name", "side", "norms_left", "fused"),
    [
        ("resnet18", 48, 0, 1),  # a block calls its ReLU twice, the second time after the sum
        ("mobilenet_v2", 48, 0, 35),
        ("densenet121", 48, 62, 59),  # half of its BatchNorms stand before their convolution
        ("shufflenet_v2_x0_5", 48, 0, 37),
        ("squeezenet1_0", 48, 0, 26),
        ("mnasnet0_5", 48, 0, 35),
        ("regnet_y_400mf", 48, 0, 49),
    ],
)
def test_torchvision_classifiers_compute_the_same(name, side, norms_left, fused):
    """Logits and gradients of architectures of every kind, random weights; how much was folded."""
    torch.manual_seed(0)
    network = models.get_model(name, weights=None, num_classes=10)
    folded = check(network, torch.rand(3, 3, side, side))
    assert count(folded, NORMS) == norms_left
    assert count(folded, ConvReLU) == fused


def test_vgg_computes_the_same():
    """Its convolutions only: most of its weights lie in the layers after them."""
    torch.manual_seed(0)
    layers = models.vgg.make_layers(models.vgg.cfgs["A"], batch_norm=True)
    network = nn.Sequential(layers, nn.Flatten(), nn.Linear(512, 10))
    folded = check(network, torch.rand(2, 3, 32, 32))
    assert count(folded, NORMS) == 0
    assert count(folded, ConvReLU) == 8


def make_conv(inputs=3, outputs=4, **options):
    """Build a convolution that keeps the size."""
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


BLOCK = {"c": make_conv, "b": lambda: nn.BatchNorm2d(4), "r": nn.ReLU}
FOLDED = {
    "plain": lambda: nn.Sequential(make_conv(), nn.BatchNorm2d(4), nn.ReLU()),
    "without bias, without affine": lambda: nn.Sequential(
        make_conv(bias=False), nn.BatchNorm2d(4, affine=False), nn.ReLU6()
    ),
    "grouped, strided, dilated": lambda: nn.Sequential(
        make_conv(), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
        nn.Conv2d(4, 8, 3, stride=2, dilation=2, groups=4), nn.BatchNorm2d(8), nn.ReLU6(),
    ),
    "depthwise": lambda: nn.Sequential(
        make_conv(), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 8, (3, 5), padding=(1, 0), groups=4), nn.BatchNorm2d(8), nn.ReLU6(),
    ),
    "depthwise, padded by more than the kernel": lambda: nn.Sequential(
        make_conv(), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 16, 3, padding=3, groups=4), nn.BatchNorm2d(16), nn.ReLU(),
    ),
    "padding by name": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3, padding="same"), nn.BatchNorm2d(4), nn.ReLU()
    ),
    "keyword arguments": lambda: Wired(
        lambda m, x: m.r(input=m.b(input=m.c(x))), **{k: make() for k, make in BLOCK.items()}
    ),
    "checkpointed": lambda: Wired(
        lambda m, x: torch.utils.checkpoint.checkpoint(m.all, x, use_reentrant=False),
        all=nn.Sequential(make_conv(), nn.BatchNorm2d(4), nn.ReLU()),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDED)
def test_folds_every_kind_of_convolution(case):
    """BatchNorm is gone, the convolution applies its ReLU, nothing else has changed."""
    torch.manual_seed(0)
    folded = check(FOLDED[case](), torch.rand(2, 3, 9, 9))
    assert count(folded, NORMS) == 0
    assert count(folded, ConvReLU) == count(folded, nn.Conv2d)


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Linear(24, 6), nn.BatchNorm1d(6), (3, 24)),
        (nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), (3, 3, 9)),
        (nn.Conv3d(2, 6, 2), nn.BatchNorm3d(6), (3, 2, 4, 4, 4)),
        (make_conv(padding_mode="reflect"), nn.BatchNorm2d(4), (3, 3, 8, 8)),
        (nn.Linear(5, 4), nn.Identity(), (3, 5)),
    ],
    ids=["Linear", "Conv1d", "Conv3d", "reflect", "no BatchNorm"],
)
def test_folds_without_fusing_the_relu(layer, norm, shape):
    """BatchNorm goes into other layers as well; their ReLU stays."""
    torch.manual_seed(0)
    folded = check(nn.Sequential(layer, norm, nn.ReLU()), torch.randn(shape))
    assert count(folded, NORMS) == count(folded, ConvReLU) == 0
    assert count(folded, nn.ReLU) == 1


LEFT = {
    "norm without statistics": lambda: nn.Sequential(
        make_conv(), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU()
    ),
    "convolution called twice": lambda: Wired(
        lambda m, x: m.b(m.c(m.c(x))), c=make_conv(3, 3), b=nn.BatchNorm2d(3)
    ),
    "norm called twice": lambda: Wired(
        lambda m, x: m.b(m.c(x)) + m.b(m.d(x)), c=make_conv(), d=make_conv(), b=nn.BatchNorm2d(4)
    ),
    "output read twice": lambda: Wired(
        lambda m, x: (lambda y: m.r(m.b(y)) + y)(m.c(x)), **{k: f() for k, f in BLOCK.items()}
    ),
    "output read unseen": lambda: Wired(
        lambda m, x: (lambda y: m.r(m.b(y)) * y.detach().mean())(m.c(x)),
        **{k: f() for k, f in BLOCK.items()},
    ),
    "changed in place between": lambda: Wired(
        lambda m, x: m.r(m.b(m.c(x).mul_(2))), **{k: f() for k, f in BLOCK.items()}
    ),
    "weights computed": lambda: nn.Sequential(Standardised(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
    "weights parametrised": lambda: nn.Sequential(
        parametrizations.weight_norm(make_conv()), nn.BatchNorm2d(4), nn.ReLU()
    ),
    "weights made by a hook": lambda: nn.Sequential(
        nn.utils.spectral_norm(make_conv()), nn.BatchNorm2d(4), nn.ReLU()
    ),
    "attribute of the convolution used": lambda: Wired(
        lambda m, x: m.r(m.b(m.c(x))) * m.c.out_channels, **{k: f() for k, f in BLOCK.items()}
    ),
    "attribute of the norm used": lambda: Wired(
        lambda m, x: m.r(m.b(m.c(x))) * m.b.weight.mean(), **{k: f() for k, f in BLOCK.items()}
    ),
    "channels along another axis": lambda: Wired(
        lambda m, x: m.b(m.l(x.flatten(2))), l=nn.Linear(81, 5), b=nn.BatchNorm1d(3)
    ),
    "as many along another axis": lambda: Wired(
        lambda m, x: m.b(m.l(x.flatten(2))), l=nn.Linear(81, 3), b=nn.BatchNorm1d(3)
    ),
    "norm first": lambda: nn.Sequential(nn.BatchNorm2d(3), make_conv()),
    "never called": lambda: Wired(lambda m, x: m.c(x), c=make_conv(), b=nn.BatchNorm2d(4)),
    "tiny logits": lambda: nn.Sequential(
        Standardised(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), Scaled(1e-6)
    ),
}


class Scaled(nn.Module):
    """Multiply by a constant."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        """Multiply."""
        return x * self.factor


@pytest.mark.parametrize("case", LEFT)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # the old spectral_norm warns of its age
def test_what_cannot_be_folded_is_left_right(case):
    """The network computes what it did, with its BatchNorm."""
    torch.manual_seed(0)
    network = LEFT[case]()
    folded = check(network, torch.rand(2, 3, 9, 9), tolerance=1e-5)
    assert count(folded, NORMS) == count(network, NORMS) == 1


@pytest.mark.parametrize("inplace", [False, True])
def test_a_residual_block_is_folded_in_part(inplace):
    """Both BatchNorms go; of a ReLU that is called twice, once after the sum, nothing goes."""
    torch.manual_seed(0)
    network = Wired(
        lambda m, x: m.r(m.b2(m.d(m.r(m.b(m.c(x))))) + x),
        c=make_conv(3, 3), b=nn.BatchNorm2d(3), d=make_conv(3, 3), b2=nn.BatchNorm2d(3),
        r=nn.ReLU(inplace),
    )  # fmt: skip
    folded = check(network, torch.rand(2, 3, 8, 8))
    assert count(folded, NORMS) == count(folded, ConvReLU) == 0
    assert count(folded, nn.ReLU) == 1


def test_layers_that_share_weights_get_their_own():
    """Two convolutions with one weight have two BatchNorms to take in."""
    torch.manual_seed(0)
    a, b = make_conv(3, 3), make_conv(3, 3)
    b.weight = a.weight
    folded = check(
        nn.Sequential(a, nn.BatchNorm2d(3), b, nn.BatchNorm2d(3)), torch.rand(2, 3, 8, 8)
    )
    assert count(folded, NORMS) == 0
    assert not torch.equal(folded[0].weight, folded[2].weight)


def test_a_layer_of_several_outputs_is_left():
    """Only tensors are followed."""
    check(Wired(lambda m, x: m.l(x.flatten(1))[0], l=Pair(192, 4)), torch.rand(2, 3, 8, 8))


# -------------------------------------------------------------------------------- ConvReLU


@pytest.fixture
def fused():
    """Give a frozen convolution with its ReLU6, and the two layers that it is made of."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3, padding=1).requires_grad_(False)
    return ConvReLU(conv, nn.ReLU6()), nn.Sequential(conv, nn.ReLU6())


def went_short(y):
    """Tell whether an output was made by oneDNN in one pass."""
    return "FusedConvReLU" in type(y.grad_fn).__name__


def test_conv_relu_stops_gradients_where_it_is_flat(fused):
    """At 0, at 6, and where the ReLU's input is exactly 0, as ReLU6 itself."""
    x = (torch.randn(2, 3, 9, 9) * 8).requires_grad_()
    x.data[0] = 0
    fused[1][0].bias[:4] = 0
    results = []
    for network in fused:
        y = network(x)
        results.append((y, *torch.autograd.grad((y * torch.arange(9.0)).sum(), x)))
    assert went_short(results[0][0])
    assert (results[1][0] == 6).any()
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_conv_relu_takes_two_steps_where_somebody_looks_on(fused):
    """A function mode sees convolution and ReLU; nothing is hidden from it."""
    seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(getattr(function, "__name__", ""))
            return function(*args, **(kwargs or {}))

    x = torch.randn(1, 3, 8, 8, requires_grad=True)
    with Watch():
        y = fused[0](x)
    assert {"relu6", "hardtanh"} & set(seen)
    assert not went_short(y)
    torch.testing.assert_close(y, fused[0](x))


def test_conv_relu_gives_the_weights_their_gradients(fused):
    """Trained on, it takes two steps: the short way has no gradients for weights or bias."""
    for parameter in fused[0].conv.parameters():
        fused[0].requires_grad_(False)
        parameter.requires_grad_(True)
        y = fused[0](torch.randn(1, 3, 8, 8))
        assert not went_short(y)
        assert torch.autograd.grad(y.sum(), parameter)[0].abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_conv_relu_in_other_precisions(fused, dtype):
    """What oneDNN's short way is not made for goes the long way."""
    x = torch.randn(1, 3, 8, 8, dtype=dtype)
    torch.testing.assert_close(fused[0].to(dtype)(x), fused[1].to(dtype)(x))


@pytest.mark.parametrize("size", [(8, 8), (9, 9), (8, 9), (9, 10)])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (5, 2), (5, 3), (2, 1), (1, 2)])
def test_timm_pads_one_side_more_at_any_size(kernel, stride, size):
    torch.manual_seed(0)
    conv = Conv2dSame(3, 4, kernel, stride)
    plain = nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU6(), nn.Conv2d(4, 1, 1))
    folded = fold(randomise(plain), torch.rand(1, 3, 8, 8)).requires_grad_(False)
    assert count(folded, ConvReLU) == 1
    x = torch.rand(2, 3, *size, requires_grad=True)
    wanted, got = plain(x), folded(x)
    assert torch.allclose(got, wanted, atol=1e-5)
    (wanted,), (got,) = (torch.autograd.grad(y.square().sum(), x) for y in (wanted, got))
    assert torch.allclose(got, wanted, atol=1e-4)
