"""Photos: found and read under any name; explained once, recorded, shared out, and resumed."""

import argparse
import json
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from common.classifiers import Classifier
from common.device import set_up
from common.errors import UserError
from common.images import open_as_it_is
from common.photos import (
    SAMPLES,
    explain_photos,
    find_photos,
    load_arguments,
    name_photos,
    predict,
    read_photo,
    read_records,
    report_failures,
    save_arguments,
    say,
)
from common.run import replacing
from tests.helpers import POSIX, refusal
from tests.processes import group, wait

ODD_NAMES = ["line\nbreak.png", "it's \"this\" $x$.png", os.fsdecode(b"\xff\xfe.png"), "-x.png",
             "*.png", "sample:coffee.png", "猫.png"]  # fmt: skip


def make_classifier(channels=3, size=32, resize=40, transform=None):
    """Describe what a classifier wants; nothing is classified here."""
    return Classifier("x", None, ["a"], channels, size, resize, torch.device("cpu"), transform)


# ------------------------------------------------------------------------------------ find_photos


@POSIX
def test_a_folder_is_its_pictures(tmp_path):
    """By name, in order, in capitals too; no folders, no papers, nothing twice."""
    names = ["b.JPG", "a.png", "c.webp", "d.Tiff", "notes.txt", "paper.pdf", "film.mpg", "e.eps"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "link.jpg").symlink_to(tmp_path / "a.png")
    (tmp_path / "broken.jpg").symlink_to(tmp_path / "gone.png")
    wanted = ["a.png", "b.JPG", "broken.jpg", "c.webp", "d.Tiff", "link.jpg"]
    wanted = [str(tmp_path / name) for name in wanted]
    assert find_photos([tmp_path]) == wanted
    assert find_photos([tmp_path, tmp_path, tmp_path / "a.png"]) == wanted


def test_photos_are_taken_in_the_order_given(tmp_path):
    """Files whatever they are called, samples and folders mixed."""
    (tmp_path / "photo").touch()
    given = ["sample:rocket", str(tmp_path / "photo"), "sample:cat"]
    assert find_photos(given) == given


@pytest.mark.parametrize("path", ["nowhere", "nowhere/x.jpg", "x" * 5000, "sample:dog", "empty"])
def test_nothing_found_is_one_line(path, tmp_path, monkeypatch):
    """A wrong name, a name too long, an unknown sample, a folder without pictures."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").touch()
    assert path in refusal(find_photos, [path])


@POSIX
@pytest.mark.parametrize("name", ODD_NAMES)
def test_any_name_will_do(name, photos, tmp_path, monkeypatch):
    """Found in its folder and read, whatever it is called."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes((photos / "ant.png").read_bytes())
    assert find_photos(["."]) == [name]
    found = read_photo(name, make_classifier())
    assert torch.equal(found, read_photo(str(photos / "ant.png"), make_classifier()))


# ------------------------------------------------------------------------------------- read_photo


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", SAMPLES)
def test_samples_need_no_file(name, channels):
    """Each is scikit-image's, in the channels and of the size that the classifier wants."""
    path = Path(skimage.data_dir, SAMPLES[name])
    assert np.array_equal(open_as_it_is(path), getattr(skimage.data, path.stem)())
    x = read_photo(f"sample:{name}", make_classifier(channels))
    assert x.shape == (1, channels, 32, 32)
    assert x.dtype == torch.float32
    assert 0 <= x.min() < x.max() <= 1
    assert x.std() > 0.08


def test_the_centre_is_cut_out(tmp_path):
    """Of a shorter side of 40 pixels the middle 32, and of the longer side the middle, too."""
    pixels = np.zeros((60, 40), np.uint8)
    pixels[14:46, 4:36] = np.random.default_rng(0).integers(1, 255, (32, 32))
    Image.fromarray(pixels).save(tmp_path / "x.png")
    x = read_photo(str(tmp_path / "x.png"), make_classifier(channels=1))
    assert np.array_equal((x[0, 0] * 255).round().numpy(), pixels[14:46, 4:36])


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_a_transform_of_the_classifiers_own_is_used(channels, mode, photos):
    """It is given the picture, upright and in the right colours, and nothing is done after it."""
    seen = []
    pixels = torch.rand(channels, 5, 7)
    classifier = make_classifier(channels, transform=lambda p: seen.append(p) or pixels)
    assert torch.equal(read_photo(str(photos / "ant.png"), classifier), pixels[None])
    assert (seen[0].mode, seen[0].size) == (mode, (24, 20))


