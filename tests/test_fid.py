"""Scores of drawings, held against what is known in closed form."""

import pytest
import torch
from torch import nn

from common.classifiers import Classifier
from common.data import Dataset
from common.errors import UserError
from common.fid import (
    SCORES,
    Judge,
    coverage,
    features,
    fit_gaussian,
    frechet_distance,
    radii,
)

CLASSES = ["0", "1", "2"]


def normal(*shape, seed=0):
    """Draw float64 points from N(0, 1)."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def points_with(mean, root, n=50, seed=0):
    """Make points that have exactly this mean, and R^T R as their covariance."""
    x = normal(n, len(mean), seed=seed)
    orthonormal = torch.linalg.qr(x - x.mean(0)).Q
    return mean + (n - 1) ** 0.5 * orthonormal @ root


# ------------------------------------------------------------------------------------ the distance


def test_fit_gaussian_finds_mean_and_covariance():
    """R^T R is the unbiased covariance, also with fewer points than dimensions."""
    for n in (40, 4):
        x = normal(n, 7) @ normal(7, 7, seed=1)
        mean, root = fit_gaussian(x)
        torch.testing.assert_close(mean, x.mean(0))
        torch.testing.assert_close(root.T @ root, torch.cov(x.T))


@pytest.mark.parametrize(
    ("m1", "s1", "m2", "s2"), [(0.0, 1.0, 0.0, 1.0), (1.0, 2.0, -2.0, 0.5), (3.0, 1.0, 3.0, 1e-9)]
)
def test_distance_of_two_univariate_gaussians(m1, s1, m2, s2):
    """In one dimension it is (m1 - m2)^2 + (s1 - s2)^2."""
    a = points_with(torch.tensor([m1]).double(), torch.tensor([[s1]]).double())
    b = points_with(torch.tensor([m2]).double(), torch.tensor([[s2]]).double(), seed=1)
    expected = (m1 - m2) ** 2 + (s1 - s2) ** 2
    assert frechet_distance(fit_gaussian(a), fit_gaussian(b)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("smallest", [1.0, 1e-3, 0.0])
def test_distance_of_gaussians_with_commuting_covariances(smallest):
    """On common axes it is |m1 - m2|^2 + sum (s1 - s2)^2, also where a covariance is singular."""
    axes = torch.linalg.qr(normal(6, 6)).Q
    s1 = torch.tensor([3.0, 2.0, 1.0, 0.7, 0.1, smallest]).double()
    s2 = torch.tensor([0.5, 2.0, smallest, 3.0, 1.0, 0.2]).double()
    m1, m2 = normal(2, 6, seed=2)
    a, b = (points_with(m, s[:, None] * axes.T, seed=i) for i, (m, s) in
            enumerate(((m1, s1), (m2, s2))))  # fmt: skip
    expected = ((m1 - m2).square().sum() + (s1 - s2).square().sum()).item()
    assert frechet_distance(fit_gaussian(a), fit_gaussian(b)) == pytest.approx(expected, rel=1e-12)


def test_distance_agrees_with_the_root_of_the_product():
    """Where covariances don't commute: tr(S1 + S2 - 2 (S1 S2)^(1/2)) by scipy's matrix root."""
    from scipy.linalg import sqrtm

    a, b = normal(90, 5) @ normal(5, 5, seed=1), normal(60, 5, seed=2) @ normal(5, 5, seed=3) + 1
    s1, s2 = torch.cov(a.T), torch.cov(b.T)
    expected = (a.mean(0) - b.mean(0)).square().sum() + s1.trace() + s2.trace()
    expected = expected.item() - 2 * sqrtm((s1 @ s2).numpy()).real.trace()
    assert frechet_distance(fit_gaussian(a), fit_gaussian(b)) == pytest.approx(expected, rel=1e-9)


def test_distance_is_symmetric_and_zero_for_identical_sets():
    """d(a, b) = d(b, a), d(a, a) = 0; also with fewer points than dimensions."""
    for n in (200, 5):
        a, b = fit_gaussian(normal(n, 16)), fit_gaussian(2 * normal(n + 3, 16, seed=1) + 1)
        assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)
        assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)
        assert frechet_distance(a, b) > 1


# ----------------------------------------------------------------------------- precision and recall


def precision_recall(real, drawn):
    """Both, as the judge takes them."""
    return coverage(drawn, real, radii(real)), coverage(real, drawn, radii(drawn))


def test_radii_are_distances_to_the_third_neighbour():
    """On a line the neighbours can be counted; the point itself is none."""
    x = torch.tensor([[0.0], [1.0], [3.0], [6.0], [10.0]])
    assert radii(x).tolist() == [6, 5, 3, 5, 9]
    assert radii(x[:2]).tolist() == [1, 1]  # too few for a third: the farthest


def test_precision_and_recall_of_known_sets():
    """Identical sets: 1 and 1. Far away: 0 and 0. Collapsed on one real point: 1 and next to 0."""
    real = normal(400, 4)
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real, real + 100) == (0, 0)
    collapsed = real[7] + 1e-3 * normal(400, 4, seed=1)
    precision, recall = precision_recall(real, collapsed)
    assert precision == 1
    assert recall <= 1 / 400
    half = real[real[:, 0] > 0]
    precision, recall = precision_recall(real, half)
    assert precision == 1
    assert 0.4 < recall < 0.8


def test_precision_and_recall_of_one_distribution_are_equal():
    """Two draws of one Gaussian can't be told apart, so neither number is the larger by much."""
    precision, recall = precision_recall(normal(1500, 4), normal(1500, 4, seed=1))
    assert precision > 0.8
    assert precision == pytest.approx(recall, abs=0.05)


