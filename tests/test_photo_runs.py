"""What holds for a run of each script that explains photos: its files, --resume, mistakes."""

import csv
import json
import shutil
import signal
import sys

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import compare_explanations
import explain_perturb
import smoothgrad
from common.errors import UserError
from tests.helpers import assert_same, refusal
from tests.processes import group, wait

OPTIONS = {
    smoothgrad: ["--samples", "12", "--noise", "0", "0.3", "--target", "green"],
    explain_perturb: ["--mask-size", "8", "--iterations", "4", "--gif", "--target", "1"],
    compare_explanations: ["--methods", "random", "gradient", "--sanity", "1", "--target", "GREEN"],
}
ARRAYS = {
    smoothgrad: {"noise_0": (3, 16, 16), "noise_30": (3, 16, 16)},
    explain_perturb: {"mask": (16, 16), "ranking": (16, 16)},
    compare_explanations: {"random": (16, 16), "gradient": (16, 16)},
}
PICTURES = {
    smoothgrad: ("bee_noise_0", "bee_noise_30", "bee_panel"),
    explain_perturb: ("bee_mask", "bee_overlay", "bee_panel", "bee_perturbed"),
    compare_explanations: ("curves", "random_weights"),
}


@pytest.fixture(scope="module", params=OPTIONS, ids=lambda script: script.SCRIPT)
def whole(request, trained, photos, tmp_path_factory):
    """Run a script on two photos and a broken one."""
    script = request.param
    folder = tmp_path_factory.mktemp(script.SCRIPT)
    for name in ("ant.png", "bee.png"):
        shutil.copy(photos / name, folder)
    (folder / "dot.png").write_text("no picture")
    command = ["--model", str(trained), "--image", str(folder), *OPTIONS[script], "--out"]
    with pytest.raises(UserError, match="1 of 3") as failed:
        script.main([*command, str(folder / "run")])
    assert failed.value.code == 1
    return script, command, folder / "run"


def read_run(folder):
    """Read all that a run holds but times: pictures as bytes, arrays, records."""
    found = {}
    for file in sorted(folder.rglob("*.*")):
        name = str(file.relative_to(folder))
        if file.suffix in (".png", ".gif"):
            found[name] = file.read_bytes()
        elif file.suffix == ".npz":
            with np.load(file) as arrays:
                found[name] = {key: torch.from_numpy(a) for key, a in arrays.items()}
        elif file.parent.name == "records" and file.suffix == ".json":
            found[name] = json.loads(file.read_text(), object_pairs_hook=without_seconds)
    return found


def without_seconds(pairs):
    """Make a dict without the time that something took."""
    return {key: value for key, value in pairs if key != "seconds"}


def test_a_run_leaves_what_it_promises(whole):
    """Records, arrays, tables and pictures of each photo; a broken one costs no other."""
    script, _, folder = whole
    metrics = json.loads((folder / "metrics.json").read_text())
    assert {"command", "args", "dataset", "device", "versions", "seconds"} <= set(metrics)
    assert [*metrics["failed"]] == [str(folder.parent / "dot.png")]
    for name, image in zip(("ant", "bee"), metrics["images"], strict=True):
        assert image["path"] == str(folder.parent / f"{name}.png")
        assert image["target"] == 1
        assert image["class_name"] == "green"
        assert 0 < image["probability"] < 1
        assert image["seconds"] > 0
        assert image["evaluations"] > 0
        (file,) = folder.rglob(f"{name}.npz")
        with np.load(file) as arrays:
            shapes = {name: array.shape for name, array in arrays.items()}
            assert shapes == {"photo": (3, 16, 16), **ARRAYS[script]}
            assert all(array.dtype == np.float32 for array in arrays.values())
            assert all(array.std() > 0 for array in arrays.values())
    for name in (*PICTURES[script], "contact_sheet"):
        assert iio.imread(folder / f"{name}.png").std() > 1, name
    with open(folder / "metrics.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 2  # photos
    assert not list(folder.rglob("*.part*"))


def check_smoothgrad(metrics, folder):
    """The five top classes, and what each map is worth."""
    for image in metrics["images"]:
        assert image["evaluations"] == 1 + 12
        shares = [p for _, p in image["top5"]]
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) == pytest.approx(1, abs=1e-5)
        assert ["green", image["probability"]] in image["top5"]
        assert [(m["noise"], m["samples"]) for m in image["maps"]] == [(0, 1), (0.3, 12)]
        for found in image["maps"]:
            assert 0 < found["reliability"] <= 1
            assert 0 < found["probability_left"] < 1
            assert 0 < found["probability_left_random"] < 1


