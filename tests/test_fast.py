"""What is only faster: the same values and gradients, and what can't be made faster left right."""

import contextlib
import copy
from unittest.mock import MagicMock

import pytest
import torch
from timm.layers import Conv2dSame
from torch import nn
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode
from torchvision import models

import common.fast
from common.fast import (
    NORMS,
    ConvReLU,
    FastLinear,
    QuickAdam,
    captured,
    fold,
    replaying,
    speed_up_linear,
    use_channels_last,
)
from tests.helpers import left_alone

CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # float32, summed in another order


# ------------------------------------------------------------------- graphs, but for the GPU itself


class Graph:
    """Stands in for a CUDA graph: replays by calling the step on the tensors that it was given."""

    def __init__(self, step):
        self.step = step

    def replay(self):
        """Compute anew, from the same inputs into the same outputs."""
        for old, new in zip(self.outputs, self.step(*self.inputs), strict=True):
            old.copy_(new)


@pytest.fixture
def graphs(monkeypatch):
    """Let tensors of the CPU be captured; return the graphs that were.

    A function to capture is given by :func:`watched`, which tells a graph what it was called with.
    """
    made = []

    @contextlib.contextmanager
    def capture(graph):
        made.append(graph)
        yield

    monkeypatch.setattr("common.fast.is_on_gpu", lambda x: True)
    for name in ("Stream", "current_stream", "stream"):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda *_: MagicMock())
    monkeypatch.setattr("torch.cuda.CUDAGraph", lambda: Graph(None))
    monkeypatch.setattr("torch.cuda.graph", capture)
    return made


def watched(step, graphs):
    """Make a step note, while it is captured, its inputs and outputs in the graph."""

    def call(*inputs):
        outputs = step(*inputs)
        if graphs and graphs[-1].step is None:
            graphs[-1].step, graphs[-1].inputs, graphs[-1].outputs = step, inputs, outputs
        return outputs

    return call


def squares(x, scale):
    """Return a sum of squares and its gradient."""
    with torch.enable_grad():
        value = scale * (x**2).sum()
        return value.detach(), *torch.autograd.grad(value, x)


def test_off_a_gpu_nothing_is_captured():
    """The function itself comes back, so that all its results are those of before."""
    assert captured(squares, torch.ones(2, requires_grad=True), torch.tensor(3.0)) is squares


def test_a_graph_computes_what_the_function_does(graphs):
    """From copies of its arguments, into tensors of its own, and eagerly for other shapes."""
    example = torch.ones(3, requires_grad=True)
    graph = captured(watched(squares, graphs), example, torch.tensor(2.0))
    assert len(graphs) == 1
    x = torch.randn(3, requires_grad=True)
    with torch.no_grad():  # a leaf that needs a gradient is written to all the same
        first = graph(x, torch.tensor(0.5))
    for found, wanted in zip(first, squares(x, 0.5), strict=True):
        assert torch.equal(found, wanted)
    kept = first[1].clone()
    second = graph(x * 2, torch.tensor(0.5))
    assert second[1] is first[1]  # the same memory
    assert torch.equal(second[1], 2 * kept)
    assert torch.equal(example, torch.ones(3))  # nobody else's is
    longer = torch.randn(5, requires_grad=True)
    assert torch.equal(graph(longer, torch.tensor(1.0))[1], 2 * longer)
    assert len(graphs) == 1


def test_what_cannot_be_captured_runs_eagerly(graphs, monkeypatch):
    """A network of the user's may ask the host for a value; but memory that runs out is said."""

    @contextlib.contextmanager
    def refuse(graph):
        yield
        raise RuntimeError(why)

    monkeypatch.setattr("torch.cuda.graph", refuse)
    x = torch.ones(3, requires_grad=True)
    why = "operation not permitted when stream is capturing"
    assert captured(squares, x, torch.tensor(2.0)) is squares
    why = "CUDA out of memory"
    with pytest.raises(RuntimeError, match="memory"):
        captured(squares, x, torch.tensor(2.0))


