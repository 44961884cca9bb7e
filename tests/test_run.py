"""The run folder: files whole or absent, checkpoints never executed, and how a script ends."""

import argparse
import csv
import json
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from common.errors import SIGNALS, Interrupted, UserError, exit_code, interruptible, number
from common.run import (
    FORMS,
    load_checkpoint,
    open_run,
    read_text,
    replacing,
    restore,
    resume_args,
    save_checkpoint,
    write_csv,
    write_metrics,
)
from tests.helpers import POSIX, assert_same, refusal
from tests.hostile import CLAIMS, ODD
from tests.processes import fork, wait, wait_for

# ------------------------------------------------------------------------------------- open_run


def test_the_default_folder_says_what_and_when(tmp_path, monkeypatch, capsys):
    """Without --out a run is found under its script's name and its time, two in one second too."""
    monkeypatch.chdir(tmp_path)
    first, second = open_run("smoothgrad"), open_run("smoothgrad")
    assert first.is_dir()
    assert first != second
    assert re.fullmatch(r"runs/smoothgrad/\d{8}-\d{6}", first.as_posix())
    assert capsys.readouterr().out.splitlines()[0] == f"run      {first}"


def test_a_folder_is_made_with_its_parents(tmp_path):
    """--out may name a folder that isn't there, or an empty one."""
    assert open_run("s", str(tmp_path / "a" / "b")) == tmp_path / "a" / "b"
    (tmp_path / "empty").mkdir()
    assert open_run("s", tmp_path / "empty").is_dir()


def test_a_used_folder_is_refused_and_left_alone(tmp_path):
    """No run writes over another, nor leaves a lock in a folder of something else."""
    (tmp_path / "photo.jpg").write_text("mine")
    assert f"--resume {tmp_path}" in refusal(open_run, "s", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["photo.jpg"]


def test_resume_takes_up_the_folder(tmp_path):
    """A resumed run writes where it was, and sweeps up what a killed process was writing."""
    (tmp_path / "samples").mkdir()
    for name in ("checkpoint.pt", ".notes", ".checkpoint.0a1b2c3d.part.pt",
                 "samples/.a.0a1b2c3d.part.png"):  # fmt: skip
        (tmp_path / name).write_text("state")
    assert open_run("s", out="elsewhere", resume=tmp_path) == tmp_path
    assert open_run("s", resume=str(tmp_path / "checkpoint.pt")) == tmp_path  # in one process: fine
    left = {file.name for file in tmp_path.rglob("*") if file.is_file()}
    assert left == {"checkpoint.pt", ".notes", ".lock"}


@POSIX
@pytest.mark.parametrize("target", ["victim", "gone", "folder"])
@pytest.mark.parametrize("name", [".lock", "samples", "records", "tensorboard/a/b", "a pipe"])
@pytest.mark.parametrize("resumed", [False, True])
def test_a_run_folder_with_links_is_refused(resumed, name, target, tmp_path):
    """Somebody else's run, unpacked: nothing outside is written, emptied or made."""
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "folder").mkdir()
    run = tmp_path / "run"
    (run / name).parent.mkdir(parents=True)
    if name == "a pipe":
        os.mkfifo(run / name)
    else:
        (run / name).symlink_to(tmp_path / target)
    before = {path: path.lstat() for path in tmp_path.rglob("*") if path.parent != run}
    assert str(run) in refusal(open_run, "s", **{"resume" if resumed else "out": run})
    after = {path: path.lstat() for path in tmp_path.rglob("*") if path.parent != run}
    assert after == before


def test_a_lock_is_never_emptied(tmp_path):
    """A second name of another file, as an archive may hold one, isn't known by its kind."""
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "run").mkdir()
    os.link(tmp_path / "victim", tmp_path / "run" / ".lock")
    assert ".lock" in refusal(open_run, "s", resume=tmp_path / "run")
    assert (tmp_path / "victim").read_text() == "mine"


@pytest.mark.parametrize("inside", [False, True])
def test_a_file_is_no_folder(inside, tmp_path):
    """A file in the way is named, and left alone."""
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    assert str(file) in refusal(open_run, "s", file / "run" if inside else file)
    assert file.read_text() == "mine"


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    """Any other obstacle is told with the system's reason; here a name that is too long."""
    assert "name too long" in refusal(open_run, "s", tmp_path / ("x" * 300))