@pytest.mark.parametrize("size", [(20000, 10), (10, 20000), (1, 1)])
def test_shapes_with_nothing_to_see_are_refused(size, tmp_path):
    """Too long to crop, or of one colour."""
    Image.effect_noise(size, 60).save(tmp_path / "x.png")
    assert "x.png" in refusal(read_photo, str(tmp_path / "x.png"), make_classifier())


def test_a_nearly_black_photo_costs_a_warning(tmp_path, capsys):
    """12 bits in 16: it is read all the same."""
    values = np.random.default_rng(0).integers(0, 4096, (40, 40)).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "x.png")
    assert 0 < read_photo(str(tmp_path / "x.png"), make_classifier()).max() < 0.1
    error = capsys.readouterr().err
    assert str(tmp_path / "x.png") in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("logit", [float("nan"), float("inf")])
def test_a_photo_without_an_answer_is_named(logit):
    """By its name and the network's; the photos beside it have one."""

    def network(x):
        return torch.tensor([[0.0, 1.0], [0.0, logit]])[: len(x)]

    classifier = make_classifier()._replace(network=network, name="mine")
    x = torch.zeros(2, 3, 32, 32)
    message = refusal(predict, classifier, x, ["good.png", "bad.png"])
    assert "bad.png" in message
    assert "mine" in message
    assert predict(classifier, x[:1], ["good.png"]).sum() == 1


def test_what_is_said_is_plain(capsys):
    """A terminal obeys what it is sent: names of files and classes may hold anything."""
    say("\x1b[2J\x9b\u202e" + os.fsdecode(b"\xff") + "é猫")
    assert capsys.readouterr().out == "\\x1b[2J\\x9b\\u202e\\udcffé猫\n"


# ------------------------------------------------------------------------------------ name_photos


def test_names_are_safe_and_all_different():
    """Whatever a file is called; photos of one name, capitals or not, get a number."""
    photos = ["a/x.jpg", "b/x.png", "c/X.jpg", "x_2.jpg", "sample:coffee", "../..", "a b$c.jpg",
              ".jpg", "y" * 300 + ".jpg", "con:x|y?.jpg", "x.tar.gz", *ODD_NAMES]  # fmt: skip
    stems = name_photos(photos)
    assert list(stems) == photos
    assert list(stems.values())[:6] == ["x", "x_2", "X_3", "x_2_2", "coffee", "photo"]
    assert len({stem.lower() for stem in stems.values()}) == len(photos)
    for stem in stems.values():
        assert 0 < len(stem) < 70
        assert all(c.isascii() and (c.isalnum() or c in "-_") for c in stem)


def test_names_that_are_taken_stay_taken():
    """Those given already are kept, for the same photo and from others."""
    stems = name_photos(["b/x.jpg", "a/x.jpg"], {"a/x.jpg": "x", "gone/x.jpg": "x_2"})
    assert stems == {"a/x.jpg": "x", "gone/x.jpg": "x_2", "b/x.jpg": "x_3"}


# --------------------------------------------------------------------------------- explain_photos


@pytest.fixture
def folder(tmp_path):
    """Give a run folder that has begun."""
    save_arguments(tmp_path, "s", argparse.Namespace())
    return tmp_path


def describe(pairs):
    """Explain photos: by their names; those called bad can't be."""
    for photo, _ in pairs:
        if "bad" in photo:
            raise UserError(f"{photo} is not a readable picture")
    rest = {"target": 0, "class_name": "a", "probability": 0.5, "seconds": 1, "evaluations": 1}
    return [{"path": photo, "stem": stem, **rest} for photo, stem in pairs]


def list_records(folder):
    """Return the names of all files of records, sorted."""
    return sorted(file.name for file in (folder / "records").iterdir() if file.suffix != ".txt")