def test_only_full_chunks_of_one_network_are_replayed(monkeypatch):
    """Others are explained as ever; a new network, or another setting, is captured anew."""
    made = []

    def capture(step, *examples):
        made.append([len(example) for example in examples])
        return step

    monkeypatch.setattr("common.fast.is_on_gpu", lambda x: True)
    monkeypatch.setattr("common.fast.captured", capture)

    def explain(network, x, target, score=1):
        return network * score * x + target.view(-1, 1)

    graph = replaying(explain, 4)
    assert replaying(explain, 4) is graph
    for network, n, settings, captures in (
        (2, 3, (), 0), (2, 4, (), 1), (2, 4, (), 0), (2, 5, (), 0), (3, 4, (), 1), (3, 4, (7,), 1),
        (3, 4, (7,), 0),
    ):  # fmt: skip
        made.clear()
        x = torch.randn(n, 2)
        found = graph(network, x, torch.arange(n), *settings)
        assert torch.equal(found, explain(network, x, torch.arange(n), *settings))
        assert made == [[4, 4]] * captures


# ---------------------------------------------------------------------------------------- QuickAdam


def test_adam_without_its_wrappers_is_adam():
    """The same weights to the last bit, with a closure and a schedule."""
    found = []
    for kind in (QuickAdam, torch.optim.Adam):
        weights = torch.linspace(-1, 1, 5).requires_grad_()
        optimizer = kind([weights], 0.5, betas=(0.8, 0.99))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)

        def evaluate(optimizer=optimizer, weights=weights):
            optimizer.zero_grad()
            loss = weights.sin().mul(torch.arange(5)).sum()
            loss.backward()
            return loss

        for _ in range(9):
            assert optimizer.step(evaluate).requires_grad
            schedule.step()
        assert weights.is_leaf
        assert torch.is_grad_enabled()
        found.append(weights.detach())
    assert torch.equal(*found)


# --------------------------------------------------------------------------------------- FastLinear


def make_pair(bias=True):
    """Make our layer and PyTorch's, with the same weights."""
    torch.manual_seed(0)
    theirs = nn.Linear(7, 5, bias=bias)
    network = nn.Sequential(copy.deepcopy(theirs))
    speed_up_linear(network)
    assert type(network[0]) is FastLinear
    return network[0], theirs


def differentiate(layer, x):
    """Compute values, and the gradients of the input and of the parameters that aren't frozen."""
    x = x.detach().requires_grad_()
    y = layer(x)
    loss = (y.sigmoid() * torch.arange(y.numel()).view_as(y)).sum()
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    return [y.detach(), *torch.autograd.grad(loss, wanted)]


def test_linear_uses_the_faster_product():
    """On a CPU, float32 matrices do go through oneDNN; else the tests below would be of nothing."""
    ours, _ = make_pair()
    with torch.profiler.profile() as profile:
        ours(torch.randn(3, 7, requires_grad=True)).sum().backward()
    called = [event.name for event in profile.events() if "_linear_pointwise" in event.name]
    assert len(called) == 3  # the output, and the gradients of the input and the weight


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", ["rows", "transposed", "sliced", "expanded", "one row"])
def test_linear_equals_torch(layout, bias):
    """Values and every gradient are nn.Linear's, however the input lies in memory; frozen, too."""
    pair = make_pair(bias)
    x = {
        "rows": torch.randn(6, 7),
        "transposed": torch.randn(7, 6).t(),
        "sliced": torch.randn(6, 14)[:, ::2],
        "expanded": torch.randn(1, 7).expand(6, 7),
        "one row": torch.randn(1, 7),
    }[layout]
    for frozen in (False, True):
        found = [differentiate(layer.requires_grad_(not frozen), x) for layer in pair]
        assert len(found[0]) == (2 if frozen else 3 + bias)
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)


def test_linear_differentiates_twice():
    """A gradient penalty, which differentiates the gradient, gives nn.Linear's."""
    x = torch.randn(6, 7)
    results = []
    for layer in make_pair():
        leaf = x.clone().requires_grad_()
        # The gradient of a plain sum is spread out by expand, not stored.
        (slope,) = torch.autograd.grad(layer(leaf).tanh().sum(), leaf, create_graph=True)
        penalty = (slope.norm(dim=1) - 1).pow(2).sum() + layer(leaf).sum()
        results.append(torch.autograd.grad(penalty, [leaf, layer.weight, layer.bias]))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("shape", [(7,), (2, 3, 7), (0, 7)], ids=["vector", "3-D", "empty"])
