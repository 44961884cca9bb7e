"""EfficientNet-Lite0, the built-in ImageNet classifier, in plain layers.

It is timm's tf_efficientnet_lite0 (EfficientNet, Tan & Le 2019, arXiv 1905.11946, without squeeze
and excitation, with ReLU6), bit for bit; importing timm would take two seconds of every run.
"""

from torch import nn
from torch.nn import functional as F

STAGES = (  # by how much a block widens its input; channels, blocks, stride of the first, kernel
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)


class Conv2dSame(nn.Conv2d):
    """A strided convolution as in TensorFlow: the right and lower side get the odd pixel."""

    def forward(self, x):
        """Pad with zeros so that ceil(size / stride) pixels come out, and convolve."""
        padding = []
        for n, k, stride in zip(x.shape[2:], self.kernel_size, self.stride, strict=True):
            total = max((-(-n // stride) - 1) * stride + k - n, 0)
            padding = [total // 2, total - total // 2, *padding]  # F.pad begins with the last axis
        return super().forward(F.pad(x, padding))


def convolution(inputs, outputs, kernel=1, stride=1, groups=1):
    """Make a convolution and its BatchNorm.

    :rtype: list[torch.nn.Module]
    """
    if stride == 1:
        layer = nn.Conv2d(inputs, outputs, kernel, 1, kernel // 2, groups=groups, bias=False)
    else:
        layer = Conv2dSame(inputs, outputs, kernel, stride, groups=groups, bias=False)
    return [layer, nn.BatchNorm2d(outputs, eps=1e-3)]


class Block(nn.Module):
    """Widen by 1 x 1, convolve each channel alone, narrow by 1 x 1; add the input if that fits."""

    def __init__(self, inputs, outputs, widen, stride, kernel):
        super().__init__()
        wide = inputs * widen
        layers = []
        if widen > 1:
            layers += [*convolution(inputs, wide), nn.ReLU6(inplace=True)]
        layers += [*convolution(wide, wide, kernel, stride, groups=wide), nn.ReLU6(inplace=True)]
        layers += convolution(wide, outputs)
        self.layers = nn.Sequential(*layers)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x):
        """Map (N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        y = self.layers(x)
        return x + y if self.adds else y


def make_lite0():
    """Make the network, from normalised pixels (N, 3, H, W) to logits (N, 1000).

    :rtype: torch.nn.Sequential
    """
    layers = [*convolution(3, 32, kernel=3, stride=2), nn.ReLU6(inplace=True)]
    channels = 32
    for widen, outputs, count, stride, kernel in STAGES:
        for i in range(count):
            layers.append(Block(channels, outputs, widen, stride if i == 0 else 1, kernel))
            channels = outputs
    layers += [*convolution(channels, 1280), nn.ReLU6(inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000))
