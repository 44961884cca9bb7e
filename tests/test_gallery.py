"""The gallery: names for files, records, resuming, and photos that can't be explained."""

import argparse
import sys

import pytest

from common import gallery
from common.errors import UserError
from common.gallery import (
    explain_photos,
    load_arguments,
    name_photos,
    report_failures,
    save_arguments,
    say,
)


def describe(pairs):
    """Explain photos: by their names; those called bad can't be."""
    for photo, _ in pairs:
        if "bad" in photo:
            raise UserError(f"{photo} is not a readable picture")
    return [{"path": photo, "stem": stem} for photo, stem in pairs]


# --------------------------------------------------------------------------------- name_photos


def test_names_are_safe_and_all_different():
    """Whatever a file is called; photos of one name, capitals or not, get a number."""
    photos = ["a/x.jpg", "b/x.png", "c/X.jpg", "x_2.jpg", "sample:coffee", "../..", "a b$c.jpg",
              "猫.png", "line\nbreak.gif", "\udcff.png", ".jpg", "-x.jpg", "y" * 300 + ".jpg",
              "con:x|y?.jpg", "x.tar.gz"]  # fmt: skip
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


def test_thousands_of_names_are_given_quickly():
    """The time grows with their number, not with its square."""
    assert len(set(name_photos([f"{i}/photo.jpg" for i in range(20_000)]).values())) == 20_000


# ------------------------------------------------------------------------------ explain_photos


def test_every_photo_is_explained_once(tmp_path):
    """In order, each with a record of its own."""
    photos = [f"{folder}/{name}.jpg" for folder in "ab" for name in ("x", "y")]
    records, failed = explain_photos(photos, tmp_path, describe)
    assert [r["path"] for r in records] == photos
    assert [r["stem"] for r in records] == ["x", "y", "x_2", "y_2"]
    assert failed == {}
    files = sorted(f.name for f in (tmp_path / "records").iterdir())
    assert files == ["x.json", "x_2.json", "y.json", "y_2.json"]


@pytest.mark.parametrize("group", [1, 2, 3, 10])
def test_a_bad_photo_costs_no_other(group, tmp_path):
    """A group with a bad one is done photo by photo."""
    photos = ["1", "2", "bad", "3", "worse bad", "4", "5"]
    sizes = []

    def explain(pairs):
        sizes.append(len(pairs))
        return describe(pairs)

    records, failed = explain_photos(photos, tmp_path, explain, group)
    assert [r["path"] for r in records] == ["1", "2", "3", "4", "5"]
    assert set(failed) == {"bad", "worse bad"}
    assert max(sizes) == min(group, 7)


def test_what_is_done_is_not_done_again(tmp_path):
    """Resumed with others, more, fewer or damaged records: exactly the rest is explained."""
    explain_photos(["a/x", "b/x"], tmp_path, describe)
    seen = []

    def explain(pairs):
        seen.extend(pairs)
        return describe(pairs)

    assert [r["stem"] for r in explain_photos(["b/x"], tmp_path, explain)[0]] == ["x_2"]
    assert not seen
    records, _ = explain_photos(["c/x", "b/x", "a/x"], tmp_path, explain)
    assert seen == [("c/x", "x_3")]
    assert [r["stem"] for r in records] == ["x_3", "x_2", "x"]
    for damage in ("", "[1]", '{"path": 1', "{}"):
        (tmp_path / "records" / "x.json").write_text(damage)
        seen.clear()
        explain_photos(["a/x", "b/x"], tmp_path, explain)
        assert seen == [("a/x", "x")]


def test_an_interruption_keeps_what_is_done(tmp_path):
    """Whatever ends the run, the records of finished photos are there."""

    def explain(pairs):
        if pairs[0][0] == "3":
            raise KeyboardInterrupt
        return describe(pairs)

    with pytest.raises(KeyboardInterrupt):
        explain_photos(["1", "2", "3"], tmp_path, explain)
    assert sorted(f.name for f in (tmp_path / "records").iterdir()) == ["1.json", "2.json"]