def test_linear_takes_every_shape(shape):
    """Other shapes, no rows included, give exactly what nn.Linear gives, gradients too."""
    ours, theirs = make_pair()
    x = torch.randn(shape)
    for a, b in zip(differentiate(ours, x), differentiate(theirs, x), strict=True):
        assert torch.equal(a, b)


def test_linear_leaves_other_precisions_and_mistakes_to_torch():
    """float64 stays exact, autocast gives bfloat16, a wrong size is told in PyTorch's words."""
    ours, theirs = make_pair()
    x = torch.randn(6, 7)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16
        assert torch.equal(ours(x), theirs(x))
    with pytest.raises(RuntimeError, match="6x5 and 7x5"):
        ours(x[:, :5])
    ours.double()
    theirs.double()
    x = x.double().requires_grad_()
    assert torch.equal(ours(x), theirs(x))
    assert torch.autograd.gradcheck(ours, x)


def test_speed_up_changes_plain_linear_layers_only():
    """In place, wherever they are; a subclass may have a forward of its own."""
    network = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2, bias=False)), Pair(2, 2))
    weights = dict(network.named_parameters())
    speed_up_linear(network)
    assert [type(m) for m in network.modules() if isinstance(m, nn.Linear)] == [
        FastLinear, FastLinear, Pair,
    ]  # fmt: skip
    assert all(value is weights[name] for name, value in network.named_parameters())


def test_use_channels_last():
    """Weights of convolutions are laid out so, in place, and nothing else is touched."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv1d(4, 4, 3))
    with left_alone(network):
        use_channels_last(network)
    assert network[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not network[0].weight.is_contiguous()


# ------------------------------------------------------------------------------------------ folding


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
    """Hold a folded network against the original: logits, gradient, and the original itself."""
    randomise(network)
    layers = str(network)
    with left_alone(network):
        folded = fold(network, x[:1])
        folded.requires_grad_(False)  # only frozen convolutions take the short way
    assert str(network) == layers

    x = x.clone().requires_grad_()
    wanted, got = network(x), folded(x)
    assert wanted.abs().max() > 0
    assert (got - wanted).abs().max() < tolerance * wanted.abs().max()
    direction = torch.linspace(-1, 1, wanted[0].numel()).view_as(wanted[0])
    a, b = (torch.autograd.grad((y * direction).sum(), x)[0] for y in (wanted, got))
    # Rounding may push a ReLU's input to the other side of 0, and all gradients behind it: in one
    # image by chance, in most of them by mistake.
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


def wire(function):
    """Wire up a convolution c, a BatchNorm b and a ReLU r."""
    return Wired(function, c=make_conv(), b=nn.BatchNorm2d(4), r=nn.ReLU())


def read_twice(m, x):
    """Add to the block's output that of its convolution."""
    y = m.c(x)
    return m.r(m.b(y)) + y


