"""The same numbers sooner: memory that stays, oneDNN for linear layers, folded BatchNorm.

What each of these earns is measured, each taken back alone, by ``benchmarks/dcgan_speed.py
--changes`` and ``benchmarks/against_captum.py --changes``; the tables are in benchmarks/README.md.
"""

import contextlib
import copy
import ctypes
import functools
import inspect
import sys
from collections import Counter

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import has_torch_function

from common.errors import is_out_of_memory

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
WARM_UP = 3  # calls before a CUDA graph is recorded
LIMITS = {nn.ReLU: float("inf"), nn.ReLU6: 6.0}  # where the activation becomes flat again


def keep_memory():
    """Keep freed memory in the process; on Linux with glibc, elsewhere nothing happens.

    A step frees and allocates the same large tensors again. By default they go back to the kernel
    in between, which hands them out page by page, each filled with zeros: on a CPU some 5 % of the
    time of a step of train_dcgan.py, and a third of that of smoothgrad.py, whose largest tensors
    exceed any threshold that glibc accepts (benchmarks/README.md).
    """
    if sys.platform == "linux":
        mmap_max, trim_threshold = -4, -1  # numbers from glibc's malloc.h
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(mmap_max, 0)  # no tensor gets a mapping of its own, however large
            libc.mallopt(trim_threshold, 2**31 - 1)


# --------------------------------------------------------------- on a GPU: one graph for many calls


def is_on_gpu(x):
    """Tell whether a tensor's kernels can be captured."""
    return x.device.type == "cuda"


def run_beside(step, *tensors):
    """Call a function on a stream of its own, as CUDA asks for before it is recorded."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        result = step(*tensors)
    torch.cuda.current_stream().wait_stream(side)
    return result


def record(step, inputs):
    """Record a call as a CUDA graph; recording computes nothing.

    :param Callable step: from tensors to a tensor, a tuple of them, or nothing
    :param list[torch.Tensor] inputs: belong to the graph from now on
    :return: copies its arguments over the inputs, and replays; its results lie always in the same
        memory
    :rtype: Callable
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step(*inputs)

    def replay(*arguments):
        with torch.no_grad():
            for static, argument in zip(inputs, arguments, strict=True):
                static.copy_(argument)
        graph.replay()
        return outputs

    return replay


def captured(step, *examples):
    """Capture a function of tensors as one CUDA graph: a call is one launch in place of hundreds.

    Off a GPU it stays what it is. It must not ask the host for a value, nor change what it uses: it
    is called four times before the first result counts.

    :param Callable step: from tensors to a tensor or a tuple of them
    :param torch.Tensor examples: arguments of the shapes that the graph is for; others run eagerly
    :return: a function of the same arguments; its results are overwritten by its next call
    :rtype: Callable
    """
    if not is_on_gpu(examples[0]):
        return step
    inputs = [
        example.detach().clone().requires_grad_(example.requires_grad) for example in examples
    ]
    for _ in range(WARM_UP):  # libraries choose kernels and allocate, which a graph can't
        run_beside(step, *inputs)
    try:
        replay = record(step, inputs)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        return step  # a network that asks the host for a value can't be captured

    def call(*arguments):
        fits = [a.shape for a in arguments] == [i.shape for i in inputs]
        return replay(*arguments) if fits else step(*arguments)

    return call


@functools.lru_cache(maxsize=2)  # a graph holds the memory of its call
def replaying(explain, size):
    """Let a GPU explain full chunks by a graph, which is captured for the first of them.

    :param Callable explain: of (network, x, target) and settings that stay the same
    :param int size: images in a full chunk; others are explained eagerly
    :return: a function of the same arguments, the same one for the same arguments
    :rtype: Callable
    """
    known = None  # the network whose graph it is
    graph = None

    def call(network, x, target, *settings):
        nonlocal known, graph
        if not is_on_gpu(x) or len(x) != size:
            return explain(network, x, target, *settings)
        if (network, settings) != known:
            graph = captured(lambda x, target: explain(network, x, target, *settings), x, target)
            known = network, settings
        return graph(x, target)

    return call