def test_nothing_but_lines_goes_into_a_pipe(tmp_path, capfd):
    """No progress bar where there is no terminal; the lines on stdout, whole."""

    def explain(pairs):
        say(f"line {pairs[0][0]}")
        return describe(pairs)

    explain_photos(list("xyz"), tmp_path, explain)
    assert capfd.readouterr() == ("line x\nline y\nline z\n", "")


def test_say_goes_where_it_is_sent(capsys):
    """Stdout, or the stream that is given."""
    say("found")
    say("warned", sys.stderr)
    assert capsys.readouterr() == ("found\n", "warned\n")


def test_processes_share_the_photos(tmp_path, monkeypatch):
    """Each takes every second one; all know what failed and what is done."""
    photos = ["0", "1", "bad", "3", "4"]

    def gather(everybody, failed):
        everybody[:] = [failed, {"another": "is broken, too"}]

    monkeypatch.setattr(gallery.dist, "all_gather_object", gather)
    for rank in (1, 0):
        monkeypatch.setattr(gallery, "ranks", lambda rank=rank: (rank, 2))
        records, failed = explain_photos(photos, tmp_path, describe)
        assert [r["path"] for r in records] == [["0", "1", "3", "4"], ["1", "3"]][rank]
    assert failed == {"bad": "bad is not a readable picture", "another": "is broken, too"}


def test_a_process_that_ends_early_is_no_traceback(tmp_path, monkeypatch):
    """The others, waiting for it, end with one line."""

    def gather(everybody, failed):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(gallery.dist, "all_gather_object", gather)
    monkeypatch.setattr(gallery, "ranks", lambda: (0, 2))
    with pytest.raises(UserError, match="another process has ended"):
        explain_photos(["0"], tmp_path, describe)


# ------------------------------------------------------------------------------ report_failures


def test_failures_are_named_on_stderr(capsys):
    """A line for each, and one for all; the exit code says whether anything was done."""
    report_failures({}, 3)
    with pytest.raises(UserError, match="2 of 3") as error:
        report_failures({"a": "a is broken", "b": "b is empty"}, 3)
    assert error.value.code == 1
    assert capsys.readouterr() == ("", "warning: a is broken\nwarning: b is empty\n")
    with pytest.raises(UserError, match="2 of 2") as error:
        report_failures({"a": "a is broken", "b": "b is empty"}, 2)
    assert error.value.code == 2
    capsys.readouterr()
    with pytest.raises(UserError, match=r"^a is broken$") as error:
        report_failures({"a": "a is broken"}, 1)
    assert error.value.code == 2
    assert capsys.readouterr() == ("", "")


# ---------------------------------------------------------------------------------- arguments


def test_arguments_are_read_back(tmp_path):
    """As they were, by the script that wrote them."""
    args = argparse.Namespace(image=["a", "\udcff"], noise=[0.0, 0.1], target=None, gif=False)
    save_arguments(tmp_path, "smoothgrad", args)
    assert load_arguments(tmp_path, "smoothgrad") == vars(args)
    with pytest.raises(UserError, match="written by smoothgrad, not by explain_perturb"):
        load_arguments(tmp_path, "explain_perturb")


@pytest.mark.parametrize(
    "text",
    [None, "", "[1]", "5", "{}", '{"script": "s"}', '{"script": "s", "args": 5}', b"\xff\xfe"],
)
def test_a_folder_that_is_no_run(text, tmp_path):
    """One line, whatever stands in its file."""
    (tmp_path / "records").mkdir()
    if text is not None:
        text = text if isinstance(text, bytes) else text.encode()
        (tmp_path / "records" / "arguments.txt").write_bytes(text)
    with pytest.raises(UserError, match="is no run of s to go on with"):
        load_arguments(tmp_path, "s")
