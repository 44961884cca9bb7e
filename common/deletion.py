"""Does a map name the pixels that matter? Take them away, and look at the class's probability."""

import numpy as np
import torch
from torchvision.transforms.v2.functional import gaussian_blur

BLUR = 10 / 224  # standard deviation of the blur that takes pixels away, in parts of the side
TOP = 0.1  # part of the pixels that is taken away
STEPS = 28  # of the deletion and insertion curves
LEFT = 0.1  # part of the probability at which the class counts as suppressed


def blur(x, sigma=None):
    """Blur images, (N, C, H, W), until objects can't be told from their surroundings.

    :param float sigma: standard deviation in pixels; None for 10 at 224 pixels
    """
    sigma = BLUR * x.shape[-1] if sigma is None else sigma
    return gaussian_blur(x, 2 * int(3 * sigma) + 1, sigma)


def make_reference(kind, x, sigma, rng):
    """Make what takes the place of what is deleted.

    :param str kind: "blur"; "mean", the photo's mean colour; or "noise" about that colour
    :param torch.Tensor x: photos, (N, C, H, W)
    :param float sigma: of the blur, in pixels
    :param torch.Generator rng: for the noise, the same for all photos
    :return: (N, C, H, W)
    :rtype: torch.Tensor
    """
    if kind == "blur":
        return blur(x, sigma)
    mean = x.mean((2, 3), keepdim=True).expand_as(x)
    noise = torch.randn(x.shape[1:], generator=rng, device=x.device) * 0.2
    return mean if kind == "mean" else (mean + noise).clamp(0, 1)


@torch.no_grad()
def deletion_test(network, x, target, heat, rng):
    """Blur the top 10 % of a map's pixels away, and as many at random.

    :param torch.nn.Module network: from pixels to logits
    :param torch.Tensor x: the photo, (1, C, H, W)
    :param int target: the class
    :param torch.Tensor heat: the map, (H, W)
    :param torch.Generator rng: for the random pixels
    :return: what is left of the class's probability; the mean over 8 random choices
    :rtype: tuple[float, float]
    """
    shuffled = [torch.rand(heat.shape, generator=rng, device=x.device) for _ in range(8)]
    # In double precision: squares of small gradients vanish in single precision.
    ranked = torch.stack([heat, *shuffled]).double().flatten(1)
    top = ranked.topk(round(TOP * ranked.shape[1]), dim=1).indices
    deleted = x.new_zeros(ranked.shape).scatter_(1, top, 1).view(-1, 1, *heat.shape)
    left = network(x + deleted * (blur(x) - x)).softmax(1)[:, target]
    return float(left[0]), float(left[1:].mean())


@torch.no_grad()
def probability_curve(network, x, target, heat, fill, insertion=False):
    """Take pixels away in the order of a map, or put them back, and watch the probability.

    :param torch.nn.Module network: from pixels in [0, 1] to logits
    :param torch.Tensor x: the photo, (1, C, H, W)
    :param torch.Tensor target: the class, (1,)
    :param torch.Tensor heat: the map, (H, W); the largest value goes first, ties in reading order
    :param torch.Tensor fill: what is there without the photo, (1, C, H, W)
    :param bool insertion: begin with ``fill`` and put the photo's pixels in
    :return: the probability after 0, 1/28, ... 28/28 of the pixels
    :rtype: numpy.ndarray
    """
    order = heat.flatten().argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=x.device)
    counts = torch.linspace(0, len(order), STEPS + 1, device=x.device).round()
    changed = (rank < counts[:, None]).view(-1, 1, *heat.shape)
    before, after = (fill, x) if insertion else (x, fill)
    pictures = torch.where(changed, after, before)
    return network(pictures).softmax(1)[:, target[0]].cpu().numpy()


def area(curve):
    """Integrate a curve over the part of the pixels, from 0 to 1, by the trapezoidal rule."""
    return float((curve[1:] + curve[:-1]).mean() / 2)


def smallest_area(curve):
    """Find the part of the pixels after whose loss 10 % of the probability are left.

    :param numpy.ndarray curve: of a deletion
    :return: from 0 to 1, interpolated; 1 if it never falls so low
    :rtype: float
    """
    low = np.flatnonzero(curve <= LEFT * curve[0])
    if not len(low):
        return 1.0
    i = low[0]
    part = (curve[i - 1] - LEFT * curve[0]) / (curve[i - 1] - curve[i])
    return float((i - 1 + part) / (len(curve) - 1))