def captured_step(step, device, optimizers=()):
    """Turn a step of a training into one CUDA graph; elsewhere return it as it is.

    A step of small kernels takes a GPU less time than it takes Python to launch them. As a graph
    they are launched together. The first calls run as they are: libraries choose their algorithms,
    and optimizers make their state. The next is recorded; all later ones copy their arguments over
    those of the recorded call, and replay it.

    :param Callable step: from tensors on the device to a tensor or nothing; it may change networks,
        optimizers and sums in place, and must not ask the GPU for a number
    :param torch.device device: where it computes
    :param Iterable[torch.optim.Optimizer] optimizers: those that it uses
    :return: the same function; its arguments must keep their shapes, and what it returns is
        overwritten by the next call. With an optimizer that can't be captured, ``step`` itself
    :rtype: Callable
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    # Other optimizers read their learning rate as a number, which would be recorded as it is now.
    fit = all(group.get("fused") or "capturable" in group for group in groups)
    # Gradients of several processes are averaged by NCCL, between the launches.
    if device.type != "cuda" or torch.distributed.is_initialized() or not fit:
        return step
    for group in groups:
        group["capturable"] = True
        group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=device)
    for optimizer in optimizers:
        optimizer._warned_capturable_if_run_uncaptured = True  # the first calls run uncaptured
    calls = 0
    replay = None

    def call(*tensors):
        nonlocal calls, replay
        calls += 1
        if calls <= WARM_UP:
            return run_beside(step, *tensors)
        if replay is None:
            replay = record(step, [tensor.clone() for tensor in tensors])
        return replay(*tensors)

    return call


def set_rate(optimizer, rate):
    """Set a learning rate, a number; where a CUDA graph reads it, in its memory."""
    for group in optimizer.param_groups:
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


# ------------------------------------------------------------------------------- on any processor


class QuickAdam(torch.optim.Adam):
    """torch.optim.Adam, ready a second sooner.

    Its methods are wrapped by torch in functions that first load torch.compile's machinery, which
    stays unused; this takes as long as a fifth of a photo's mask. Here they are without wrapper.
    """

    add_param_group = inspect.unwrap(torch.optim.Adam.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Adam.zero_grad)
    step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))


class Product(torch.autograd.Function):
    """a @ b.T by oneDNN, the library that PyTorch already convolves with on a CPU.

    PyTorch multiplies float32 matrices with MKL, which is slow on AMD processors: there oneDNN
    makes a whole step of train_dcgan.py a third faster (benchmarks/README.md).
    """

    @staticmethod
    def forward(ctx, a, b):
        """Multiply (N, K) and (M, K) to (N, M)."""
        ctx.save_for_backward(a, b)
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")

    @staticmethod
    def backward(ctx, grad):
        """Differentiate with the same product, so that the gradient can be differentiated too."""
        a, b = ctx.saved_tensors
        grad_a = Product.apply(grad, b.t()) if ctx.needs_input_grad[0] else None
        grad_b = Product.apply(grad.t(), a.t()) if ctx.needs_input_grad[1] else None
        return grad_a, grad_b


class FastLinear(nn.Linear):
    """nn.Linear, with :class:`Product` where it applies: float32 matrices on a CPU."""

    def forward(self, x):
        """Map (N, in_features) to (N, out_features)."""
        if (
            x.device.type != "cpu"
            or not x.dtype == self.weight.dtype == torch.float32
            or x.shape[1:] != self.weight.shape[1:]
            or len(x) == 0  # oneDNN has no empty products, and no good word for a wrong size
            or torch.is_autocast_enabled("cpu")
            or not hasattr(torch.ops.mkldnn, "_linear_pointwise")
        ):
            return super().forward(x)
        y = Product.apply(x, self.weight)
        return y if self.bias is None else y + self.bias


def speed_up_linear(network):
    """Let every nn.Linear of a network, in place, multiply as :class:`FastLinear` does."""
    for module in network.modules():
        if type(module) is nn.Linear:
            module.__class__ = FastLinear


def use_channels_last(network):
    """Lay the weights of convolutions out channels last, in place: there they are fastest."""
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)


def fold(network, example):
    """Multiply BatchNorm into the layer before it, and let convolutions apply their own ReLU.

    In eval mode BatchNorm is a fixed affine map. Which layer feeds it, and it alone, is read from
    autograd's graph of one forward pass, hence whatever the network's own code looks like.

    :param torch.nn.Module network: in eval mode; not changed
    :param torch.Tensor example: one input, (1, C, H, W)
    :return: a folded copy; a plain one if folding would change what the network computes
    :rtype: torch.nn.Module
    """
    folded = copy.deepcopy(network)
    feeds = who_feeds_whom(folded, example)
    tails, sources = {}, {}  # what is left of a folded BatchNorm; the layer that it went into
    for norm in [m for m in folded.modules() if isinstance(m, NORMS)]:
        layer, tail = feeds.get(norm), tail_of(norm)
        if tail is not None and can_absorb(layer, norm):
            mean, var = norm.running_mean, norm.running_var
            scale = norm.weight if norm.affine else torch.ones_like(mean)
            shift = norm.bias if norm.affine else torch.zeros_like(mean)
            layer.weight, layer.bias = fuse_conv_bn_weights(
                layer.weight, layer.bias, mean, var, norm.eps, scale, shift
            )
            tails[norm], sources[norm] = tail, layer
    for relu in [m for m in folded.modules() if type(m) in LIMITS]:
        norm = next((n for n, tail in tails.items() if relu is tail), None) or feeds.get(relu)
        layer = sources.get(norm, norm)
        if is_plain(layer):
            tails[relu], tails[layer] = nn.Identity(), ConvReLU(layer, type(relu)())
    for norm, tail in tails.items():
        tails[norm] = tails.get(tail, tail)  # a tail that has itself been folded
    for module in list(folded.modules()):
        for name, child in module.named_children():
            if child in tails:
                setattr(module, name, tails[child])
    return folded if agree(network, folded, example) else copy.deepcopy(network)


def can_absorb(layer, norm):
    """Tell whether the weights of a layer are all there is to it, and as many as BatchNorm's.

    A Linear layer's outputs may lie along another axis than the channels that BatchNorm knows.
    """
    return (
        isinstance(layer, LAYERS)
        and not (is_parametrized(layer) or layer._forward_pre_hooks or layer._forward_hooks)
        and len(layer.weight) == norm.num_features
    )


def is_plain(layer):
    """Tell whether a layer is nn.Conv2d or timm's Conv2dSame, and pads with zeros."""
    if type(layer).__name__ == "Conv2dSame":
        return layer.dilation == (1, 1)
    return type(layer) is nn.Conv2d and layer.padding_mode == "zeros"


