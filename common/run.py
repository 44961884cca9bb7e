"""The run folder: files that are whole or absent, checkpoints, metrics.json and metrics.csv."""

import csv
import errno
import json
import math
import os
import platform
import secrets
import shlex
import sys
import time
import zipfile
from contextlib import contextmanager
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import filelock
import torch

from common.device import describe_device, is_first, share_from_first
from common.errors import UserError

_locks = []  # of this process's run folders: they are held until the process ends


def open_run(script, out=None, resume=None):
    """Make the run folder, or take up an existing one, and lock it; rank 0 does so for all.

    :param str script: name of the script, without .py
    :param str out: the folder asked for; None for runs/SCRIPT/DATE-TIME
    :param str resume: the run to go on with, its folder or its checkpoint; ``out`` is then ignored
    :return: the folder
    :rtype: pathlib.Path
    :raises UserError: if it isn't empty (and not resumed), can't be made, or is in use
    """
    if not is_first():
        return share_from_first(None)
    folder = Path(resume or out or f"runs/{script}/{datetime.now():%Y%m%d-%H%M%S}")
    if resume and folder.is_file():
        folder = folder.parent
    while not (resume or out) and folder.exists():  # another run began in the same second
        folder = folder.with_name(f"{folder.name}b")
    other = "make that possible" if resume else "choose another --out"
    try:
        if not resume and any(file.name != ".lock" for file in folder.glob("*")):
            raise UserError(f"{folder} isn't empty: choose another --out, or --resume {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / ".lock", is_singleton=True)
        lock.acquire(blocking=False)
        _locks.append(lock)
        for file in folder.rglob(".*.????????.part*"):  # what a killed process was just writing
            file.unlink(missing_ok=True)
    except filelock.Timeout:
        raise UserError(f"{folder} is in use by another process: {other}") from None
    except (NotADirectoryError, FileExistsError):
        raise UserError(f"{folder} is a file, not a folder: choose another --out") from None
    except OSError as error:
        raise UserError(f"can't write to {folder} ({error.strerror}): {other}") from error
    print(f"run      {folder}", flush=True)
    return share_from_first(folder)


@contextmanager
def replacing(path):
    """Give a temporary path to write to, and move it to ``path`` once it is whole.

    A reader sees the old file or the new one, never half of either, whenever the process dies.

    :param str path: the file to make or to replace, in a folder that exists
    :return: a context manager giving the temporary path, in the same folder, of the same suffix
    :rtype: contextlib.AbstractContextManager[pathlib.Path]
    """
    path = Path(path)
    part = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.part{path.suffix}")
    open(part, "xb").close()  # a name that nobody could guess, and a file that wasn't there
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())  # a rename may reach the disk before the bytes do
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------- checkpoints


class Checkpoint(dict):
    """What a checkpoint holds. What it lacks is said in one line: anybody may have written it."""

    def __missing__(self, key):
        """Refuse what another version wrote."""
        raise UserError(f"the checkpoint lacks {key!r}: start a new run with this version")


def save_checkpoint(path, state):
    """Write a checkpoint atomically.

    :param pathlib.Path path: the file, usually RUN/checkpoint.pt
    :param dict state: tensors, and plain Python values: numbers, strings, lists, dicts
    :raises UserError: if not all numbers are finite; an earlier file is still there, then
    :raises OSError: if it can't be written; an earlier file is still there, then
    """
    if not is_finite(state):  # the loss may show it only after the next epoch
        raise UserError("not saved: weights are NaN or infinite; start again with a smaller --lr")
    with replacing(path) as part:
        try:
            torch.save(state, part)
        except RuntimeError as error:  # what torch makes of a full disk
            raise OSError(errno.EIO, "can't be written: is the disk full?", str(path)) from error


def is_finite(value):
    """Tell whether all tensors in dicts and lists hold finite numbers only."""
    if isinstance(value, dict):
        return all(is_finite(part) for part in value.values())
    if isinstance(value, (list, tuple)):
        return all(is_finite(part) for part in value)
    return not torch.is_tensor(value) or bool(value.isfinite().all())


def read_tensors(path):
    """Read a file that torch.save wrote, executing nothing that it may hold.

    :param pathlib.Path path: the file
    :return: what was saved, on the CPU
    :rtype: object
    :raises Exception: whatever torch and zipfile make of a damaged file
    """
    with zipfile.ZipFile(path) as archive:
        # Nothing is compressed: what would unpack to more than the file isn't torch's.
        if sum(record.file_size for record in archive.infolist()) > path.stat().st_size:
            raise zipfile.BadZipFile
        if archive.testzip():  # torch compares no checksums: a flipped bit would be a weight
            raise zipfile.BadZipFile
    return torch.load(path, map_location="cpu", weights_only=True)


