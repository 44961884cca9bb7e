"""The run folder: its name, its lock, metrics.json and metrics.csv; signals."""

import csv
import json
import math
import os
import platform
import re
import shlex
import signal
import sys
import time
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torchvision

from common.device import combine, describe_device, is_first, share_from_first
from common.errors import UserError
from common.watch import show_rows, watch

try:
    import fcntl
except ImportError:  # Windows: no advisory locks, so two runs in one folder go unnoticed there
    fcntl = None


def open_run(script, out=None, resume=None, tensorboard=False):
    """Make the run folder, or take up an existing one, and lock it; rank 0 does so for all.

    :param str script: name of the script, without .py
    :param str out: the folder asked for; None for runs/SCRIPT/DATE-TIME
    :param str resume: the run to go on with, its folder or its checkpoint; ``out`` is then ignored
    :param bool tensorboard: show it in TensorBoard while it goes on
    :return: the folder
    :rtype: pathlib.Path
    :raises UserError: if it isn't empty (and not resumed), can't be made, or is in use
    """
    if not is_first():
        return share_from_first(None)
    now = f"{datetime.now():%Y%m%d-%H%M%S}"
    while not (resume or out) and Path(f"runs/{script}/{now}").exists():
        now += "b"  # another run began in the same second
    folder = Path(resume or out or f"runs/{script}/{now}")
    folder = folder.parent if resume and folder.is_file() else folder
    try:
        kept = [f for f in folder.glob("*") if f.name != ".lock" and not PART.fullmatch(f.name)]
        if kept and not resume:
            also = f", or --resume {folder}" if (folder / "checkpoint.pt").is_file() else ""
            raise UserError(f"{folder} isn't empty: choose another --out{also}")
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a+")  # noqa: SIM115 (it stays open: it is the lock)
    except (NotADirectoryError, FileExistsError):
        raise UserError(f"{folder} is a file, not a folder: choose another --out") from None
    except OSError as error:
        what = "make that possible" if resume else "choose another --out"
        raise UserError(f"can't write to {folder} ({error.strerror}): {what}") from error
    _locks.pop(folder.resolve(), None)  # this process's own, of an earlier run in the folder
    try:
        if fcntl:  # the kernel drops the lock with its process, so none is ever stale
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = f"another process ({lock.read(200).strip()})"
        what = "wait for it" if resume else "choose another --out"
        raise UserError(f"{folder} is in use by {holder}: {what}") from None
    except OSError:  # a file system without locks: two runs in one folder go unnoticed there
        pass
    lock.truncate(0)
    lock.write(f"{os.getpid()} on {platform.node()}")
    lock.flush()
    _locks[folder.resolve()] = lock
    for file in folder.rglob(".*"):  # what a killed process was just writing
        if PART.fullmatch(file.name):
            file.unlink(missing_ok=True)
    if tensorboard:
        watch(folder)
    print(f"run      {folder}", flush=True)
    return share_from_first(folder)


_locks = {}  # by folder, the open file: its lock is held until the process ends
PART = re.compile(r"\..+\.\d+\.part(\.\w+)?")  # names that `replacing` gives


@contextmanager
def replacing(path):
    """Give a temporary path to write to, and move it to ``path`` once it is whole.

    A reader sees the old file or the new one, never a half of either, whenever the process dies.

    :param str path: the file to make or to replace; its folder is made if it's missing
    :return: a context manager giving the temporary path, in the same folder, of the same suffix
    :rtype: contextlib.AbstractContextManager[pathlib.Path]
    :raises UserError: if the run folder that it belongs to has been deleted
    """
    path = Path(path)
    for folder in _locks.keys() & set(path.resolve().parents):
        if not folder.is_dir():  # made anew it would be without its lock, and half empty
            raise UserError(f"{folder} was deleted during the run: start a new one")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())  # a rename may reach the disk before the bytes do
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def finish(folder, script, args, argv, dataset, device, started, **found):
    """Write metrics.json atomically, and print every file of the run, one per line.

    :param pathlib.Path folder: the run folder
    :param str script: name of the script, without .py
    :param argparse.Namespace args: all arguments
    :param list[str] argv: what was typed; None for sys.argv
    :param str dataset: the dataset or pictures that were used
    :param torch.device device: where it ran
    :param float started: time.time() at the start of the work
    :param object found: what was found; plain Python values; NaN and infinity, for which JSON has
        no words, become null
    :return: what was written
    :rtype: dict
    """
    typed = sys.argv[1:] if argv is None else argv
    modules = {"torch": torch, "torchvision": torchvision, "numpy": np}
    metrics = {
        "command": shlex.join(["python", f"{script}.py", *map(str, typed)]),
        "args": vars(args),
        "dataset": dataset,
        "device": describe_device(device),
        "versions": {"python": platform.python_version()}
        | {name: module.__version__ for name, module in modules.items()},
        "seconds": round(time.time() - started, 1),
        **found,
    }
    files = {f.relative_to(folder).as_posix() for f in folder.rglob("[!.]*") if f.is_file()}
    # Those in subfolders first: of 100 samples and one GIF, the GIF is what one looks for.
    metrics["files"] = sorted(files | {"metrics.json"}, key=lambda name: ("/" not in name, name))
    metrics = without_nan(metrics)
    with replacing(folder / "metrics.json") as part:
        text = json.dumps(metrics, indent=2, allow_nan=False)
        part.write_text(text + "\n", encoding="utf-8")
    for name in metrics["files"]:
        print(f"wrote    {folder / name}")
    return metrics


def without_nan(value):
    """Replace what is no finite number by None, in lists and dicts as well."""
    if isinstance(value, dict):
        return {key: without_nan(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_csv(path, rows):
    """Write a table atomically, one row per epoch or step.

    :param pathlib.Path path: the file
    :param list[dict] rows: what a row lacks is left empty; without a row nothing is written
    """
    if not rows:
        return
    with replacing(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        header = dict.fromkeys(name for row in rows for name in row)
        writer = csv.DictWriter(file, fieldnames=list(header))
        writer.writeheader()
        writer.writerows(rows)
    show_rows(path.parent, rows)


class Stop:
    """Remembers that SIGINT or SIGTERM came; the training loop asks between two batches."""

    signum = 0

    def __call__(self):
        """Tell whether to stop; under torchrun all processes get the same answer.

        :return: the signal's number, 0 to go on
        :rtype: int
        """
        if dist.is_initialized():
            flag = torch.tensor([self.signum])
            combine(flag, dist.ReduceOp.MAX)
            self.signum = int(flag)
        return self.signum


@contextmanager
def watching_signals():
    """Note SIGINT and SIGTERM instead of dying of them, until the block ends.

    A second one, a second or more after the first, stops at once. Some tools send each signal to
    a process and to its group: two that come together are one.

    :return: a context manager giving the :class:`Stop` to ask
    :rtype: contextlib.AbstractContextManager[Stop]
    """
    stop, first = Stop(), math.inf

    def note(signum, frame):
        nonlocal first
        if time.monotonic() > first + 1:
            raise KeyboardInterrupt
        stop.signum, first = signum, min(first, time.monotonic())

    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
