"""The run folder and how a script ends: locks, metrics.json, exit codes and signals."""

import json
import os
import re
import shlex
import signal
import sys
import time
from argparse import ArgumentTypeError, Namespace
from pathlib import Path

import pytest
import torch

from common.errors import Interrupted, UserError, exit_code, make_parser, number
from common.run import finish, open_run, replacing, watching_signals, write_csv
from tests.helpers import POSIX, refusal

ROOT = Path(__file__).resolve().parent.parent


# ------------------------------------------------------------------------------------- open_run


def test_the_default_folder_says_what_and_when(tmp_path, monkeypatch, capsys):
    """Without --out a run is found under its script's name and its time."""
    monkeypatch.chdir(tmp_path)
    folder = open_run("smoothgrad")
    assert folder.is_dir()
    assert re.fullmatch(r"runs/smoothgrad/\d{8}-\d{6}", folder.as_posix())
    assert capsys.readouterr().out == f"run      {folder}\n"  # one of the first lines of a run


def test_a_folder_is_made_with_its_parents(tmp_path):
    """--out may name a folder that isn't there, or an empty one."""
    assert open_run("s", str(tmp_path / "a" / "b")) == tmp_path / "a" / "b"
    (tmp_path / "empty").mkdir()
    assert open_run("s", tmp_path / "empty").is_dir()


def test_a_used_folder_is_refused(tmp_path):
    """No run writes over another; the line says how to go on with it, where one can."""
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(UserError, match=f"{tmp_path} isn't empty: choose another --out$"):
        open_run("s", tmp_path)
    (tmp_path / "checkpoint.pt").touch()
    with pytest.raises(UserError, match=f"{tmp_path} isn't empty.*--resume {tmp_path}"):
        open_run("s", tmp_path)
    assert (tmp_path / "metrics.json").read_text() == "{}"


def test_resume_takes_up_the_folder(tmp_path):
    """A resumed run writes where it was, whether its folder or its checkpoint is given."""
    (tmp_path / "checkpoint.pt").write_text("state")
    assert open_run("s", out="elsewhere", resume=tmp_path) == tmp_path
    assert open_run("s", resume=str(tmp_path / "checkpoint.pt")) == tmp_path


@pytest.mark.parametrize("inside", [False, True])
def test_a_file_is_no_folder(inside, tmp_path):
    """A file in the way is named, and left alone."""
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    with pytest.raises(UserError, match="is a file, not a folder: choose another --out"):
        open_run("s", file / "run" if inside else file)
    assert file.read_text() == "mine"


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    """Any other obstacle is told with the system's reason; here a name that is too long."""
    with pytest.raises(UserError, match=r"can't write to .*name too long"):
        open_run("s", tmp_path / ("x" * 300))


def test_one_process_can_use_its_folder_again(tmp_path):
    """In a notebook a run is trained, then resumed, without a restart in between."""
    folder = open_run("s", tmp_path / "run")
    assert open_run("s", resume=folder) == folder
    assert open_run("s", resume=folder) == folder


# ------------------------------------------------------------------------------------ whole files


def test_replacing_is_all_or_nothing(tmp_path):
    """A reader sees the old file until the new one is whole; a failure changes nothing."""
    file = tmp_path / "deep" / "a.txt"
    with replacing(file) as part:
        part.write_text("one")
        assert not file.exists()
        assert part.suffix == ".txt"  # writers choose the format by it
    assert file.read_text() == "one"

    def write_half():
        with replacing(file) as part:
            part.write_text("half")
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 (raised by the test itself)
        write_half()
    assert file.read_text() == "one"
    assert [f.name for f in file.parent.iterdir()] == ["a.txt"]


def test_csv(tmp_path, full_disk):
    """A table has a header and a row each, and survives a full disk as it was."""
    file = tmp_path / "metrics.csv"
    write_csv(file, [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25}])
    assert file.read_bytes().split() == [b"epoch,loss", b"1,0.5", b"2,0.25"]
    with full_disk(), pytest.raises(OSError, match="too large"):
        write_csv(file, [{"epoch": i, "loss": 0.1} for i in range(1000)])
    assert file.read_bytes().split() == [b"epoch,loss", b"1,0.5", b"2,0.25"]
    write_csv(tmp_path / "none.csv", [])
    assert [f.name for f in tmp_path.iterdir()] == ["metrics.csv"]  # without a row, no file


# ------------------------------------------------------------------------------------------ finish


def parse_strictly(text):
    """Parse JSON as other languages do: without NaN and Infinity.

    :rtype: dict
    """
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_finish_writes_what_others_read(tmp_path, capsys):
    """metrics.json has the names that DESIGN promises, and lists every file of the run."""
    folder = open_run("s", tmp_path / "run")
    (folder / "samples").mkdir()
    (folder / "samples" / "a.png").write_bytes(b"picture")
    (folder / "metrics.csv").write_text("epoch\n1\n")
    argv = ["--out", "my run", "--epochs", 2]
    epochs = [{"epoch": 1, "d_loss": 0.5}]
    args = Namespace(epochs=2, lr=None, name="größer", amp=False)
    capsys.readouterr()
    returned = finish(folder, "s", args, argv, "glyphs", torch.device("cpu"), time.time() - 5,
                      epochs=epochs)  # fmt: skip

    saved = parse_strictly((folder / "metrics.json").read_text(encoding="utf-8"))
    assert saved == returned
    assert list(saved) == ["command", "args", "dataset", "device", "versions", "seconds", "epochs",
                           "files"]  # fmt: skip
    assert shlex.split(saved["command"]) == ["python", "s.py", "--out", "my run", "--epochs", "2"]
    assert saved["args"] == vars(args)
    assert saved["dataset"] == "glyphs"
    assert saved["device"].startswith("cpu (")
    assert saved["versions"]["torch"] == torch.__version__
    assert 5 <= saved["seconds"] < 60
    assert saved["epochs"] == epochs
    assert saved["files"] == ["samples/a.png", "metrics.csv", "metrics.json"]  # and no .lock
    assert all((folder / name).is_file() for name in saved["files"])
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"wrote    {folder / name}" for name in saved["files"]]


