"""Networks that users bring: one line for what can't be explained, right numbers for the rest."""

import copy

import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision import models

import compare_explanations
import smoothgrad
from common.classifiers import Classifier, Normalise
from common.images import open_picture
from common.networks import check_classifier, eval_mode, load_weights
from common.photos import read_photo
from tests.helpers import refusal


def classifier_of(function, names="abc", channels=3):
    """Put a classifier together as the README says, of a function of images (N, C, 8, 8)."""

    class Network(nn.Module):
        def forward(self, x):
            return function(x)

    return Classifier("mine", Network(), list(names), channels, 8, 8, torch.device("cpu"))


def logits(x, count=3):
    """Compute something that depends on the images, (N, count), partly negative."""
    return x.flatten(1)[:, :count] * 4 - 2


# ------------------------------------------------------------------------------ what it must give


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: {"species": logits(x), "sex": logits(x, 2)}, ["'species'", "'sex'", "(2, 3)"]),
        (lambda x: (logits(x), x), ["tuple", "[0] (2, 3)"]),
        (lambda x: logits(x, 1), ["one logit"]),
        (lambda x: logits(x, 5), ["5 logits", "3 class names"]),
        (lambda x: x, ["(2, 3, 8, 8)"]),
        (lambda x: logits(x).mean(0), ["(3,)"]),
        (lambda x: logits(x) * float("nan"), ["finite"]),
        (lambda x: logits(x).half(), ["float16", ".float()"]),
        (lambda x: logits(x).long(), ["int64"]),
        (lambda x: None, ["NoneType"]),
        (lambda x: x @ torch.ones(3, 3), ["fails", "(2, 3, 8, 8)"]),
    ],
)
def test_what_cannot_be_explained_is_told_in_one_line(function, words):
    """What was found, and what to do about it."""
    line = refusal(check_classifier, classifier_of(function))
    for word in words:
        assert word in line


def test_half_precision_and_odd_channels_are_told():
    """Weights of bfloat16 can't take float images; a photo has one channel or three."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).to(torch.bfloat16)
    half = classifier_of(None)._replace(network=network)
    assert ".float()" in refusal(check_classifier, half)
    assert "4 channels" in refusal(check_classifier, classifier_of(logits, channels=4))


def test_logits_are_left_as_they_are(capsys):
    """Without a word, and without changing the mode of a network in training."""
    classifier = classifier_of(logits)
    classifier.network.train()
    assert check_classifier(classifier) is classifier
    assert classifier.network.training
    assert capsys.readouterr() == ("", "")


def test_probabilities_are_not_taken_through_softmax_again(capsys):
    """The softmax of what is explained is what the network says, to the last digits."""
    classifier = classifier_of(lambda x: (5 * logits(x)).softmax(1))
    checked = check_classifier(classifier)
    assert "probabilities" in capsys.readouterr().err
    x = torch.rand(4, 3, 8, 8)
    torch.testing.assert_close(checked.network(x).softmax(1), classifier.network(x))
    zero = check_classifier(classifier_of(lambda x: F.one_hot(x.flatten(1).argmax(1) % 3, 3) * 1.0))
    assert zero.network(x).isfinite().all()


def test_sigmoids_are_warned_of(capsys):
    """Of a multi-label network the probabilities would be softmax's: that is said."""
    classifier = classifier_of(lambda x: logits(x).sigmoid())
    assert check_classifier(classifier) is classifier
    error = capsys.readouterr().err
    assert "sigmoid" in error
    assert error.count("\n") == 1


def test_eval_mode_gives_each_module_its_own_mode_back():
    """Also where a part was in eval mode in a network that trains, and after an error."""
    network = nn.Sequential(nn.Dropout(), nn.BatchNorm2d(3).eval(), nn.ReLU()).train()
    network[1].eval()
    before = [module.training for module in network.modules()]

    def fail():
        with eval_mode(network):
            assert not any(module.training for module in network.modules())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [module.training for module in network.modules()] == before