@pytest.mark.parametrize("size", [1, 2, 3, 10])
def test_a_bad_photo_costs_no_other(size, folder):
    """Each is explained once, in order; a group with a bad one is done photo by photo."""
    photos = ["a/1", "b/1", "bad", "3", "worse bad", "4", "5"]
    sizes = []

    def explain(pairs):
        sizes.append(len(pairs))
        return describe(pairs)

    records, failed = explain_photos(photos, folder, explain, size)
    assert [r["path"] for r in records] == ["a/1", "b/1", "3", "4", "5"]
    assert [r["stem"] for r in records] == ["1", "1_2", "3", "4", "5"]
    assert list_records(folder) == ["1.json", "1_2.json", "3.json", "4.json", "5.json"]
    assert set(failed) == {"bad", "worse bad"}
    assert max(sizes) == min(size, 7)


def test_what_is_done_is_not_done_again(folder):
    """Resumed with others, more, fewer or damaged records: exactly the rest is explained."""
    explain_photos(["a/x", "b/x"], folder, describe)
    seen = []

    def explain(pairs):
        seen.extend(pairs)
        return describe(pairs)

    assert [r["stem"] for r in explain_photos(["b/x"], folder, explain)[0]] == ["x_2"]
    assert not seen
    records, _ = explain_photos(["c/x", "b/x", "a/x"], folder, explain)
    assert seen == [("c/x", "x_3")]
    assert [r["stem"] for r in records] == ["x_3", "x_2", "x"]
    for damage in ("", "[1]", '{"path": 1', "{}", "null", b"\xff"):
        damage = damage if isinstance(damage, bytes) else damage.encode()
        (folder / "records" / "x.json").write_bytes(damage)
        seen.clear()
        explain_photos(["a/x", "b/x"], folder, explain)
        assert seen == [("a/x", "x")]


def write_and_describe(folder, pairs):
    """Explain photos: leave a file in the folder and in a folder in it."""
    for _, stem in pairs:
        for name in (f"{stem}_panel.png", f"maps/{stem}.npz"):
            with replacing(folder / name) as part:
                part.write_text(stem)
    return describe(pairs)


@pytest.mark.parametrize("name", ["x_panel.png", "maps/x.npz"])
@pytest.mark.parametrize("damage", ["lost", "cut", "changed", "a folder"])
def test_a_photo_whose_files_are_damaged_is_done_again(damage, name, folder, capsys):
    """It alone, and a line names the file; names that begin alike aren't mixed up."""
    (folder / "maps").mkdir()
    photos = ["a/x", "b/x", "x_panel"]
    explain_photos(photos, folder, partial(write_and_describe, folder))
    file = folder / name
    content = file.read_bytes()
    file.unlink()
    if damage == "a folder":
        file.mkdir()
    elif damage != "lost":
        file.write_bytes(content[:-1] if damage == "cut" else b"y")
    seen = []

    def explain(pairs):
        seen.extend(pairs)
        if file.is_dir():
            file.rmdir()
        return write_and_describe(folder, pairs)

    records, _ = explain_photos(photos, folder, explain)
    assert seen == [("a/x", "x")]
    assert len(records) == 3
    assert file.read_bytes() == content
    (line,) = capsys.readouterr().err.splitlines()
    assert str(file) in line


@POSIX
@pytest.mark.parametrize(
    "change",
    [{"files": {"../secret": 0}}, {"files": {"/etc/passwd": 0}}, {"files": 5}, {"path": 5},
     {"target": None}, {"probability": "high"}, {"probability": 10**400}, {"class_name": ["a"]},
     {"panel": "../../x.png"}, {"panel": 7}, {"seconds": float("nan")}],
    ids=str,
)  # fmt: skip
def test_records_are_anybodys(change, folder):
    """What a script couldn't use, and what lies elsewhere, is done again."""
    explain_photos(["x"], folder, describe)
    file = folder / "records" / "x.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    seen = []
    explain_photos(["x"], folder, lambda pairs: seen.extend(pairs) or describe(pairs))
    assert seen == [("x", "x")]


@POSIX
def test_a_pipe_in_place_of_a_record_is_not_waited_for(folder):
    """Nor for one of arguments, which might never be filled either."""
    explain_photos(["x"], folder, describe)
    for name in ("x.json", "arguments.txt"):
        (folder / "records" / name).unlink()
        os.mkfifo(folder / "records" / name)
    assert str(folder) in refusal(load_arguments, folder, "s")
    assert read_records(folder)[0] == {}


