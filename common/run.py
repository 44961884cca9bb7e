"""The run folder: files that are whole or absent, checkpoints, metrics.json and metrics.csv."""

import csv
import errno
import json
import math
import os
import pickletools
import platform
import re
import secrets
import shlex
import stat
import sys
import time
import zipfile
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path

import filelock
import numpy as np
import torch

from common.device import describe_device, is_first, share_from_first
from common.errors import UserError

MOST_TEXT = 64 * 2**20  # bytes of a record that is read; that of 500 photos has 2 MB
MOST_ARRAYS = 512 * 2**20  # bytes of a photo's arrays
MOST_PICKLE = 2 * 2**20  # bytes of a checkpoint beside its tensors; 10,000 epochs are less
MOST_VALUES = 500_000  # numbers, strings, lists in a checkpoint, each as often as it is named
DEEPEST = 10  # lists in lists
CLASSES = re.compile(  # and functions that make a checkpoint; torch itself would let pass more
    r"collections OrderedDict|torch Size|torch \w+Storage|torch.nn.parameter Parameter"
    r"|torch._utils _rebuild_(tensor_v2|parameter)"
)
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet takes for one begins so

_locks = []  # of this process's run folders: they are held until the process ends
written = []  # the files that this process has made, one after the other


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
        refuse_link(folder / ".lock")
        if (folder / ".lock").exists() and (folder / ".lock").stat().st_size:
            raise UserError(f"{folder}/.lock isn't empty, and locking would empty it: remove it")
        lock = filelock.FileLock(folder / ".lock", is_singleton=True)
        lock.acquire(blocking=False)
        _locks.append(lock)
        for parent, folders, files in os.walk(folder):
            for name in (*folders, *files):
                refuse_link(Path(parent, name))
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


def refuse_link(path):
    """Refuse a part of a run folder that is a link: what is written to it would go elsewhere.

    Whoever unpacks a stranger's run may unpack links to files of his own, and pipes that nobody
    ever fills. The run folder itself may be a link: its user has made that.

    :param pathlib.Path path: the part, if it is there
    :raises UserError: if it is neither a file nor a folder
    """
    mode = path.lstat().st_mode if os.path.lexists(path) else stat.S_IFREG
    if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
        raise UserError(f"{path} is a link, a pipe or a device: a run has none, remove it")


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
        written.append(path)
    finally:
        part.unlink(missing_ok=True)


def read_text(path):
    """Read a text file that anybody may have written: no pipe, no device, nothing without end.

    :param pathlib.Path path: the file
    :rtype: str
    :raises OSError: if it isn't there, is no file, or is too large
    :raises ValueError: if it is no UTF-8
    """
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "is no file", str(path))
    if path.stat().st_size > MOST_TEXT:
        raise OSError(errno.EFBIG, "is too large", str(path))
    return path.read_text(encoding="utf-8")


def read_arrays(path):
    """Read a file that np.savez wrote, and that anybody may have changed.

    :param pathlib.Path path: the file
    :return: arrays by name
    :rtype: dict[str, numpy.ndarray]
    :raises UserError: if it is damaged, or would unpack to more than a photo's arrays
    """
    try:
        if not path.is_file():  # nor a pipe, which might never be filled
            raise FileNotFoundError("gone")
        with zipfile.ZipFile(path) as archive:
            if sum(record.file_size for record in archive.infolist()) > MOST_ARRAYS:
                raise ValueError("too large")
        with np.load(path) as arrays:
            return dict(arrays)
    except Exception as error:  # whatever damage sets off in numpy and zipfile
        raise UserError(f"{path} is lost or damaged: start a new run") from error


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

    Time and memory are bounded by the file's size: what claims to hold more is refused.

    :param pathlib.Path path: the file; older ones, before torch 1.6, are no zip archives
    :return: what was saved, on the CPU: tensors, and plain Python values
    :rtype: object
    :raises Exception: whatever torch and zipfile make of a damaged file
    """
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "is no file", str(path))
    with open(path, "rb") as file:
        if file.read(4) == b"PK\3\4":
            check_archive(path)
        else:
            file.seek(0)
            for _ in range(4):  # a magic number, the version, the machine, and what was saved
                check_pickle(file)
    value = torch.load(path, map_location="cpu", weights_only=True)
    check_values(value)
    return value


def check_archive(path):
    """Refuse a zip archive that isn't torch's, or damaged: nothing in it is compressed."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        # What would unpack to more than the file isn't torch's.
        if sum(record.file_size for record in records) > path.stat().st_size:
            raise zipfile.BadZipFile
        if archive.testzip():  # torch compares no checksums: a flipped bit would be a weight
            raise zipfile.BadZipFile
        for record in records:
            if record.filename.endswith(".pkl"):
                if record.file_size > MOST_PICKLE:
                    raise ValueError("too long")
                with archive.open(record) as file:
                    check_pickle(file)


