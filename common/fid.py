"""How good samples are: classifier-FID, precision and recall, and the classes generated.

Inception's features say little about handwriting, so the features are those of a classifier of the
same data: what its last linear layer is given. Such numbers compare only under one classifier, and
mean something only between two others: the floor, what other data of the same kind would score,
and the ceiling, what an untrained generator scores.
"""

import sys

import torch
from torch import nn

from common.device import make_rng
from common.errors import UserError

SAMPLES = 10_000  # as many pictures of each kind; with fewer, the distance is biased upwards
FEWEST = 10  # with so few it says little, with one or two nothing
NEIGHBOURHOOD = 5_000  # of these, for precision and recall, whose cost is quadratic
SCORES = ("fid", "precision", "recall", "class_distance", "largest_class", "recognised")


@torch.no_grad()
def features(network, images):
    """Read what the last linear layer of a classifier is given; the network stays as it was.

    :param torch.nn.Module network: maps (N, C, H, W) to logits (N, K)
    :param torch.Tensor images: (N, C, H, W), in [0, 1]
    :return: the features, float64, (N, F), and the logits, (N, K)
    :rtype: tuple[torch.Tensor, torch.Tensor]
    :raises UserError: if the network has no linear layer
    """
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise UserError("the classifier has no linear layer, hence no features: give another --fid")
    seen = []
    hook = linear[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        logits = network(images)
    finally:
        hook.remove()
    return seen[0].flatten(1).double(), logits


def fit_gaussian(x):
    """Describe points by their mean and by a root of their covariance.

    :param torch.Tensor x: float64, (N, F), N at least 2
    :return: the mean, (F,), and R, (F or fewer, F), with R^T R the covariance
    :rtype: tuple[torch.Tensor, torch.Tensor]
    """
    mean = x.mean(0)
    return mean, torch.linalg.qr(x - mean, mode="r").R / (len(x) - 1) ** 0.5


def frechet_distance(a, b):
    """Square of the Wasserstein-2 distance of two Gaussians (Dowson and Landau 1982).

        |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)),    S = R^T R

    The eigenvalues of S1 S2 are the squares of the singular values of R1 R2^T. So no covariance is
    formed and no root of a matrix taken, which would cost half the digits where S is near singular.

    :param tuple a: m1 and R1, as from :func:`fit_gaussian`
    :param tuple b: m2 and R2
    :return: the distance, 0 or more
    :rtype: float
    """
    (m1, r1), (m2, r2) = a, b
    overlap = torch.linalg.svdvals(r1 @ r2.T).sum()
    distance = (m1 - m2).square().sum() + r1.square().sum() + r2.square().sum() - 2 * overlap
    return max(0.0, distance.item())


def radii(x, k=3):
    """Measure how far the k-th nearest neighbour of each point is, itself not counted.

    :param torch.Tensor x: (N, F), N at least 2
    :param int k: which neighbour
    :return: (N,)
    :rtype: torch.Tensor
    """
    k = min(k, len(x) - 1)
    return torch.cat([torch.cdist(rows, x).kthvalue(k + 1).values for rows in x.split(1000)])


def coverage(points, centres, radius):
    """Share of the points that lie in at least one of the balls.

    Precision is that of samples in balls around data, recall that of data in balls around
    samples (Kynkäänniemi et al. 2019, arXiv 1904.06991, k = 3).

    :param torch.Tensor points: (N, F)
    :param torch.Tensor centres: (M, F)
    :param torch.Tensor radius: (M,)
    :return: 0 to 1
    :rtype: float
    """
    inside = [(torch.cdist(rows, centres) <= radius).any(1) for rows in points.split(1000)]
    return torch.cat(inside).double().mean().item()


class Scorer:
    """Scores pictures against the test images of a dataset, with a classifier of such data.

    It uses no global randomness, so that scoring changes nothing in a training, and the same
    pictures get the same numbers at any time. ``floor`` is the score of training images.

    :param common.classifiers.Classifier classifier: takes pictures of the dataset's shape
    :param common.data.Dataset train: the training half; only the floor comes from it
    :param common.data.Dataset test: the test half
    :param int samples: how many pictures of each half to use at most, and to generate
    :raises UserError: if the classifier takes pictures of another shape
    """

    def __init__(self, classifier, train, test, samples=SAMPLES):
        shape = (classifier.channels, classifier.size, classifier.size)
        if test.images.shape[1:] != shape:
            asked = " x ".join(map(str, shape))
            found = " x ".join(map(str, test.images.shape[1:]))
            cure = f"train one with --dataset {test.name} --size {test.images.shape[-1]}"
            raise UserError(f"{classifier.name} takes {asked} pixels, here are {found}: {cure}")
        if min(len(train.images), len(test.images)) < FEWEST:
            count = min(len(train.images), len(test.images))
            raise UserError(
                f"FID needs {FEWEST} images of each half, here are {count}: leave it out"
            )
        self.classifier = classifier
        self.samples = samples
        self.real, predicted = self.look(self.pick(test.images))
        self.real_counts = self.count(predicted)
        self.gaussian = fit_gaussian(self.real)
        self.near = self.real[:NEIGHBOURHOOD]
        self.radii = radii(self.near)
        self.floor = self.score(self.pick(train.images))
        self.warn(train, test)

    def warn(self, train, test):
        """Print the floor, and what is wrong with the classifier or with the number of images."""
        used = min(self.samples, len(train.images))
        print(f"fid      floor {self.floor['fid']:.3f}: {used:,} training images against "
              f"{len(self.real):,} test images, by {self.classifier.name}")  # fmt: skip
        if list(self.classifier.classes) != list(test.classes):
            print(f"warning: {self.classifier.name} has other classes than {test.name}: was it "
                  "trained on other data?", file=sys.stderr)  # fmt: skip
        if min(used, len(self.real)) < SAMPLES:
            print(f"warning: with fewer than {SAMPLES:,} images FID is too large, as the floor "
                  "shows", file=sys.stderr)  # fmt: skip

    def pick(self, images):
        """Choose images by chance, the same ones each time, in batches of floats."""
        rows = torch.randperm(len(images), generator=make_rng("cpu", 0))[: self.samples]
        for chunk in rows.split(500):
            yield images[chunk.to(images.device)].float() / 255

    def look(self, batches):
        """Read features, (N, F), and predict the classes, (N,)."""
        network = self.classifier.network
        seen, predicted = [], []
        for batch in batches:
            found, logits = features(network, batch.to(self.classifier.device))
            seen.append(found)
            predicted.append(logits.argmax(1))
        return torch.cat(seen), torch.cat(predicted)

    def count(self, predicted):
        """Count how many pictures are taken for each class, (K,)."""
        return predicted.bincount(minlength=len(self.classifier.classes))

    def score(self, batches, labels=None):
        """Score pictures.

        :param Iterable[torch.Tensor] batches: (n, C, H, W), in [0, 1]
        :param torch.Tensor labels: the classes that they were to show, (N,), where they were told
        :return: by the names in SCORES: the Fréchet distance, precision and recall, the total
            variation distance of predicted classes from the test images', the largest class's
            share, with labels the share recognised as what they were to show; and "classes", how
            many were taken for each
        :rtype: dict
        """
        generated, predicted = self.look(batches)
        near = generated[: len(self.near)]  # as many of both, or one number would gain by it
        counts = self.count(predicted)
        share = counts.double() / counts.sum()
        expected = self.real_counts.double() / self.real_counts.sum()
        scores = {
            "fid": frechet_distance(fit_gaussian(generated), self.gaussian),
            "precision": coverage(near, self.near, self.radii),
            "recall": coverage(self.near, near, radii(near)),
            "class_distance": (share - expected).abs().sum().item() / 2,
            "largest_class": share.max().item(),
            "classes": dict(zip(self.classifier.classes, counts.tolist(), strict=True)),
        }
        if labels is not None:
            scores["recognised"] = (predicted.cpu() == labels).double().mean().item()
        return scores

    def report(self, final, ceiling=None):
        """Put scores beside what they are to be read against, for metrics.json.

        :param dict final: a score of the generator
        :param dict ceiling: the score of the untrained one, if it was measured
        :rtype: dict
        """
        return {
            "classifier": self.classifier.name,
            "samples": sum(final["classes"].values()),
            "test_images": len(self.real),
            "floor": self.floor,
            "ceiling": ceiling,
            "final": final,
        }
