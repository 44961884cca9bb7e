"""Scores of samples, held against what is known in closed form."""

import pytest
import torch
from torch import nn

from common.classifiers import Classifier
from common.data import Dataset
from common.fid import (
    FEWEST,
    SCORES,
    Scorer,
    coverage,
    features,
    fit_gaussian,
    frechet_distance,
    radii,
)
from tests.helpers import left_alone, refusal

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
    a = points_with(m1, s1.diag() @ axes.T)
    b = points_with(m2, s2.diag() @ axes.T, seed=1)
    expected = ((m1 - m2).square().sum() + (s1 - s2).square().sum()).item()
    assert frechet_distance(fit_gaussian(a), fit_gaussian(b)) == pytest.approx(expected, rel=1e-12)


def test_distance_agrees_with_the_root_of_the_product():
    """Where covariances don't commute: tr(S1 + S2 - 2 (S1 S2)^(1/2)) by scipy's matrix root."""
    from scipy.linalg import sqrtm

    a = normal(90, 5) @ normal(5, 5, seed=1)
    b = normal(60, 5, seed=2) @ normal(5, 5, seed=3) + 1
    s1, s2 = torch.cov(a.T), torch.cov(b.T)
    expected = (a.mean(0) - b.mean(0)).square().sum() + s1.trace() + s2.trace()
    expected = expected.item() - 2 * sqrtm((s1 @ s2).numpy()).real.trace()
    assert frechet_distance(fit_gaussian(a), fit_gaussian(b)) == pytest.approx(expected, rel=1e-9)


def test_distance_is_symmetric_and_zero_for_identical_sets():
    """d(a, b) = d(b, a), d(a, a) = 0; also with fewer points than dimensions."""
    for n in (200, 5):
        a = fit_gaussian(normal(n, 16))
        b = fit_gaussian(2 * normal(n + 3, 16, seed=1) + 1)
        assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)
        assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)
        assert frechet_distance(a, b) > 1


# ----------------------------------------------------------------------------- precision and recall


def precision_recall(real, generated):
    """Both, as the scorer takes them."""
    precision = coverage(generated, real, radii(real))
    return precision, coverage(real, generated, radii(generated))


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


# --------------------------------------------------------------------------------------- the scorer


def tiny_network():
    """Build a classifier of 8 x 8 pixels with random weights, and two linear layers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 10), nn.ReLU(),
            nn.Linear(10, 3),
        ).eval()  # fmt: skip


def tiny_data(n=300, seed=0):
    """Make images of 8 x 8 pixels: a bright bar at one of three heights, on noise."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (n,), generator=rng)
    images = torch.randint(0, 100, (n, 1, 8, 8), generator=rng, dtype=torch.uint8)
    for i, label in enumerate(labels):
        images[i, 0, 2 * label + 1] += 150
    return Dataset("bars", images, labels, CLASSES)


def tiny_scorer(samples=300, count=300, **changes):
    """Make a scorer of tiny images, with changes to its classifier."""
    classifier = Classifier("tiny", tiny_network(), CLASSES, 1, 8, 8, torch.device("cpu"))
    classifier = classifier._replace(**changes)
    return Scorer(classifier, tiny_data(count), tiny_data(seed=1), samples)


def test_features_are_what_the_last_linear_layer_is_given():
    """Its weights times the features are the logits; the network is left as it was."""
    network = tiny_network()
    x = torch.rand(5, 1, 8, 8)
    with left_alone(network):
        found, logits = features(network, x)
        with pytest.raises(RuntimeError):
            features(network, torch.rand(5, 3, 8, 8))
    assert found.shape == (5, 10)
    assert found.dtype == torch.float64
    last = network[-1]
    torch.testing.assert_close(found.float() @ last.weight.T + last.bias, logits)
    torch.testing.assert_close(network(x), logits)
    assert not logits.requires_grad
    assert "no linear layer" in refusal(features, network[:2], x)


def test_scores_order_what_a_person_would_order():
    """The floor, and unseen data, are below noisy images, and those below noise."""
    scorer = tiny_scorer()
    data = tiny_data(seed=2).images.float() / 255
    noise = torch.rand(data.shape, generator=torch.Generator().manual_seed(0))
    fids = [scorer.score([x])["fid"] for x in (data, (data + noise) / 2, noise)]
    assert 5 * max(scorer.floor["fid"], fids[0]) < fids[1] < fids[2]
    assert scorer.floor["precision"] > 0.7
    assert scorer.score([noise])["precision"] < scorer.floor["precision"]


def test_test_images_themselves_score_perfectly_in_any_batches():
    """Distance 0, precision and recall 1, the classes of the test images; batches don't matter."""
    scorer = tiny_scorer()
    images = torch.cat(list(scorer.pick(tiny_data(seed=1).images)))
    _, predicted = scorer.look([images])
    labels = predicted.clone()
    labels[:30] += 1  # what they were to show, and don't
    for batches in ([images], images.split(70)):
        found = scorer.score(batches, labels)
        assert found["recognised"] == 0.9
        assert found["fid"] == pytest.approx(0, abs=1e-9)
        assert found["precision"] == found["recall"] == 1
        assert found["class_distance"] == 0
        assert sum(found["classes"].values()) == 300
        assert found["largest_class"] == max(found["classes"].values()) / 300
        assert set(found) == {*SCORES, "classes"}


def test_a_collapse_shows_in_recall_and_classes():
    """One image, drawn over and over: all in one class, and nothing else is covered."""
    scorer = tiny_scorer()
    image = tiny_data(seed=1).images[:1].float() / 255
    found = scorer.score([image.expand(300, -1, -1, -1)])
    assert found["largest_class"] == 1
    taken = max(found["classes"], key=found["classes"].get)
    share = scorer.real_counts[CLASSES.index(taken)].item() / 300  # of the test images
    assert found["class_distance"] == pytest.approx(1 - share)
    assert share < 0.8
    assert found["precision"] == 1
    assert found["recall"] < 0.02
    assert found["fid"] > 10 * scorer.floor["fid"]


def test_scoring_uses_no_global_randomness():
    """The same numbers come out at any time, and the global generator isn't moved."""
    floors = []
    for seed in (5, 6):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        scorer = tiny_scorer(samples=100)
        assert torch.equal(torch.get_rng_state(), before)
        floors.append(scorer.floor)
    assert floors[0] == floors[1]
    report = scorer.report(scorer.floor, ceiling={"fid": 9.0})
    assert report["samples"] == report["test_images"] == 100
    assert report["floor"] == report["final"] == scorer.floor
    assert report["ceiling"] == {"fid": 9.0}


def test_what_makes_scores_doubtful_is_said(capsys):
    """Few images, and a classifier of other classes, cost a warning each."""
    tiny_scorer()
    assert capsys.readouterr().err.count("warning: ") == 1
    tiny_scorer(classes=["cat", "dog", "cow"])
    assert capsys.readouterr().err.count("warning: ") == 2


@pytest.mark.parametrize("change", [{"channels": 3}, {"size": 32}, {"count": FEWEST - 1}])
def test_what_cannot_be_scored_is_refused(change):
    """A classifier of other channels or sizes, and next to no images."""
    assert refusal(tiny_scorer, **change)
    tiny_scorer(count=FEWEST)