def test_an_interruption_keeps_what_is_done(folder):
    """Whatever ends the run, the records of finished photos are there, and no half of one."""

    def explain(pairs):
        if pairs[0][0] == "3":
            raise KeyboardInterrupt
        return describe(pairs)

    with pytest.raises(KeyboardInterrupt):
        explain_photos(["1", "2", "3"], folder, explain)
    assert list_records(folder) == ["1.json", "2.json"]


def test_nothing_but_lines_goes_into_a_pipe(folder, capfd):
    """No progress bar where there is no terminal; the lines whole, and where they were sent."""

    def explain(pairs):
        say(f"line {pairs[0][0]}")
        say("warned", sys.stderr)
        return describe(pairs)

    explain_photos(["x", "y"], folder, explain)
    assert capfd.readouterr() == ("line x\nline y\n", "warned\nwarned\n")


def test_processes_share_the_photos(folder):
    """Each takes every second one; both know in the end what failed and what is done."""

    def explain(rank):
        set_up(False, 0)
        seen = []
        photos = ["0", "1", "bad", "3", "4", "also bad"]
        found = explain_photos(photos, folder, lambda pairs: seen.extend(pairs) or describe(pairs))
        (folder / f"{rank}.txt").write_text(json.dumps([*found, [photo for photo, _ in seen]]))

    children, logs = group(explain, folder)
    assert [wait(child, 60) for child in children] == [0, 0], [log.read_text() for log in logs]
    first, second = (json.loads((folder / f"{rank}.txt").read_text()) for rank in (0, 1))
    assert first[:2] == second[:2]
    assert [record["path"] for record in first[0]] == ["0", "1", "3", "4"]
    assert set(first[1]) == {"bad", "also bad"}
    assert first[2] == ["0", "bad", "4"]
    assert second[2] == ["1", "3", "also bad"]


def test_a_process_that_ends_early_is_one_line(folder):
    """The other one, waiting for it, ends as well, soon and without a traceback."""

    def explain(pairs):
        if pairs[0][0] == "1":
            os._exit(9)
        return describe(pairs)

    def main(rank):
        set_up(False, 0)
        explain_photos(["0", "1", "2"], folder, explain)

    children, logs = group(main, folder)
    assert [wait(child, 60) for child in children] == [2, 9]
    assert logs[0].read_text().count("error: ") == 1
    assert list_records(folder) == ["0.json", "2.json"]


def test_failures_are_named_on_stderr(capsys):
    """A line for each, and one for all; the exit code says whether anything was done."""
    report_failures({}, 3)
    failed = {"a": "a is broken", "b": "b is empty"}
    for count, code in ((3, 1), (2, 2)):
        with pytest.raises(UserError, match=f"2 of {count}") as error:
            report_failures(failed, count)
        assert error.value.code == code
        assert capsys.readouterr() == ("", "warning: a is broken\nwarning: b is empty\n")
    with pytest.raises(UserError, match=r"^a is broken$") as error:
        report_failures({"a": "a is broken"}, 1)
    assert error.value.code == 2
    assert capsys.readouterr() == ("", "")


# ---------------------------------------------------------------------------------------- arguments


def test_arguments_are_read_back(tmp_path):
    """As they were, by the script that wrote them."""
    args = argparse.Namespace(image=["a", "\udcff"], noise=[0.0, 0.1], target=None, gif=False)
    save_arguments(tmp_path, "smoothgrad", args)
    save_arguments(tmp_path, "smoothgrad", args)  # by a resumed run
    assert load_arguments(tmp_path, "smoothgrad") == vars(args)
    assert "smoothgrad" in refusal(load_arguments, tmp_path, "explain_perturb")


@pytest.mark.parametrize(
    "content",
    [None, b"", b"[1]", b"5", b"{}", b'{"script": "s"}', b'{"script": "s", "args": 5}',
     b'{"script": "s", "args": "ab"}', b"\xff\xfe"],
)  # fmt: skip
def test_a_folder_that_is_no_run(content, tmp_path):
    """One line, whatever stands in its file."""
    (tmp_path / "records").mkdir()
    if content is not None:
        (tmp_path / "records" / "arguments.txt").write_bytes(content)
    assert str(tmp_path) in refusal(load_arguments, tmp_path, "s")
