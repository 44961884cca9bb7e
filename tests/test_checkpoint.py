"""Checkpoints: whole or not at all, never executed, and the settings of the run that they hold."""

import argparse
import os
import pickle
import zipfile

import pytest
import torch

from common.checkpoint import load_checkpoint, resume_args, save_checkpoint
from common.errors import UserError, make_parser, number
from tests.helpers import assert_same, refusal


def make_state(seed=0):
    """Make what a script saves, about 5 kB.

    :rtype: dict
    """
    rng = torch.Generator().manual_seed(seed)
    return {
        "script": "train",
        "weights": {"w": torch.randn(1000, generator=rng), "n": torch.tensor(3)},
        "args": {"lr": None, "epochs": 5, "name": "größer", "amp": False, "list": [1, 2.5]},
    }


# ----------------------------------------------------------------------------------- save and load


def test_round_trip(tmp_path):
    """What was saved comes back, from the run's folder or from the file itself."""
    save_checkpoint(tmp_path / "run" / "checkpoint.pt", make_state())
    for path in (tmp_path / "run", str(tmp_path / "run" / "checkpoint.pt")):
        assert_same(dict(load_checkpoint(path, "train")), make_state())
    assert [f.name for f in (tmp_path / "run").iterdir()] == ["checkpoint.pt"]


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, full_disk):
    """No room for a new checkpoint is an OSError with a reason; the old one stays."""
    save_checkpoint(tmp_path / "checkpoint.pt", make_state())
    with full_disk(), pytest.raises(OSError, match="disk full") as caught:
        save_checkpoint(tmp_path / "checkpoint.pt", make_state(1))
    assert caught.value.filename == str(tmp_path / "checkpoint.pt")
    assert [f.name for f in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert_same(dict(load_checkpoint(tmp_path, "train")), make_state())


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interruption_keeps_the_old_checkpoint(error, tmp_path, monkeypatch):
    """Whatever strikes in the middle of saving, the old checkpoint is whole and alone."""
    save_checkpoint(tmp_path / "checkpoint.pt", make_state())

    def strike(state, path):
        path.write_bytes(b"half a checkpoint")
        raise error

    monkeypatch.setattr(torch, "save", strike)
    with pytest.raises(error):
        save_checkpoint(tmp_path / "checkpoint.pt", make_state(1))
    assert [f.name for f in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert_same(dict(load_checkpoint(tmp_path, "train")), make_state())


def test_nothing_there(tmp_path):
    """A wrong path is named, and what to give instead."""
    for path in (tmp_path, tmp_path / "nowhere"):
        message = refusal(load_checkpoint, path, "train")
        assert str(path) in message
        assert "folder of an earlier run" in message


@pytest.mark.parametrize("size", [0, 1, 100, 0.5, 0.9, 0.999])
def test_a_truncated_checkpoint_is_refused(size, tmp_path):
    """However much of it is there, a part of a checkpoint is none."""
    file = tmp_path / "checkpoint.pt"
    save_checkpoint(file, make_state())
    data = file.read_bytes()
    file.write_bytes(data[: size if isinstance(size, int) else int(size * len(data))])
    assert str(file) in refusal(load_checkpoint, tmp_path, "train")


def test_a_flipped_bit_never_becomes_a_weight(tmp_path):
    """A bit that flipped on the disk is refused, unless it is one that means nothing."""
    file = tmp_path / "checkpoint.pt"
    save_checkpoint(file, make_state())
    good, refused = file.read_bytes(), 0
    for place in range(0, len(good), 41):
        file.write_bytes(good[:place] + bytes([good[place] ^ 16]) + good[place + 1 :])
        try:
            state = load_checkpoint(tmp_path, "train")
        except UserError:
            refused += 1
        else:
            assert_same(dict(state), make_state())
    assert refused > 0.7 * len(good) / 41  # of 5 kB, the weights are 4


@pytest.mark.parametrize("content", ["text", "a list", "another zip", "another pickle"])
def test_other_files_are_refused(content, tmp_path):
    """A file that is no checkpoint is said to be none, by its path."""
    file = tmp_path / "checkpoint.pt"
    if content == "text":
        file.write_text("no checkpoint")
    elif content == "a list":
        torch.save([1, 2], file)
    elif content == "another zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("a.txt", "text")
    else:
        file.write_bytes(pickle.dumps({"script": "train"}))
    assert str(file) in refusal(load_checkpoint, tmp_path, "train")


def test_the_checkpoint_of_another_script_is_refused(tmp_path):
    """The message says who wrote it and who could not read it."""
    save_checkpoint(tmp_path / "checkpoint.pt", make_state())
    message = refusal(load_checkpoint, tmp_path, "explain")
    assert "written by train, not by explain" in message


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        """Tell pickle what to call."""
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "old format"])
def test_a_malicious_checkpoint_is_not_executed(legacy, tmp_path):
    """A checkpoint from a stranger can't run code; without our care, this one would."""
    harm = tmp_path / "harmed"
    state = make_state() | {"evil": Evil(str(harm))}
    torch.save(state, tmp_path / "checkpoint.pt", _use_new_zipfile_serialization=not legacy)
    assert "checkpoint.pt" in refusal(load_checkpoint, tmp_path, "train")
    assert not harm.exists()
    torch.load(tmp_path / "checkpoint.pt", weights_only=False)  # the trap does work
    assert harm.exists()


# ------------------------------------------------------------------------------------- resume_args


def resume(*argv, **saved):
    """Resume a run of a small script.

    :rtype: argparse.Namespace
    """
    parser = make_parser("train", None)
    parser.add_argument("--epochs", type=number(int, 1), default=20)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--amp", action="store_true")
    parser.add_argument("--resume")
    settings = {"epochs": 5, "lr": 0.1, "amp": True, "resume": None} | saved
    return resume_args(parser, [*argv, "--resume", "run"], settings, {"epochs", "resume"})


def test_resume_keeps_the_settings():
    """What isn't typed is the run's, not the script's default."""
    assert resume() == argparse.Namespace(epochs=5, lr=0.1, amp=True, resume="run")


def test_resume_takes_what_is_free():
    """What may change, does; repeating the run's own setting is no change."""
    args = resume("--epochs", "9", "--lr", "0.1", "--amp")
    assert (args.epochs, args.lr, args.amp) == (9, 0.1, True)


@pytest.mark.parametrize(("argv", "name"), [(["--lr", "0.2"], "lr"), (["--amp"], "amp")])
def test_resume_refuses_another_experiment(argv, name):
    """A setting that the weights depend on can't change half-way."""
    with pytest.raises(UserError, match=f"keeps the run's own --{name}:"):
        resume(*argv, amp=False)


def test_resume_still_checks_what_is_typed():
    """A bad value is refused as in a new run."""
    with pytest.raises(UserError, match="--epochs"):
        resume("--epochs", "0")