def check_pickle(file):
    """Refuse a pickle that is too long, or makes anything but tensors and plain values.

    :param io.BufferedIOBase file: is read to the pickle's end
    """
    for code, argument, at in pickletools.genops(file):
        if at > MOST_PICKLE:
            raise ValueError("too long")
        if code.name == "GLOBAL" and not CLASSES.fullmatch(argument):
            raise ValueError(argument)


def check_values(value):
    """Refuse tensors that are larger than their memory, and trees that grow when one climbs them.

    :param object value: as torch.load returned it
    :raises ValueError: if it is too large, too deep, or of other types than a checkpoint's
    """
    level = [value]
    count = 0
    for _ in range(DEEPEST):
        below = []
        for part in level:
            if torch.is_tensor(part):
                if part.nbytes > part.untyped_storage().nbytes():
                    raise ValueError("a tensor without memory")
            elif isinstance(part, dict):
                below += [*part.keys(), *part.values()]
            elif isinstance(part, (list, tuple)):
                below += part
            elif not isinstance(part, (str, int, float, type(None))):
                raise ValueError(type(part).__name__)
            if count + len(below) > MOST_VALUES:
                raise ValueError("too many values")
        count += len(below)
        level = below
    if level:
        raise ValueError("too deep")


def is_number(value):
    """Tell whether a value is a finite number, and not True or False."""
    return type(value) in (int, float) and abs(value) < 1e300


def is_list_of(holds, value):
    """Tell whether a value is a list of what a function holds for."""
    return isinstance(value, list) and all(map(holds, value))


def is_name(value):
    """Tell whether a value is a text of a length that names have."""
    return type(value) is str and len(value) <= 1000


def is_row(value):
    """Tell whether a value is a row of a table of epochs: numbers, also NaN, by name."""
    return isinstance(value, dict) and "epoch" in value and all(map(is_name, value)) and all(
        type(number) is float or is_number(number) for number in value.values()
    )  # fmt: skip


def is_count(value):
    """Tell whether a value says how many there are of each name, and of any at all."""
    return (
        isinstance(value, dict)
        and all(is_name(name) for name in value)
        and all(type(count) is int and 0 <= count < 2**53 for count in value.values())
        and sum(value.values()) > 0
    )


# What the plain entries of a checkpoint are, whoever wrote it.
FORMS = {
    "script": is_name,
    "args": lambda value: isinstance(value, dict),
    "shape": lambda value: is_list_of(lambda n: type(n) is int and n > 0, value) and len(value) > 2,
    "history": partial(is_list_of, is_row),
    "seconds": is_number,
    "floor": lambda value: value is None or is_number(value),
    "images": is_number,
    "classes": partial(is_list_of, is_name),
    "class_counts": is_count,
    "mean": partial(is_list_of, is_number),
    "std": partial(is_list_of, is_number),
}


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
    for name, holds in FORMS.items():
        if name in state and not holds(state[name]):
            raise UserError(f"{path} is damaged, in its {name}: start a new run")
    if state["script"] != script:
        raise UserError(f"{path} was written by {state['script']}.py: give a run of {script}.py")
    return state


def restore(parts, state):
    """Fill networks and optimizers from a checkpoint.

    A network on the device "meta", which has sizes and no memory yet, takes the tensors themselves.

    :param dict parts: by name in the checkpoint, what has a ``load_state_dict``
    :param Checkpoint state: as from :func:`load_checkpoint`
    :raises UserError: if they don't fit: other layers, other sizes
    """
    for name, part in parts.items():
        saved = state[name]
        try:
            if isinstance(part, torch.optim.Optimizer):
                restore_optimizer(part, saved)
            else:  # a plain dict: its _metadata would remember "assign" for the next network
                on_meta = any(p.is_meta for p in part.parameters())
                part.load_state_dict(dict(saved), assign=on_meta)
        except Exception as error:  # whatever wrong shapes and types set off in torch
            raise UserError(
                "the checkpoint doesn't fit this version of the networks: start a new run"
            ) from error