def test_finish_again_lists_each_file_once(tmp_path, monkeypatch, capsys):
    """A resumed run finds its own metrics.json there, and takes the command from sys.argv."""
    monkeypatch.setattr(sys, "argv", ["/somewhere/s.py", "--resume", "run"])
    for _ in range(2):
        metrics = finish(tmp_path, "s", Namespace(), None, "d", torch.device("cpu"), time.time())
    assert metrics["command"] == "python s.py --resume run"
    assert metrics["files"] == ["metrics.json"]


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
    ("kind", "low", "high", "text", "words"),
    [
        (int, 1, None, "0", "a whole number of at least 1"),
        (int, 1, None, "1.5", "a whole number"),
        (int, 1, None, "ten", "not 'ten'"),
        (int, 1, None, "", "not ''"),
        (int, 0, 9, "10", "a whole number from 0 to 9"),
        (int, 1, None, "1" + "0" * 400, "a whole number"),
        (float, 0, 1, "1.0001", "a number from 0 to 1"),
        (float, 0, 1, "-1e-9", "a number"),
        (float, 0, None, "nan", "a number of at least 0"),
        (float, 0, None, "inf", "not 'inf'"),
        (float, 0, 1, "-inf", "not '-inf'"),
        (float, 0, 1, "0,5", "not '0,5'"),
    ],
)
def test_number_refuses_the_rest(kind, low, high, text, words):
    """What no script can work with is refused, saying what would do."""
    with pytest.raises(ArgumentTypeError) as caught:
        number(kind, low, high)(text)
    assert words in str(caught.value)


def test_a_parser_says_it_in_one_line():
    """A wrong flag is one line with the way to --help, not a block of usage."""
    parser = make_parser("train", None)
    parser.add_argument("--n", type=number(int, 1))
    for argv in (["--n", "x"], ["--m", "1"], ["--n"]):
        message = refusal(parser.parse_args, argv)
        assert argv[0] in message
        assert "--help" in message


def test_help_teaches(monkeypatch):
    """--help fits the terminal, keeps equations, and shows the defaults that say something."""
    monkeypatch.setenv("COLUMNS", "60")
    long = "A paragraph of two lines, which is wider than\nthe terminal if each is kept as it is."
    parser = make_parser("train", f"One line.\n\n    python train.py\n\n{long}")
    parser.add_argument("--n", default=7, help="how many")
    parser.add_argument("--lr", help="learning rate")
    parser.add_argument("--amp", action="store_true", help="mixed precision")
    text = parser.format_help()
    assert text.startswith("usage: train.py ")
    assert "One line.\n\n    python train.py\n" in text
    assert long not in text
    assert long.replace("\n", " ") in " ".join(text.split())
    assert max(len(line) for line in text.splitlines()) < 60
    assert "how many (default: 7)" in text
    assert text.count("default") == 1  # "(default: None)" would teach nothing


def test_help_names_a_default_once():
    """Not again where the words already do, nor as that of a flag which turns something off."""
    parser = make_parser("train", "One line.")
    parser.add_argument("--size", default=[1, 2], help="pixels (default: all)")
    parser.add_argument("--no-flip", dest="flip", action="store_false", help="don't mirror")
    assert parser.format_help().count("default") == 1


@pytest.mark.parametrize(
    ("ending", "code", "line"),
    [
        (None, 0, None),
        (UserError("no such photo: give another"), 2, "error: no such photo: give another"),
        (Interrupted("saved; resume with X", signal.SIGINT), 130, "saved; resume with X"),
        (Interrupted("saved; resume with X", signal.SIGTERM), 143, "saved; resume with X"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device"), 2,
         "error: writing: No space left on device: make room, then go on with --resume, or start "
         "again"),
        (PermissionError(13, "Permission denied", "a.png"), 2,
         "error: a.png: Permission denied: choose a place that you may read and write"),
        (OSError(5, "Input/output error", "a.png"), 2, "error: a.png: Input/output error"),
        (OSError("cannot write mode F as PNG"), 2, "error: writing: cannot write mode F as PNG"),
    ],
)  # fmt: skip
def test_exit_codes(ending, code, line, capsys):
    """Every ending has the code that DESIGN gives it, and at most one line on stderr."""

    def main():
        if ending:
            raise ending

    assert exit_code(main) == code
    assert capsys.readouterr() == ("", f"{line}\n" if line else "")


def test_a_bug_is_not_hidden():
    """What the user can't mend keeps its traceback, and --help its own end."""
    for error in (ZeroDivisionError(), SystemExit(0)):

        def main(error=error):
            raise error

        with pytest.raises(type(error)):
            exit_code(main)


# ----------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_and_the_loop_goes_on(signum):
    """The loop decides where to stop; nothing is torn down in the middle of a batch."""
    before = signal.getsignal(signum)
    with watching_signals() as stop:
        assert stop() == 0
        signal.raise_signal(signum)
        assert stop() == signum
        assert stop() == signum  # it stays so, however often it is asked
    assert stop.signum == signum
    assert signal.getsignal(signum) is before


def test_signals_mean_what_they_meant_before():
    """After the loop Ctrl-C works as ever, also when the loop failed."""
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ZeroDivisionError), watching_signals():
        raise ZeroDivisionError
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


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
        sys.stdout, sys.stderr = os.fdopen(write, "w"), open(tmp_path / "errors", "w")  # noqa: SIM115
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