def check_explain_perturb(metrics, folder):
    """The picture that is saved has the probability and the area that are reported."""
    network = explain_perturb.load_classifier(metrics["args"]["model"]).network
    for image in metrics["images"]:
        assert [step["evaluations"] for step in image["trace"]] == [4, 8, 12, 16]
        assert image["evaluations"] == 16
        stem = image["panel"].removesuffix("_panel.png")
        with np.load(folder / f"{stem}.npz") as arrays:
            assert image["area"] == pytest.approx(1 - arrays["mask"].mean(), abs=1e-5)
        saved = torch.from_numpy(iio.imread(folder / f"{stem}_perturbed.png")).permute(2, 0, 1)
        left = float(network(saved.unsqueeze(0) / 255).softmax(1)[0, 1])
        assert left == pytest.approx(image["probability_after"], abs=1e-5)
        assert len(iio.imread(folder / f"{stem}.gif", index=None)) > 1


def check_compare_explanations(metrics, folder):
    """One photo has had the checks (--sanity 1); the table holds the means."""
    rows = [image["methods"]["gradient"] for image in metrics["images"]]
    assert [row["evaluations"] for row in rows] == [1, 1]
    assert ["sensitivity" in row for row in rows] == [True, False]
    found = [row["deletion"] for row in rows]
    wanted = (np.mean(found), np.std(found, ddof=1) / 2**0.5, 2)
    assert metrics["table"]["gradient"]["deletion"] == pytest.approx(wanted)


CHECKS = {
    smoothgrad: check_smoothgrad,
    explain_perturb: check_explain_perturb,
    compare_explanations: check_compare_explanations,
}


def test_records_are_true(whole):
    """What the page, the benchmarks and the tables read."""
    script, _, folder = whole
    CHECKS[script](json.loads((folder / "metrics.json").read_text()), folder)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_resume_goes_on_after_a_signal_bit_for_bit(signum, whole, tmp_path, monkeypatch, capsys):
    """Stopped within the second photo: exit code 130 or 143, one line, and nothing is lost."""
    script, command, folder = whole
    read = script.read_photo
    seen = []

    def read_and_stop(path, *arguments):
        seen.append(path)
        if len(seen) == 2:
            signal.raise_signal(signum)
        return read(path, *arguments)

    cut = tmp_path / "cut"
    monkeypatch.setattr(script, "read_photo", read_and_stop)
    monkeypatch.setattr(sys, "argv", ["x.py", *command, str(cut)])
    assert script.exit_code(script.main) == 128 + signum
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"{script.SCRIPT}.py --resume {cut}" in line
    assert [file.name for file in (cut / "records").glob("*.json")] == ["ant.json"]
    assert not (cut / "metrics.json").exists()
    assert "--seed" in refusal(script.main, ["--resume", str(cut), "--seed", "1"])
    for other in set(OPTIONS) - {script}:
        assert script.SCRIPT in refusal(other.main, ["--resume", str(cut)])
    assert "1 of 3" in refusal(script.main, ["--resume", str(cut)])
    assert seen[2:] == [seen[1], str(folder.parent / "dot.png")]
    assert_same(read_run(cut), read_run(folder))


def test_two_processes_share_the_photos(whole, tmp_path):
    """Each photo once, every line whole; the files are those of one process."""
    script, command, folder = whole
    run = tmp_path / "run"
    children, logs = group(lambda rank: script.main([*command, str(run)]), tmp_path)
    ends = [wait(child) for child in children]
    said = [log.read_text() for log in logs]
    assert ends == [1, 0], said  # the first one speaks for all
    assert said[0].count("2 processes") == 1
    assert said[0].count("1 of 3") == 1
    assert "".join(said).count("dot.png is") == 1
    for rank, name in enumerate(("ant", "bee")):
        line = f"\n{folder.parent / name}.png: "
        assert line in "\n" + said[rank]
        assert line not in "\n" + said[1 - rank]
    assert_same(read_run(run), read_run(folder))