def read_unseen(m, x):
    """Scale the block's output by what autograd doesn't know to come from its convolution."""
    y = m.c(x)
    return m.r(m.b(y)) * y.detach().mean()


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
    "keyword arguments": lambda: wire(lambda m, x: m.r(input=m.b(input=m.c(x)))),
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
    "output read twice": lambda: wire(read_twice),
    "output read unseen": lambda: wire(read_unseen),
    "changed in place between": lambda: wire(lambda m, x: m.r(m.b(m.c(x).mul_(2)))),
    "weights computed": lambda: nn.Sequential(Standardised(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
    "weights parametrised": lambda: nn.Sequential(
        parametrizations.weight_norm(make_conv()), nn.BatchNorm2d(4), nn.ReLU()
    ),
    "weights made by a hook": lambda: nn.Sequential(
        nn.utils.spectral_norm(make_conv()), nn.BatchNorm2d(4), nn.ReLU()
    ),
    "attribute of the convolution used": lambda: wire(
        lambda m, x: m.r(m.b(m.c(x))) * m.c.out_channels
    ),
    "attribute of the norm used": lambda: wire(lambda m, x: m.r(m.b(m.c(x))) * m.b.weight.mean()),
    "channels along another axis": lambda: Wired(
        lambda m, x: m.b(m.l(x.flatten(2))), l=nn.Linear(81, 5), b=nn.BatchNorm1d(3)
    ),
    "as many along another axis": lambda: Wired(
        lambda m, x: m.b(m.l(x.flatten(2))), l=nn.Linear(81, 3), b=nn.BatchNorm1d(3)
    ),
    "norm first": lambda: nn.Sequential(nn.BatchNorm2d(3), make_conv()),
    "never called": lambda: Wired(lambda m, x: m.c(x), c=make_conv(), b=nn.BatchNorm2d(4)),
    "tiny logits": lambda: Wired(
        lambda m, x: 1e-6 * m.b(m.c(x)), c=Standardised(3, 4, 3), b=nn.BatchNorm2d(4)
    ),
}


@pytest.mark.parametrize("case", LEFT)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # the old spectral_norm warns of its age
def test_what_cannot_be_folded_is_left_right(case):
    """The network computes what it did, with its BatchNorm."""
    torch.manual_seed(0)
    network = LEFT[case]()
    folded = check(network, torch.rand(2, 3, 9, 9), tolerance=1e-5)
    assert count(folded, NORMS) == count(network, NORMS) == 1


SEEN = ["norm without statistics", "convolution called twice", "norm called twice",
        "output read twice", "changed in place between", "weights parametrised",
        "channels along another axis"]  # fmt: skip


@pytest.mark.parametrize("case", SEEN)
def test_what_is_seen_to_be_unfit_costs_no_other(case):
    """Another block of the same network is folded all the same."""
    torch.manual_seed(0)
    network = nn.Sequential(make_conv(3, 3), nn.BatchNorm2d(3), nn.ReLU(), LEFT[case]())
    folded = check(network, torch.rand(2, 3, 9, 9))
    assert count(folded, NORMS) == 1
    assert isinstance(folded[0], ConvReLU)


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
    """Conv2dSame, whose padding depends on its input's size, is folded once for all sizes."""
    torch.manual_seed(0)
    conv = Conv2dSame(3, 4, kernel, stride)
    plain = nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU6(), nn.Conv2d(4, 1, 1))
    folded = fold(randomise(plain), torch.rand(1, 3, 8, 8)).requires_grad_(False)
    assert count(folded, ConvReLU) == 1
    x = torch.rand(2, 3, *size, requires_grad=True)
    outputs = [network(x) for network in (plain, folded)]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)
    slopes = [torch.autograd.grad(y.square().sum(), x)[0] for y in outputs]
    torch.testing.assert_close(*slopes, rtol=0, atol=1e-4)


# ----------------------------------------------------------------------------------- CUDA graphs


class FakeStream:
    """A CUDA stream that is none, and its own context manager."""

    def wait_stream(self, other):
        """Wait for nothing."""

    def __enter__(self):
        """Enter."""

    def __exit__(self, *error):
        """Leave."""


class FakeGraph(FakeStream):
    """Counts how often it is replayed."""

    replays = 0

    def replay(self):
        """Count."""
        self.replays += 1


def test_a_captured_step_is_called_recorded_and_replayed(monkeypatch):
    """Three calls as they are, one recorded, then replays with the arguments copied in."""
    graph = FakeGraph()
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph)
    as_tensor = torch.as_tensor
    monkeypatch.setattr(torch, "as_tensor", lambda x, dtype, device: as_tensor(x, dtype=dtype))
    seen = []
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], 0.1, fused=True)

    def step(x):
        seen.append(x)
        return x

    call = common.fast.captured_step(step, torch.device("cuda"), [optimizer])
    batches = [torch.full((2,), float(i)) for i in range(6)]
    results = [call(batch).clone() for batch in batches]
    assert len(seen) == 4
    assert graph.replays == 3  # recording computes nothing: the recorded call is replayed, too
    assert seen[3] is not batches[3]
    assert torch.equal(seen[3], batches[5])
    assert torch.equal(torch.stack(results), torch.stack(batches))
    common.fast.set_rate(optimizer, 0.25)
    assert torch.equal(optimizer.param_groups[0]["lr"], torch.tensor(0.25))


def test_elsewhere_a_step_stays_as_it_is():
    """On a CPU nothing is captured, and a learning rate is a number."""
    assert common.fast.captured_step(max, torch.device("cpu")) is max
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], 0.1)
    common.fast.set_rate(optimizer, 0.25)
    assert optimizer.param_groups[0]["lr"] == 0.25