# ------------------------------------------------------------------------------------- the judge


def tiny_network():
    """Build a classifier of 8 x 8 pixels with random weights, and two linear layers."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 10), nn.ReLU(),
        nn.Linear(10, 3),
    ).eval()  # fmt: skip


def tiny_data(n=300, seed=0):
    """Make pictures of 8 x 8 pixels: a bright bar at one of three heights, on noise."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (n,), generator=rng)
    images = torch.randint(0, 100, (n, 1, 8, 8), generator=rng, dtype=torch.uint8)
    for i, label in enumerate(labels):
        images[i, 0, 2 * label + 1] += 150
    return Dataset("bars", images, labels, CLASSES)


def tiny_judge(train=None, test=None, **changes):
    """Make a judge of tiny pictures."""
    classifier = Classifier("tiny", tiny_network(), CLASSES, 1, 8, 8, torch.device("cpu"))._replace(
        **changes
    )
    test = test or tiny_data(seed=1)
    return Judge(classifier, train or tiny_data(), test, samples=300)


def test_features_are_what_the_last_linear_layer_is_given():
    """Its weights times the features are the logits; no hook, gradient or mode is left behind."""
    network, x = tiny_network(), torch.rand(5, 1, 8, 8)
    before = network(x)
    found, logits = features(network, x)
    assert found.shape == (5, 10)
    assert found.dtype == torch.float64
    last = network[-1]
    torch.testing.assert_close(found.float() @ last.weight.T + last.bias, logits)
    torch.testing.assert_close(network(x), before)
    assert not any(m._forward_pre_hooks for m in network.modules())
    assert not logits.requires_grad
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    with pytest.raises(RuntimeError):
        features(network, torch.rand(5, 3, 8, 8))
    assert not any(m._forward_pre_hooks for m in network.modules())
    with pytest.raises(UserError, match="no linear layer"):
        features(network[:2], x)


def test_floor_is_below_noisy_pictures_and_those_below_noise():
    """The scores order what a person would order."""
    judge, data = tiny_judge(), tiny_data(seed=2).images.float() / 255
    noise = torch.rand(data.shape, generator=torch.Generator().manual_seed(0))
    fids = [judge.score([x])["fid"] for x in (data, (data + noise) / 2, noise)]
    assert 5 * max(judge.floor["fid"], fids[0]) < fids[1] < fids[2]
    assert judge.floor["precision"] > 0.7
    assert judge.score([noise])["precision"] < judge.floor["precision"]


def test_test_images_themselves_score_perfectly_in_any_batches():
    """Distance 0, precision and recall 1, the classes of the test images; batches don't matter."""
    judge = tiny_judge()
    images = torch.cat(list(judge.pick(tiny_data(seed=1).images)))
    whole, parts = judge.score([images]), judge.score(images.split(70))
    for found in (whole, parts):
        assert found["fid"] == pytest.approx(0, abs=1e-9)
        assert (found["precision"], found["recall"], found["class_distance"]) == (1, 1, 0)
        assert sum(found["classes"].values()) == 300
        assert found["largest_class"] == max(found["classes"].values()) / 300
    assert set(whole) == {*SCORES, "classes"}


def test_a_collapse_shows_in_recall_and_classes():
    """One picture, drawn over and over: all in one class, and nothing else is covered."""
    judge, image = tiny_judge(), tiny_data(seed=1).images[:1].float() / 255
    found = judge.score([image.expand(300, -1, -1, -1)])
    assert found["largest_class"] == 1
    assert found["class_distance"] > 0.2
    assert found["precision"] == 1
    assert found["recall"] < 0.02
    assert found["fid"] > 10 * judge.floor["fid"]


def test_judging_uses_no_global_randomness():
    """The same numbers come out at any time, and the global generator isn't moved."""
    torch.manual_seed(5)
    before, networks = (
        torch.get_rng_state(),
        Classifier("tiny", tiny_network(), CLASSES, 1, 8, 8, torch.device("cpu")),
    )
    torch.set_rng_state(before)
    judges = []
    for _ in range(2):
        judges.append(Judge(networks, tiny_data(), tiny_data(seed=1), 100))
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(3)
        before = torch.get_rng_state()
    assert judges[0].floor == judges[1].floor
    assert judges[0].report(judges[0].floor)["samples"] == 100


def test_a_classifier_of_other_pictures_is_refused():
    """Channels and size have to be the dataset's."""
    for change in ({"channels": 3}, {"size": 32}):
        with pytest.raises(UserError, match=r"tiny takes .* but bars is 1 x 8 x 8"):
            tiny_judge(**change)
