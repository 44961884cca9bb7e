"""The building block that several models share."""

from torch import nn


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
    bias = not use_batchnorm
    layers = [convolution(in_channels, out_channels, kernel, stride, padding, bias=bias)]
    if use_batchnorm:
        layers.append(nn.BatchNorm2d(out_channels))
    layers.append(nn.ReLU(inplace=True) if deconv else nn.LeakyReLU(0.2, inplace=True))
    return nn.Sequential(*layers)