@POSIX
def test_two_processes_do_not_share_a_folder(tmp_path):
    """The second is refused; when the first has died, however it did, the folder is free again."""
    log = tmp_path / "log"

    def hold():
        open_run("s", tmp_path / "run")
        time.sleep(60)

    child = fork(hold, log)
    wait_for(child, log, "run ")
    assert "in use" in refusal(open_run, "s", resume=tmp_path / "run")
    os.kill(child, signal.SIGKILL)
    wait(child)
    assert open_run("s", resume=tmp_path / "run").is_dir()


# ------------------------------------------------------------------------------------ whole files


def test_replacing_is_all_or_nothing(tmp_path):
    """A reader sees the old file until the new one is whole; a failure changes nothing."""
    file = tmp_path / "a.txt"
    with replacing(file) as part:
        part.write_text("one")
        assert not file.exists()
        assert part.suffix == ".txt"  # writers choose the format by it
    assert file.read_text() == "one"

    for error in (ValueError, KeyboardInterrupt):

        def write_half(error=error):
            with replacing(file) as part:
                part.write_text("half")
                raise error

        with pytest.raises(error):
            write_half()
        assert file.read_text() == "one"
        assert [f.name for f in tmp_path.iterdir()] == ["a.txt"]


@POSIX
def test_replacing_follows_no_link(tmp_path):
    """Where a link has been planted, the link is replaced, and what it leads to stays."""
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a.txt").symlink_to(tmp_path / "victim")
    with replacing(tmp_path / "run" / "a.txt") as part:
        part.write_text("new")
    assert (tmp_path / "victim").read_text() == "mine"
    assert (tmp_path / "run" / "a.txt").read_text() == "new"


def test_a_deleted_folder_is_not_made_anew(tmp_path):
    """Half of a run, without its beginning, would be worse than none."""
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "gone" / "a.txt"):
        pass


def test_csv_holds_no_formulas(tmp_path):
    """A spreadsheet executes what begins like one, also in the header; numbers stay numbers."""
    names = ["=cmd|' /C calc'!A0", "+1", "-1", "@SUM(A1)", "\t=1", "plain"]
    write_csv(tmp_path / "a.csv", [{"=path": name, "gap": -0.5} for name in names])
    with open(tmp_path / "a.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["'=path", "gap"]
    assert rows == [[f"'{name}", "-0.5"] for name in names[:-1]] + [["plain", "-0.5"]]


def test_csv(tmp_path, full_disk):
    """A table has a header and a row each, and survives a full disk as it was."""
    file = tmp_path / "metrics.csv"
    write_csv(file, [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25, "fid": 3}])
    whole = [b"epoch,loss,fid", b"1,0.5,", b"2,0.25,3"]
    assert file.read_bytes().split() == whole
    with full_disk(), pytest.raises(OSError, match="too large"):
        write_csv(file, [{"epoch": i, "loss": 0.1} for i in range(1000)])
    assert file.read_bytes().split() == whole
    write_csv(tmp_path / "none.csv", [])
    assert [f.name for f in tmp_path.iterdir()] == ["metrics.csv"]  # without a row, no file


def test_metrics_are_what_others_read(tmp_path, monkeypatch):
    """metrics.json has the names that the README promises, and is JSON for every language."""
    args = argparse.Namespace(epochs=2, lr=None, name="größer", amp=False)
    found = {"script": "s", "dataset": "glyphs", "epochs": [{"epoch": 1, "loss": float("nan")}]}
    argv = ["--out", "my run", "--epochs", 2]
    device = torch.device("cpu")
    returned = write_metrics(tmp_path, args, argv, time.time() - 5, device, **found)
    text = (tmp_path / "metrics.json").read_text(encoding="utf-8")
    saved = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert saved == returned
    assert shlex.split(saved["command"]) == ["python", "s.py", "--out", "my run", "--epochs", "2"]
    assert saved["args"] == vars(args)
    assert saved["device"].startswith("cpu (")
    assert saved["versions"]["torch"] == torch.__version__
    assert 5 <= saved["seconds"] < 60
    assert saved["epochs"] == [{"epoch": 1, "loss": None}]
    monkeypatch.setattr(sys, "argv", ["/somewhere/s.py", "--resume", "run"])
    again = write_metrics(tmp_path, args, None, time.time(), device, script="s")
    assert again["command"] == "python s.py --resume run"