def load_checkpoint(path, script):
    """Read a checkpoint, executing nothing that it may hold.

    :param str path: the file, or the run folder that it lies in
    :param str script: the script that must have written it, as state["script"] says
    :return: the state, on the CPU
    :rtype: Checkpoint
    :raises UserError: if there is none, it can't be read, or another script wrote it
    """
    path = Path(path)
    if path.is_dir():
        path = path / "checkpoint.pt"
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: give the folder of an earlier run")
    try:
        state = Checkpoint(read_tensors(path))
    except Exception as error:  # whatever damage sets off in torch
        raise UserError(
            f"{path} is not a readable checkpoint ({type(error).__name__}): start a new run"
        ) from error
    if state["script"] != script:
        raise UserError(f"{path} was written by {state['script']}.py: give a run of {script}.py")
    return state


def restore(parts, state):
    """Fill networks and optimizers from a checkpoint.

    :param dict parts: by name in the checkpoint, what has a ``load_state_dict``
    :param Checkpoint state: as from :func:`load_checkpoint`
    :raises UserError: if they don't fit: other layers, other sizes
    """
    for name, part in parts.items():
        saved = state[name]
        try:
            part.load_state_dict(saved)
            if isinstance(part, torch.optim.Optimizer):  # it doesn't compare sizes itself
                for weight, values in part.state.items():
                    for value in values.values():
                        if torch.is_tensor(value) and value.ndim and value.shape != weight.shape:
                            raise ValueError("sizes")
        except Exception as error:  # whatever wrong shapes and types set off in torch
            raise UserError(
                "the checkpoint doesn't fit this version of the networks: start a new run"
            ) from error


def resume_args(parser, argv, saved, changeable):
    """Read a command line that resumes a run: the settings are the run's own.

    :param argparse.ArgumentParser parser: the script's; its defaults are changed
    :param list[str] argv: the command line, or None for sys.argv
    :param dict saved: the run's arguments
    :param set[str] changeable: names of those that may be given anew
    :return: the arguments
    :rtype: argparse.Namespace
    :raises UserError: if the command line changes another one
    """
    parser.set_defaults(**saved)  # whatever differs from here on was typed
    args = parser.parse_args(argv)
    for name in saved:
        if name not in changeable and getattr(args, name) != saved[name]:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"--resume keeps the run's own {flag}: leave that out")
    return args


# ------------------------------------------------------------------------------------- the record


def write_metrics(folder, args, argv, started, device, **found):
    """Write metrics.json atomically.

    :param pathlib.Path folder: the run folder
    :param argparse.Namespace args: all arguments
    :param list[str] argv: what was typed; None for sys.argv
    :param float started: time.time() at the start of the work
    :param torch.device device: where it ran
    :param object found: script, dataset, and what was found; plain Python values; NaN and infinity,
        for which JSON has no words, become null
    :return: what was written
    :rtype: dict
    """
    typed = sys.argv[1:] if argv is None else argv
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions.update({name: version(name) for name in ("torchvision", "numpy")})
    metrics = {
        "command": shlex.join(["python", f"{found['script']}.py", *map(str, typed)]),
        "args": vars(args),
        "device": describe_device(device),
        "versions": versions,
        "seconds": round(time.time() - started, 1),
        **found,
    }
    metrics = without_nan(metrics)
    with replacing(folder / "metrics.json") as part:
        text = json.dumps(metrics, indent=2, allow_nan=False)
        part.write_text(text + "\n", encoding="utf-8")
    return metrics


def without_nan(value):
    """Replace what is no finite number by None, in lists and dicts as well."""
    if isinstance(value, dict):
        return {key: without_nan(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_csv(path, rows):
    """Write a table atomically, one row per epoch, step or photo.

    :param pathlib.Path path: the file
    :param list[dict] rows: what a row lacks is left empty; without a row nothing is written
    """
    if not rows:
        return
    header = list(dict.fromkeys(name for row in rows for name in row))
    form = {"newline": "", "encoding": "utf-8", "errors": "backslashreplace"}  # of any file's name
    with replacing(path) as part, open(part, "w", **form) as file:
        writer = csv.DictWriter(file, fieldnames=header)
        writer.writeheader()
        writer.writerows(rows)
