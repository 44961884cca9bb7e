"""Building blocks of learned masks: smooth, of no small detail, of a given area."""

import torch
from torch.nn import functional as F


def enlarge(masks, size):
    """Enlarge masks from cells to pixels: each pixel a Gaussian mean (0.6 cells) of the cells.

    :param torch.Tensor masks: (..., s, s)
    :param int size: in pixels
    :return: (..., size, size), as smooth, whatever the cells hold
    :rtype: torch.Tensor
    """
    cells = masks.shape[-1]
    place = (torch.arange(size, device=masks.device) + 0.5) * cells / size
    distance = place[:, None] - torch.arange(cells, device=masks.device) - 0.5
    weights = torch.softmax(-((distance / 0.6) ** 2) / 2, dim=1).to(masks.dtype)  # (size, s)
    return weights @ masks @ weights.T


def sum_levels(cells, side):
    """Add up maps of side, side / 2, side / 4... cells, where one step moves large parts at once.

    :param torch.Tensor cells: of all maps, the finest first, (N, K, :func:`count_cells`)
    :param int side: of the finest map, s
    :return: (N, K, s, s)
    :rtype: torch.Tensor
    """
    sides = [side >> k for k in range(side.bit_length() - 1)]  # down to 3 or 2
    maps = cells.split([n * n for n in sides], 2)
    maps = [m.unflatten(2, (n, n)) for m, n in zip(maps, sides, strict=True)]
    return sum(F.interpolate(m, (side, side), mode="bilinear") for m in maps)


def count_cells(side):
    """Count the cells of all maps that :func:`sum_levels` adds up."""
    return sum((side >> k) ** 2 for k in range(side.bit_length() - 1))


def level_sets(values, areas):
    """Cut a map into nested masks, the softened sets of its largest values.

    :param torch.Tensor values: (N, 1, s, s)
    :param torch.Tensor areas: what the mean of each mask has to be, (K,)
    :return: sigmoid(values - q), (N, K, s, s)
    :rtype: torch.Tensor
    """
    areas = areas.view(1, -1, 1, 1)
    with torch.no_grad():  # the threshold q, by bisection
        low = values.amin((2, 3), keepdim=True) - areas.logit().clamp_min(0)
        high = values.amax((2, 3), keepdim=True) - areas.logit().clamp_max(0)
        for _ in range(30):
            q = (low + high) / 2
            above = (values - q).sigmoid().mean((2, 3), keepdim=True) > areas
            low, high = torch.where(above, q, low), torch.where(above, high, q)
        soft = (values - q).sigmoid()
        slope = (soft * (1 - soft)).mean((2, 3), keepdim=True).clamp_min(1e-12)
    # A step of Newton's method, which hardly moves q, gives it the derivative of the true one.
    mean = (values - q).sigmoid().mean((2, 3), keepdim=True)
    return (values - q - (mean - areas) / slope).sigmoid()


def smooth_max(masks, radius=2, temperature=0.05):
    """Give each cell the softened maximum of its surroundings: nothing is smaller than a disc.

    :param torch.Tensor masks: in [0, 1], (N, K, s, s)
    :param int radius: of the disc, in cells, whose weight falls to its rim
    :param float temperature: 0 would be the maximum itself
    :return: (N, K, s, s)
    :rtype: torch.Tensor
    """
    place = torch.arange(-radius, radius + 1, device=masks.device)
    disc = (1 - (place[:, None] ** 2 + place**2) / (radius + 1) ** 2).clamp_min(0).sqrt()
    near = F.unfold(masks.flatten(0, 1)[:, None], len(disc), padding=radius)  # (N K, disc, s^2)
    near = near * disc.to(masks.dtype).view(-1, 1)
    return ((near / temperature).softmax(1) * near).sum(1).view(masks.shape)


def total_variation(masks, beta):
    """Average |m - next m|^beta over neighbours within the mask: (..., s, s) to (...)."""
    down, across = masks.diff(dim=-2).abs() ** beta, masks.diff(dim=-1).abs() ** beta
    return down.mean((-2, -1)) + across.mean((-2, -1))


def area_penalty(masks, areas):
    """Compare the sorted values of masks with those of a binary mask of the right area.

    :param torch.Tensor masks: in [0, 1], (N, K, s, s)
    :param torch.Tensor areas: (K,)
    :return: mean squared differences, (N, K)
    :rtype: torch.Tensor
    """
    values = masks.flatten(2).sort(dim=2).values
    n = values.shape[2]
    wanted = torch.arange(n, device=masks.device) >= n - (areas[:, None] * n).round()
    return ((values - wanted.to(masks.dtype)) ** 2).mean(2)