# ------------------------------------------------------------------------------------- checkpoints


def make_state(seed=0):
    """Make what a script saves, about 5 kB."""
    rng = torch.Generator().manual_seed(seed)
    return {
        "script": "train",
        "weights": {"w": torch.randn(1000, generator=rng), "n": torch.tensor(3)},
        "args": {"lr": None, "epochs": 5, "name": "größer", "amp": False, "list": [1, 2.5]},
    }


def test_round_trip(tmp_path):
    """What was saved comes back, from the run's folder or from the file itself."""
    save_checkpoint(tmp_path / "checkpoint.pt", make_state())
    for path in (tmp_path, str(tmp_path / "checkpoint.pt")):
        assert_same(dict(load_checkpoint(path, "train")), make_state())
    assert [f.name for f in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, full_disk):
    """No room for a new checkpoint is an OSError that names it; the old one stays."""
    save_checkpoint(tmp_path / "checkpoint.pt", make_state())
    with full_disk(), pytest.raises(OSError, match="disk full") as caught:
        save_checkpoint(tmp_path / "checkpoint.pt", make_state(1))
    assert caught.value.filename == str(tmp_path / "checkpoint.pt")
    assert [f.name for f in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert_same(dict(load_checkpoint(tmp_path, "train")), make_state())


def test_numbers_that_are_none_are_never_saved(tmp_path):
    """A resumed run would go on from NaN; the checkpoint before it stays."""
    save_checkpoint(tmp_path / "checkpoint.pt", make_state())
    state = make_state(1)
    state["weights"]["w"][7] = float("inf")
    assert "--lr" in refusal(save_checkpoint, tmp_path / "checkpoint.pt", state)
    assert_same(dict(load_checkpoint(tmp_path, "train")), make_state())


def test_nothing_there(tmp_path):
    """A wrong path is named, and what to give instead."""
    for path in (tmp_path, tmp_path / "nowhere"):
        assert str(path) in refusal(load_checkpoint, path, "train")


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
    good = file.read_bytes()
    refused = 0
    for place in range(0, len(good), 41):
        file.write_bytes(good[:place] + bytes([good[place] ^ 16]) + good[place + 1 :])
        try:
            state = load_checkpoint(tmp_path, "train")
        except UserError:
            refused += 1
        else:
            assert_same(dict(state), make_state())
    assert refused > 0.7 * len(good) / 41  # of 5 kB, the weights are 4


@pytest.mark.parametrize("content", ["text", "a list", "another zip", "a pickle"])
def test_other_files_are_refused(content, tmp_path):
    """A file that is no checkpoint is said to be none, by its path."""
    file = tmp_path / "checkpoint.pt"
    if content == "text":
        file.write_text("no checkpoint")
    elif content == "a list":
        torch.save([1, 2], file)
    elif content == "a pickle":
        file.write_bytes(pickle.dumps({"script": "train"}))
    else:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("a.txt", "text")
    assert str(file) in refusal(load_checkpoint, tmp_path, "train")


@pytest.mark.parametrize("bomb", ["compressed", "overlapping"])
def test_a_zip_bomb_is_refused_before_it_is_unpacked(bomb, tmp_path, monkeypatch):
    """A file that says it holds more than it is long was not written by torch."""
    file = tmp_path / "checkpoint.pt"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(5_000_000 if bomb == "compressed" else 100))
        if bomb == "overlapping":  # a thousand names for the same bytes
            (first,) = archive.filelist
            first.compress_type = zipfile.ZIP_STORED
            archive.filelist += [first] * 1000
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda _: pytest.fail("unpacked"))
    assert str(file) in refusal(load_checkpoint, tmp_path, "train")


def test_the_checkpoint_of_another_script_or_version_is_refused(tmp_path):
    """The message says who wrote it, or what it lacks."""
    save_checkpoint(tmp_path / "checkpoint.pt", make_state())
    assert "train.py" in refusal(load_checkpoint, tmp_path, "explain")
    state = load_checkpoint(tmp_path, "train")
    assert "'history'" in refusal(lambda: state["history"])