@torch.no_grad()
def agree(network, folded, example):
    """Compare what the two compute: a layer with a forward of its own may do anything."""
    wanted = network(example)
    try:
        got = folded(example)
    except Exception:  # it uses what a folded layer no longer has
        return False
    return bool((got - wanted).abs().max() <= 1e-4 * wanted.abs().max())


def who_feeds_whom(network, example):
    """Find the layers whose output goes to one BatchNorm or ReLU, and nowhere else.

    :param torch.nn.Module network: in eval mode
    :param torch.Tensor example: one input, (1, C, H, W)
    :return: for a BatchNorm or ReLU that is used once, the layer that it gets its input from
    :rtype: dict[torch.nn.Module, torch.nn.Module]
    """
    calls, source, made_by = Counter(), {}, {}

    def note_input(module, inputs, options):
        calls[module] += 1
        source[module] = next(iter((*inputs, *options.values()))).grad_fn

    def note_output(module, _, output):
        made_by[getattr(output, "grad_fn", None)] = module

    hooks = []
    for module in network.modules():
        if isinstance(module, (*LAYERS, *NORMS, *LIMITS)):
            hooks.append(module.register_forward_pre_hook(note_input, with_kwargs=True))
            hooks.append(module.register_forward_hook(note_output))
    with torch.enable_grad():
        output = network(example.detach().requires_grad_())
    for hook in hooks:
        hook.remove()

    readers, stack, seen = Counter(), [output.grad_fn], set()
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            behind = [n for n, _ in node.next_functions if n is not None]
            readers.update(behind)
            stack += behind
    return {
        module: made_by[node]
        for module, node in source.items()
        if node in made_by and calls[module] == calls[made_by[node]] == readers[node] == 1
    }


