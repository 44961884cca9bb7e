"""The building blocks that several models share."""

import inspect

import torch
from torch import nn

from common.errors import UserError


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


class Linear(nn.Linear):
    """nn.Linear, with :class:`Product` where it applies: float32 matrices on a CPU."""

    def forward(self, x):
        """Map (N, in_features) to (N, out_features)."""
        if (
            torch.compiler.is_compiling()
            or x.device.type != "cpu"
            or not x.dtype == self.weight.dtype == torch.float32
            or x.shape[1:] != self.weight.shape[1:]
            or len(x) == 0  # oneDNN has no empty products, and no good word for a wrong size
            or torch.is_autocast_enabled("cpu")
            or not hasattr(torch.ops.mkldnn, "_linear_pointwise")
        ):
            return super().forward(x)
        y = Product.apply(x, self.weight)
        return y if self.bias is None else y + self.bias


def make_layer(
    in_channels, out_channels, kernel=2, stride=2, padding=1, use_batchnorm=True, deconv=False
):
    """Build (transposed) convolution -> BatchNorm -> (leaky) ReLU, the block of a DCGAN.

    Radford et al. 2015 (arXiv 1511.06434), section 3: strided (transposed) convolutions in place
    of pooling, BatchNorm, ReLU on the way up and LeakyReLU 0.2 on the way down. A side of n
    pixels becomes

        convolution:             (n + 2 * padding - kernel) // stride + 1
        transposed convolution:  (n - 1) * stride - 2 * padding + kernel

    :param int in_channels: channels of the input, (N, in_channels, H, W)
    :param int out_channels: channels of the output
    :param int kernel: side of the square kernel, in pixels
    :param int stride: step of the kernel; a transposed convolution enlarges by it
    :param int padding: zeros around the input; a transposed convolution crops by it
    :param bool use_batchnorm: put a BatchNorm2d after the convolution
    :param bool deconv: transposed convolution and ReLU, instead of convolution and LeakyReLU
    :return: the block
    :rtype: torch.nn.Sequential
    """
    convolution = nn.ConvTranspose2d if deconv else nn.Conv2d
    # BatchNorm subtracts the mean, and with it any bias: a bias before it is memory for nothing.
    layers = [
        convolution(in_channels, out_channels, kernel, stride, padding, bias=not use_batchnorm)
    ]
    if use_batchnorm:
        layers.append(nn.BatchNorm2d(out_channels))
    layers.append(nn.ReLU(inplace=True) if deconv else nn.LeakyReLU(0.2, inplace=True))
    return nn.Sequential(*layers)


def linear_layer(n_in, n_out, activation, use_batchnorm=True):
    """Build the layers Linear -> BatchNorm1d -> activation.

    :param int n_in: numbers of an input, (N, n_in)
    :param int n_out: numbers of an output, (N, n_out)
    :param torch.nn.Module activation: the last layer
    :param bool use_batchnorm: put a BatchNorm1d after the linear layer, which then has no bias
    :return: the layers, to be put into an nn.Sequential
    :rtype: list[torch.nn.Module]
    """
    layers = [Linear(n_in, n_out, bias=not use_batchnorm)]
    if use_batchnorm:
        layers.append(nn.BatchNorm1d(n_out))
    return [*layers, activation]


class Residual(nn.Sequential):
    """x + f(x), where f is the layers given (He et al. 2015, arXiv 1512.03385)."""

    def forward(self, x):
        """Add to ``x`` what the layers make of it, which must have its shape."""
        return x + super().forward(x)


KINDS = {k: v for k, v in vars(nn).items() if inspect.isclass(v) and issubclass(v, nn.Module)}
KINDS |= {"Linear": Linear, "Residual": Residual}


def to_plain(layer):
    """Describe a network in plain values, so that a checkpoint can say which layers it has.

    Scripts don't import from each other: one that explains a network which another trained, or
    its user's copy of it, builds it with :func:`from_plain`.

    :param torch.nn.Module layer: a layer of torch.nn, ours, or an nn.Sequential of such layers
    :return: its name, and its arguments by name; those of an nn.Sequential are its layers
    :rtype: list
    :raises UserError: if a layer is of another kind, or has arguments that are not plain
    """
    kind, name = type(layer), type(layer).__name__
    if kind.forward in (nn.Sequential.forward, Residual.forward):  # subclasses, too
        name = "Residual" if isinstance(layer, Residual) else "Sequential"
        return [name, {key: to_plain(child) for key, child in layer._modules.items()}]
    arguments = {}
    for key in inspect.signature(kind).parameters:
        if key not in ("device", "dtype", "args", "kwargs"):  # the last two are Identity's
            value = getattr(layer, key, layer)  # what isn't kept can't be described
            value = value is not None if key == "bias" else value
            arguments[key] = list(value) if isinstance(value, tuple) else value
    if kind not in (KINDS.get(name), nn.Linear) or not all(map(is_plain, arguments.values())):
        raise UserError(f"a checkpoint can't describe the layer {name}: build it of torch.nn's")
    return [name, arguments]


def is_plain(value):
    """Tell whether a value is None, a number, a string, or a list of those."""
    values = value if isinstance(value, list) else [value]
    return all(v is None or isinstance(v, (bool, int, float, str)) for v in values)


def from_plain(layer):
    """Build what :func:`to_plain` described, with new weights.

    Under ``torch.device("meta")`` no weight is stored, so that an absurd size costs nothing.

    :param list layer: from a file that anybody may have written; only layers are built from it
    :return: the network
    :rtype: torch.nn.Module
    :raises UserError: if it is no such description
    """
    try:
        name, arguments = layer
        kind = KINDS[name]
        if kind in (nn.Sequential, Residual):
            network = kind()
            for key, child in arguments.items():
                network.add_module(key, from_plain(child))
            return network
        if not all(map(is_plain, arguments.values())) or "device" in arguments:
            raise TypeError
        return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()})
    except Exception as error:  # whatever wrong names and arguments set off in torch
        raise UserError("the checkpoint's layers can't be built here: train it again") from error