# ----------------------------------------------------------------------------- weights of one's own


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Give the state dict of a SqueezeNet of two classes, and a folder to save it in."""
    torch.manual_seed(0)
    return models.squeezenet1_1(num_classes=2).state_dict(), tmp_path_factory.mktemp("weights")


@pytest.mark.parametrize("form", ["plain", "wrapped", "parallel", "before 1.6"])
def test_weights_of_ones_own(form, weights):
    """Plain, under a usual key, with module. before each name, or in the old format: the same."""
    values, folder = weights
    saved = {
        "plain": values,
        "wrapped": {"epoch": 3, "state_dict": values},
        "parallel": {"model": {f"module.{key}": value for key, value in values.items()}},
        "before 1.6": values,
    }[form]
    torch.save(saved, folder / "my.pth", _use_new_zipfile_serialization=form != "before 1.6")
    classifier = load_weights(str(folder / "my.pth"), "squeezenet1_1", "cat, dog")
    assert classifier.classes == ["cat", "dog"]
    plain = models.squeezenet1_1(num_classes=2).eval()
    plain.load_state_dict(values)
    x = torch.rand(2, 3, 224, 224)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    with torch.no_grad():
        wanted = plain(Normalise(mean, std)(x))
        torch.testing.assert_close(classifier.network(x), wanted, rtol=1e-3, atol=1e-4)


def test_names_of_classes(weights):
    """From a file, or numbers; as many as there are outputs."""
    values, folder = weights
    torch.save(values, folder / "my.pth")
    (folder / "names.txt").write_text("Katze\nHündin\n", encoding="utf-8")
    mine = str(folder / "my.pth")
    assert load_weights(mine, "squeezenet1_1", str(folder / "names.txt")).classes[1] == "Hündin"
    assert load_weights(mine, "squeezenet1_1").classes == ["0", "1"]
    three = load_weights(mine, "squeezenet1_1", "a,b,c")
    assert "3 class names" in refusal(check_classifier, three)


def test_a_timm_architecture_takes_its_weights(tmp_path):
    """Its last layer says how many classes there are."""
    network = timm.create_model("test_resnet", num_classes=4)
    torch.save(network.state_dict(), tmp_path / "my.pth")
    classifier = load_weights(str(tmp_path / "my.pth"), "timm/test_resnet")
    assert classifier.classes == list("0123")
    assert classifier.network(torch.rand(1, 3, 160, 160)).shape == (1, 4)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("missing", "features.0.weight"),
        ("unexpected", "extra.weight"),
        ("resized", "features.0.weight"),
        ("whole module", "state_dict()"),
        ("text", "state_dict()"),
        ("numbers", "state dict"),
        ("absent", "no weights"),
    ],
)
def test_what_is_no_state_dict_is_refused(damage, words, weights, tmp_path):
    """A missing or unexpected key is named; nothing is unpickled but tensors."""
    values = dict(weights[0])
    first = "features.0.weight"
    if damage == "missing":
        del values[first]
    elif damage == "unexpected":
        values = {"extra.weight": torch.zeros(3), **values}
    elif damage == "resized":
        values[first] = values[first][:, :2]
    elif damage == "numbers":
        values = {"accuracy": 0.9}
    elif damage == "whole module":
        values = models.squeezenet1_1(num_classes=2)
    file = tmp_path / "my.pth"
    if damage == "text":
        file.write_text("weights")
    elif damage != "absent":
        torch.save(values, file)
    assert words in refusal(load_weights, str(file), "squeezenet1_1")


# ------------------------------------------------------------------------------------ preprocessing


@pytest.mark.parametrize("size", [(300, 200), (97, 211)])
@pytest.mark.parametrize(
    "name", ["squeezenet1_1", "efficientnet_b0", "timm squash", "timm border", "timm bilinear"]
)
def test_preprocessing_is_the_librarys_own(name, size, tmp_path, monkeypatch):
    """Pixel by pixel what torchvision and timm themselves make of a photo."""
    rng = torch.Generator().manual_seed(0)
    pixels = (torch.rand(*size[::-1], 3, generator=rng) * 255).byte().numpy()
    file = tmp_path / "a.png"
    Image.fromarray(pixels).save(file)
    if not name.startswith("timm"):
        network = getattr(models, name)(num_classes=2)
        torch.save(network.state_dict(), tmp_path / "my.pth")
        theirs = models.get_model_weights(name).DEFAULT.transforms()(open_picture(file))
        arch = name
    else:
        config = (
            {"crop_mode": name[5:]} if name != "timm bilinear" else {"interpolation": "bilinear"}
        )
        network = timm.create_model("test_resnet", num_classes=2)
        network.pretrained_cfg = {**network.pretrained_cfg, **config}
        monkeypatch.setattr(timm, "create_model", lambda *_, **__: copy.deepcopy(network))
        torch.save(network.state_dict(), tmp_path / "my.pth")
        settings = timm.data.resolve_model_data_config(network)
        assert (
            settings["crop_mode" if "crop_mode" in config else "interpolation"] in config.values()
        )
        theirs = timm.data.create_transform(**settings)(open_picture(file))
        arch = "timm/test_resnet"
    classifier = load_weights(str(tmp_path / "my.pth"), arch)
    ours = classifier.network[0](read_photo(str(file), classifier))[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------------- maps that need a grid


def by_hand(network, x, layer, first_token=None):
    """Compute Grad-CAM of class 3 from the output of a layer that the caller knows."""
    kept = {}
    hook = layer.register_forward_hook(lambda module, inputs, output: kept.update(maps=output))
    score = network(x)[0, 3]
    hook.remove()
    maps = kept["maps"]
    (slopes,) = torch.autograd.grad(score, maps)
    if first_token is not None:  # (1, T, C) to (1, C, side, side)
        side = round((maps.shape[1] - first_token) ** 0.5)
        maps, slopes = (
            values[:, first_token:].transpose(1, 2).reshape(1, -1, side, side)
            for values in (maps, slopes)
        )
    elif maps.shape[1] == maps.shape[2]:  # channels last
        maps, slopes = maps.permute(0, 3, 1, 2), slopes.permute(0, 3, 1, 2)
    cam = (slopes.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True).relu()
    return F.interpolate(cam.detach(), x.shape[-2:], mode="bilinear")[0, 0]


@pytest.mark.parametrize(
    ("make", "layer", "first_token"),
    [
        (lambda: models.resnet18(), lambda n: n.layer4, None),
        (lambda: models.swin_t(), lambda n: n.features[-1], None),
        (lambda: models.vit_b_32(), lambda n: n.encoder.layers[-2], 1),
        (lambda: timm.create_model("vit_tiny_patch16_224"), lambda n: n.blocks[-2], 1),
        (lambda: timm.create_model("deit_tiny_distilled_patch16_224"), lambda n: n.blocks[-2], 2),
        (lambda: timm.create_model("swin_tiny_patch4_window7_224"), lambda n: n.layers[-1], None),
        (lambda: timm.create_model("convnext_atto"), lambda n: n.stages[-1], None),
        (lambda: timm.create_model("mixer_s32_224"), lambda n: n.blocks[-1], 0),
    ],
    ids=[
        "resnet18",
        "swin_t",
        "vit_b_32",
        "vit_tiny",
        "deit_tiny",
        "swin_tiny",
        "convnext",
        "mixer",
    ],
)
def test_grad_cam_finds_the_grid_of_any_network(make, layer, first_token):
    """Channels first, channels last or tokens: what Grad-CAM by hand gives for the last block."""
    torch.manual_seed(0)
    network = make().eval()
    for p in network.parameters():  # heads begin at zero, and would have no gradient
        if not p.any():
            nn.init.normal_(p, 0, 0.02)
    for seed in range(8):
        x = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(seed))
        wanted = by_hand(network, x, layer(network), first_token)
        if wanted.any():  # random weights may give a map that is negative everywhere
            break
        network.requires_grad_(True)
        with torch.no_grad():
            for p in network.parameters():
                p.add_(torch.randn_like(p) * 0.01)
    found = compare_explanations.grad_cam(network, x, torch.tensor([3]))
    both = torch.stack([found.flatten(), wanted.flatten()])
    assert torch.corrcoef(both)[0, 1] > 0.999


def test_maps_that_a_network_cannot_have_are_left_out(capsys):
    """An MLP has no grid; a network of GELUs nothing to guide: a line each, and on it goes."""
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(192, 9), nn.GELU(), nn.Linear(9, 3))
    x = torch.rand(1, 3, 8, 8)
    names = ["random", "Guided Backpropagation", "Grad-CAM"]
    assert compare_explanations.leave_out(names, mlp, x) == ["random"]
    assert capsys.readouterr().out.count("\n") == 2
    assert "ReLU" in refusal(compare_explanations.leave_out, names[1:2], mlp, x)


def test_a_mixed_network_is_told():
    """Of MobileNetV3's activations fewer than half are ReLUs."""
    line = smoothgrad.describe_guiding(models.mobilenet_v3_small().eval(), torch.rand(1, 3, 64, 64))
    assert "14 ReLUs" in line
    assert "19 hardswish" in line
    assert (
        smoothgrad.describe_guiding(models.squeezenet1_1().eval(), torch.rand(1, 3, 64, 64)) == ""
    )