def check_sizes(state, names, make):
    """Refuse a checkpoint whose arguments ask for networks that its weights aren't of.

    Before memory is taken for them: a tiny file may ask for all there is.

    :param Checkpoint state: as from :func:`load_checkpoint`
    :param tuple[str] names: of networks in the checkpoint
    :param Callable make: makes them, in this order
    :raises UserError: if they don't fit
    """
    with torch.device("meta"):
        networks = make()
    restore(dict(zip(names, networks, strict=True)), state)


def restore_optimizer(optimizer, saved):
    """Fill an optimizer's memory; but for the learning rate, its settings stay what they are."""
    groups = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for group, own in zip(optimizer.param_groups, groups, strict=True):
        own.pop("lr")
        group.update(own)
        if torch.is_tensor(group["lr"]):  # a CUDA graph's
            group["lr"] = group["lr"].item()
        if not is_number(group["lr"]) or group["lr"] < 0:
            raise ValueError("lr")
    kinds = [{name: getattr(value, "shape", None) for name, value in values.items()}
             for values in optimizer.state.values()]  # fmt: skip
    if any(kind.keys() != kinds[0].keys() for kind in kinds):
        raise ValueError("names")
    for weight, values in optimizer.state.items():
        for value in values.values():  # load_state_dict doesn't compare sizes itself
            if not torch.is_tensor(value) or value.shape not in ((), weight.shape):
                raise ValueError("sizes")


def fits(value, action):
    """Tell whether an argument is one that the command line could have given.

    :param object value: as a run has saved it
    :param argparse.Action action: the flag
    """
    if action.nargs == 0:
        return type(value) is bool
    if type(value) is type(action.default) and value == action.default:
        return True
    values = value if action.nargs == "+" else [value]
    if not isinstance(values, list):
        return False
    for one in values:
        if type(one) not in (str, int, float) or "\0" in str(one):
            return False
        try:
            typed = (action.type or str)(str(one))
        except ValueError:
            return False
        if type(typed) is not type(one) or typed != one:
            return False
        chosen = action.choices is None or one in action.choices
        if not chosen and action.dest != "dataset":  # a copy names its own
            return False
    return len(values) > 0


def saved_args(parser, saved):
    """Read the arguments that a run has saved as strictly as a command line's.

    :param argparse.ArgumentParser parser: the script's
    :param dict saved: the run's arguments
    :return: the arguments; those that an older run lacks have their defaults
    :rtype: argparse.Namespace
    :raises UserError: if one is unknown, of another type, or out of its range
    """
    args = parser.parse_args([])
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    for name, value in saved.items():
        if name not in actions or not fits(value, actions[name]):
            shown = f"{name} = {value!r}"[:60]
            raise UserError(f"the run's arguments hold {shown}, which can't be: start a new run")
        setattr(args, name, value)
    return args


def resume_args(parser, argv, saved, changeable):
    """Read a command line that resumes a run: the settings are the run's own.

    :param argparse.ArgumentParser parser: the script's; its defaults are changed
    :param list[str] argv: the command line, or None for sys.argv
    :param dict saved: the run's arguments; anybody may have written them
    :param set[str] changeable: names of those that may be given anew
    :return: the arguments
    :rtype: argparse.Namespace
    :raises UserError: if the command line changes another one, or a saved one can't be
    """
    typed = parser.parse_args(argv)
    parser.set_defaults(**vars(saved_args(parser, saved)))  # whatever differs then was typed
    args = parser.parse_args(argv)
    for name in saved:
        flag = "--" + name.replace("_", "-")
        if name not in changeable and getattr(args, name) != saved[name]:
            raise UserError(f"--resume keeps the run's own {flag}: leave that out")
        if name in ("fid", "model") and saved[name] and not getattr(typed, name):
            refuse_download(saved[name], flag)
    return args


def refuse_download(name, flag):
    """Refuse a network that a run asks for, and nobody has typed, if it isn't on this machine."""
    from common.classifiers import is_here

    if not is_here(name):
        raise UserError(f"a resumed run downloads only what is typed: add {flag} {name}")


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
        writer = csv.writer(file)
        writer.writerow(map(to_cell, header))
        writer.writerows([to_cell(row.get(name)) for name in header] for row in rows)


def to_cell(value):
    """Put a quote before a text that a spreadsheet would take for a formula, and execute."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value