@pytest.mark.parametrize("name", CLAIMS)
def test_what_claims_to_be_large_costs_nothing(name, tmp_path):
    """Files of a few kB, whose contents would take hours or all memory, or aren't ours."""
    torch.save({"script": "train", "entry": CLAIMS[name]}, tmp_path / "checkpoint.pt")
    began = time.process_time()
    assert "readable checkpoint" in refusal(load_checkpoint, tmp_path, "train")
    assert time.process_time() - began < 2


@pytest.mark.parametrize("name", FORMS)
def test_entries_of_other_types_are_refused(name, tmp_path):
    """Whoever wrote a checkpoint: what isn't refused is what the scripts can read."""
    tensors = [torch.ones(2), [torch.ones(2)]]
    for value in [*tensors, *(value for value in ODD if value != 10**400)]:  # which isn't pickled
        torch.save({"script": "train"} | {name: value}, tmp_path / "checkpoint.pt")
        try:
            state = load_checkpoint(tmp_path, "train")
        except UserError:
            continue
        assert FORMS[name](state[name])
        assert not torch.is_tensor(state[name])


@POSIX
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_no_pipe_or_device_is_read(kind, tmp_path):
    """One would wait for ever, or never end."""
    if kind == "pipe":
        os.mkfifo(tmp_path / "checkpoint.pt")
    else:
        (tmp_path / "checkpoint.pt").symlink_to("/dev/zero")
    assert str(tmp_path) in refusal(load_checkpoint, tmp_path, "train")
    with pytest.raises(OSError, match="no file"):
        read_text(tmp_path / "checkpoint.pt")


class Evil:
    """Creates a folder when it is unpickled."""

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