@pytest.mark.parametrize("script", OPTIONS, ids=lambda script: script.SCRIPT)
def test_a_photo_without_an_answer_costs_no_other(
    script, trained, photos, tmp_path, monkeypatch, capsys
):
    """NaN for one photo: one line names it and the network, the others are done, exit code 1."""
    load = script.load_classifier

    def load_odd(*arguments):
        classifier = load(*arguments)

        def spoil(_, inputs, logits):
            return logits * float("nan") if torch.equal(inputs[0], bee) else logits

        bee = script.read_photo(str(photos / "bee.png"), classifier)
        classifier.network.register_forward_hook(spoil)
        return classifier

    monkeypatch.setattr(script, "load_classifier", load_odd)
    monkeypatch.setattr(sys, "argv", ["x.py"])
    command = ["--model", str(trained), "--image", str(photos), *OPTIONS[script]]
    assert script.exit_code(lambda: script.main([*command, "--out", str(tmp_path / "run")])) == 1
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert [*metrics["failed"]] == [str(photos / "bee.png")]
    assert len(metrics["images"]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "NaN" in x]
    assert str(photos / "bee.png") in line
    assert str(trained) in line


@pytest.mark.parametrize("damage", ["gone", "other arrays", "no arrays"])
def test_a_map_of_a_photo_that_is_done(damage, whole, tmp_path):
    """Where an honest accident has taken it, it is made again; a stranger's is told of."""
    script, _, folder = whole
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    (file,) = run.rglob("bee.npz")
    good = file.read_bytes()
    if damage == "gone":
        file.unlink()
    elif damage == "other arrays":
        np.savez_compressed(file, photo=np.ones(3), other="text")
    else:
        file.write_text("no arrays")
    assert "1 of 3" in refusal(script.main, ["--resume", str(run)])
    assert file.read_bytes() == good


def test_a_class_that_is_not_seen_is_said(trained, photos, tmp_path, monkeypatch, capsys):
    """No area is reported as enough, and a warning says why."""
    command = ["--model", str(trained), "--image", str(photos / "ant.png"), "--iterations", "1"]
    reached = []
    for seen in (0.0, 1.0):
        monkeypatch.setattr(explain_perturb, "SEEN", seen)
        out = str(tmp_path / str(seen))
        metrics = explain_perturb.main([*command, "--suppress", "0.001", "--out", out])
        reached.append((metrics["images"][0]["reached"], capsys.readouterr().err.count("warning")))
    assert reached == [(True, 0), (False, 1)]


COMMON = ["--image nowhere.jpg", "--image sample:dog", "--image .", "--model no-such-model",
          "--target grene", "--target 3", "--target -1", "--seed -1", "--seed 1.5",
          "--resume nowhere", "--out a-file", "--no-such-flag"]  # fmt: skip
OWN = {
    smoothgrad: ["--noise nan", "--noise -1", "--noise inf", "--noise", "--samples 0",
                 "--samples 1.5", "--chunk 0", "--converge 1", "--converge nan", "--steps 0",
                 "--steps 1e9", "--method lime", "--method guided"],
    explain_perturb: ["--lr nan", "--lr 0", "--areas 0", "--areas 1.5", "--suppress 1",
                      "--iterations 0", "--mask-size 1", "--pictures 1", "--l1 -1", "--l2 inf",
                      "--optimizer lbfgs --batch 2", "--game chess"],
    compare_explanations: ["--methods magic", "--sanity -1"],
}  # fmt: skip
MISTAKES = [(script, text) for script in OWN for text in COMMON + OWN[script]]


@pytest.mark.parametrize(
    ("script", "text"), MISTAKES, ids=[f"{script.SCRIPT} {text}" for script, text in MISTAKES]
)
def test_mistakes_are_one_line(script, text, trained, photos, tmp_path, monkeypatch, refused):
    """Exit code 2 and one line that names it; no run folder is made."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-file").touch()
    command = ["--model", str(trained), "--image", str(photos)]
    error = refused(script, *command * ("--resume" not in text), *text.split())
    # The classifiers of train_classifier.py have no ReLU.
    assert any(word in error for word in ("no ReLU", *text.split()))
    assert [file.name for file in tmp_path.iterdir()] == ["a-file"]