def tail_of(norm):
    """Tell what is left of a folded BatchNorm: nothing, or the activation that timm puts into it.

    :return: the layer to put in its place; None if it can't be folded
    :rtype: torch.nn.Module
    """
    if norm.running_mean is None:
        return None  # statistics of each batch: no fixed map
    if type(norm) in NORMS:
        return nn.Identity()
    if type(norm).__name__ == "BatchNormAct2d" and isinstance(norm.drop, nn.Identity):
        return norm.act
    return None


class ConvReLU(nn.Module):
    """A convolution and its ReLU or ReLU6: on a CPU, one pass over the memory instead of three.

    The gradient with respect to the weights is never computed. Where a function mode looks on, as
    guided backpropagation's does, the two layers run one after the other.
    """

    def __init__(self, conv, relu):
        super().__init__()
        self.conv, self.relu = conv, relu

    def forward(self, x):
        """Map (N, C, H, W) to relu(conv(x))."""
        fast = (
            x.device.type == "cpu"
            and x.dtype == torch.float32
            and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
            and not isinstance(self.conv.padding, str)
            and not any(p.requires_grad for p in self.conv.parameters())
            and not torch.is_autocast_enabled("cpu")
            and not has_torch_function((x,))
        )
        if not fast:
            return self.relu(self.conv(x))
        conv = self.conv
        weight, padding = conv.weight, conv.padding
        if type(conv) is not nn.Conv2d:
            weight, padding = pad_both_sides(conv, x.shape[2:])
        how = list(conv.stride), list(padding), list(conv.dilation), conv.groups
        return FusedConvReLU.apply(x, weight, conv.bias, how, LIMITS[type(self.relu)])


def pad_both_sides(conv, size):
    """Turn timm's Conv2dSame into a convolution that pads both sides alike.

    As TensorFlow does, it pads the right and lower side one pixel more if it must, in a copy of its
    input. One more zero at the left and upper side of the kernel does the same without the copy.

    :param torch.nn.Conv2d conv: a Conv2dSame
    :param torch.Size size: (H, W) of its input
    :return: its weight, (out, in, kh, kw) or one more, and its padding (h, w)
    :rtype: tuple[torch.Tensor, list[int]]
    """
    padding, more = [], []
    for n, k, stride in zip(size, conv.kernel_size, conv.stride, strict=True):
        total = max((-(-n // stride) - 1) * stride + k - n, 0)
        padding.append(total - total // 2)
        more = [total % 2, 0, *more]  # F.pad begins with the last axis
    return nn.functional.pad(conv.weight, more), padding


class FusedConvReLU(torch.autograd.Function):
    """What :class:`ConvReLU` computes on a CPU, by oneDNN; keeps the output, not the input."""

    @staticmethod
    def forward(ctx, x, weight, bias, how, limit):
        """Convolve and clamp to [0, limit]."""
        stride, padding, dilation, groups = how
        kind, limits = ("relu", []) if limit == float("inf") else ("hardtanh", [0.0, limit])
        y = torch.ops.mkldnn._convolution_pointwise(
            x, weight, bias, padding, stride, dilation, groups, kind, limits, ""
        )
        ctx.save_for_backward(weight, y)
        ctx.shape, ctx.how, ctx.limit = x.shape, how, limit
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """Stop the gradient where the output is flat, then convolve back."""
        weight, y = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.how
        grad = torch.ops.aten.hardtanh_backward(grad, y, 0.0, ctx.limit)
        # Only its shape and layout are read; another layout would cost copies.
        like = torch.empty(ctx.shape, memory_format=torch.channels_last)
        grad, _, _ = torch.ops.aten.convolution_backward(
            grad, like, weight, None, stride, padding, dilation, False, [0, 0], groups,
            [True, False, False],
        )  # fmt: skip
        return grad, None, None, None, None