def test_restore_refuses_what_does_not_fit(tmp_path):
    """Other sizes are refused, an optimizer's too, which torch itself lets pass."""

    def make(n):
        layer = torch.nn.Linear(3, n)
        optimizer = torch.optim.Adam(layer.parameters())
        layer(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        return {"layer": layer, "optimizer": optimizer}

    def saved(parts):
        state = {name: part.state_dict() for name, part in parts.items()}
        save_checkpoint(tmp_path / "checkpoint.pt", {"script": "train", **state})
        return load_checkpoint(tmp_path, "train")

    parts, others = make(2), make(2)
    restore(others, saved(parts))
    assert_same(others["optimizer"].state_dict(), parts["optimizer"].state_dict())
    state = saved(make(4))
    for name in parts:
        assert "fit" in refusal(restore, {name: parts[name]}, state)


# ------------------------------------------------------------------------------------- resume_args


def resume(*argv, **saved):
    """Resume a run of a small script."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS)
    parser.add_argument("--epochs", type=number(int, 1), default=20)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--amp", action="store_true")
    parser.add_argument("--resume")
    settings = {"epochs": 5, "lr": 0.1, "amp": True, "resume": None} | saved
    return resume_args(parser, [*argv, "--resume", "run"], settings, {"epochs", "resume"})


def test_resume_keeps_the_settings():
    """What isn't typed is the run's, not the script's default; what may change, does."""
    assert resume() == argparse.Namespace(epochs=5, lr=0.1, amp=True, resume="run")
    args = resume("--epochs", "9", "--lr", "0.1", "--amp")  # repeating a setting is no change
    assert (args.epochs, args.lr, args.amp) == (9, 0.1, True)


@pytest.mark.parametrize(("argv", "name"), [(["--lr", "0.2"], "lr"), (["--amp"], "amp")])
def test_resume_refuses_another_experiment(argv, name):
    """A setting that the weights depend on can't change half-way."""
    assert f"--{name}" in refusal(lambda: resume(*argv, amp=False))


@pytest.mark.parametrize(
    ("name", "value"),
    [("epochs", 0), ("epochs", True), ("epochs", 5.0), ("epochs", "5"), ("epochs", None),
     ("epochs", [5]), ("lr", "0.1"), ("lr", float("nan")), ("lr", torch.ones(1)), ("lr", {}),
     ("amp", 1), ("amp", None), ("amp", "yes"), ("resume", 3), ("resume", "a\0b"),
     ("unknown", 1), ("help", True)],
)  # fmt: skip
def test_resume_reads_saved_settings_as_strictly_as_typed_ones(name, value):
    """Types, ranges and names: a run's arguments may be anybody's."""
    assert f"{name} = " in refusal(lambda: resume(**{name: value}))


def test_resume_still_checks_what_is_typed(capsys):
    """A bad value is refused as in a new run, in one line."""
    with pytest.raises(SystemExit):
        resume("--epochs", "0")
    assert capsys.readouterr().err.count("\n") == 1


# --------------------------------------------------------------------------------- errors and exit


@pytest.mark.parametrize(
    ("kind", "low", "high", "text", "value"),
    [
        (int, 1, None, "1", 1),
        (int, 0, 2**32 - 1, "4294967295", 2**32 - 1),
        (float, 0, 1, "0", 0.0),
        (float, 0, 1, "1.0", 1.0),
        (float, 1e-12, None, "2e-4", 2e-4),
    ],
)
def test_number_takes_its_range(kind, low, high, text, value):
    """Both ends of the range are in it, and the type is as asked."""
    found = number(kind, low, high)(text)
    assert (found, type(found)) == (value, kind)


@pytest.mark.parametrize(
    ("kind", "low", "high", "texts"),
    [
        (int, 1, None, ["0", "1.5", "ten", "", "1" + "0" * 400, str(2**31)]),
        (int, 0, 9, ["10", "-1"]),
        (float, 0, 1, ["1.0001", "-1e-9", "-inf", "0,5", "nan"]),
        (float, 0, None, ["nan", "inf", "1e400"]),
    ],
)
def test_number_refuses_the_rest(kind, low, high, texts, capsys):
    """What no script can work with is refused in one line that names the range."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS)
    parser.add_argument("--n", type=number(kind, low, high))
    for text in texts:
        with pytest.raises(SystemExit):
            parser.parse_args([f"--n={text}"])
        error = capsys.readouterr().err
        assert "--n" in error
        assert str(low) in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("ending", "code", "words"),
    [
        (None, 0, ""),
        (UserError("no such photo: give another"), 2, "error: no such photo: give another"),
        (UserError("a name\nof two lines"), 2, "error: a name of two lines"),
        (UserError("3 of 5 failed", code=1), 1, "error: 3 of 5 failed"),
        (Interrupted("go on with X", signal.SIGINT), 130, "go on with X"),
        (Interrupted("go on with X", signal.SIGTERM), 143, "go on with X"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device"), 2, "No space left on device: make room"),
        (PermissionError(13, "Permission denied", "a.png"), 2, "a.png: Permission denied: choose"),
        (OSError("cannot write mode F as PNG"), 2, "cannot write mode F as PNG"),
        (MemoryError(), 2, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "out of memory"),
        (
            RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors might be"),
            2,
            "the GPU failed (CUDA error: unspecified launch failure): go on with --resume",
        ),
    ],
)
def test_exit_codes(ending, code, words, capsys):
    """Every ending has its code, and at most one line on stderr."""

    def main():
        if ending:
            raise ending

    assert exit_code(main) == code
    out, error = capsys.readouterr()
    assert out == ""
    assert words in error
    assert error.count("\n") == bool(words)


@POSIX
@pytest.mark.parametrize("kind", ["closed", "full"])
def test_a_run_goes_on_without_stderr(kind, monkeypatch):
    """`2>&-`, or a full disk: progress bars and warnings are lost, and nothing else."""
    done = []

    def main():
        for _ in tqdm(range(3)):
            print("warning: " + "x" * 10_000, file=sys.stderr)
        sys.stderr.flush()
        done.append(True)

    stream = open("/dev/full", "w") if kind == "full" else None  # noqa: SIM115 (of this test)
    monkeypatch.setattr(sys, "stderr", stream)
    assert exit_code(main) == 0
    assert done


def test_a_restart_by_torchrun_goes_on(tmp_path, monkeypatch):
    """--max-restarts types the same command again: it becomes the --resume of its own run."""
    run = str(tmp_path)
    seen = []
    for count, argv, more in (
        ("0", ["--out", run], []),
        ("1", ["--epochs", "3"], []),  # in a folder by date and time
        ("1", ["--out", run], ["--resume", run]),
        ("1", [f"--out={run}"], ["--resume", run]),
        ("1", ["--resume", run], []),
        ("1", ["--out", str(tmp_path / "new")], []),
    ):
        (tmp_path / "checkpoint.pt").touch()
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        monkeypatch.setattr(sys, "argv", ["s.py", *argv])
        exit_code(lambda: seen.append(sys.argv[1:]))
        assert seen.pop() == [*argv, *more]


def test_a_bug_is_not_hidden():
    """What the user can't mend keeps its traceback, and --help its own end."""
    asserted = RuntimeError("CUDA error: device-side assert triggered")
    for error in (ZeroDivisionError(), RuntimeError("a shape"), asserted, SystemExit(0)):

        def main(error=error):
            raise error

        with pytest.raises(type(error)):
            exit_code(main)


@POSIX
@pytest.mark.parametrize("signum", SIGNALS)
@pytest.mark.parametrize("begun", [True, False])
def test_a_signal_ends_in_one_line_that_says_how_to_go_on(begun, signum, tmp_path):
    """Also where a reader catches whatever a damaged file raises, and however often it comes."""
    if begun:
        (tmp_path / "checkpoint.pt").touch()

    def main():
        signal.signal(signum, signal.SIG_DFL)  # the tests may run under nohup, which ignores one
        with interruptible("train", tmp_path):
            print("ready", flush=True)
            while True:
                try:
                    time.sleep(0.01)
                except Exception as error:
                    print("swallowed", error)

    log = tmp_path / "log"
    child = fork(main, log)
    wait_for(child, log, "ready")
    for _ in range(3):
        os.kill(child, signum)
    assert wait(child) == 128 + signum
    _, line = log.read_text().splitlines()
    assert line.startswith("stopped")
    # Before the first checkpoint there is nothing that --resume could go on with.
    assert (f"python train.py --resume {tmp_path}" in line) == begun


@POSIX
def test_a_signal_that_is_ignored_stays_ignored(tmp_path):
    """As nohup, and a shell in the background, want it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible("train", tmp_path):
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_signal_cuts_nothing_short(tmp_path):
    """Some schedulers send it to the process and to its group: half files are removed still."""
    removed = []

    def work():
        with interruptible("s", tmp_path):
            try:
                signal.raise_signal(signal.SIGINT)
            finally:
                signal.raise_signal(signal.SIGTERM)
                removed.append("half a file")

    with pytest.raises(Interrupted) as caught:
        work()
    assert caught.value.signum == signal.SIGINT
    assert removed


def test_ctrl_c_before_there_is_a_run_is_one_line():
    """While torch is imported; what is no Ctrl-C keeps its traceback."""
    for error, lines in (("KeyboardInterrupt", 1), ("ZeroDivisionError", 4)):
        command = [sys.executable, "-c", f"import common\nraise {error}"]
        root = Path(__file__).resolve().parent.parent
        found = subprocess.run(command, cwd=root, capture_output=True, text=True)
        assert found.returncode != 0
        assert len(found.stderr.splitlines()) == pytest.approx(lines, abs=lines // 4)


def test_signals_mean_what_they_meant_before(tmp_path):
    """After the block Ctrl-C works as ever, also when the block failed."""
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ZeroDivisionError), interruptible("s", tmp_path):
        raise ZeroDivisionError
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


@POSIX
def test_a_reader_that_leaves_is_no_error(tmp_path):
    """`python script.py | head -1` ends quietly, with the code of a broken pipe."""

    def main():
        for _ in range(100_000):
            print("a line", flush=True)

    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        sys.stdout = os.fdopen(write, "w")
        sys.stderr = open(tmp_path / "errors", "w")  # noqa: SIM115 (closed with the process)
        code = 99  # a traceback
        try:
            code = exit_code(main)
            sys.stdout.close()  # as the interpreter does when it ends: once more into the pipe
        except OSError as error:
            sys.stderr.write(repr(error))
        finally:
            sys.stderr.close()
            os._exit(code)
    os.close(write)
    assert os.read(read, 7) == b"a line\n"
    os.close(read)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGPIPE
    assert (tmp_path / "errors").read_text() == ""
