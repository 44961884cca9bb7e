"""The building blocks that several models share."""

import torch
from torch import nn


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
