"""Save and load checkpoints: atomically, and without executing what a file may hold."""

import errno
import os
import zipfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import torch

from common.errors import UserError
from common.run import replacing


class State(dict):
    """What a checkpoint holds. A part that it lacks is said in one line: it may be anybody's."""

    path = None

    def __missing__(self, key):
        """Refuse what another version wrote."""
        raise UserError(f"{self.path} lacks {key!r}: start a new run with this version")

    def __reduce__(self):
        """Save it as what torch takes for harmless."""
        return OrderedDict, (), None, None, iter(self.items())


def save_checkpoint(path, state, keep=True):
    """Write a checkpoint atomically.

    :param str path: the file, usually RUN/checkpoint.pt
    :param dict state: tensors, and plain Python values: numbers, strings, lists, dicts
    :param bool keep: keep the file that is replaced, as checkpoint.previous.pt
    :raises OSError: if it can't be written; an earlier file is still there, then
    :raises UserError: if not all numbers are finite; an earlier file is still there, then
    """
    if not is_finite(state):  # the loss may show it only after the next epoch
        raise UserError("not saved: weights are NaN or infinite; start again with a smaller --lr")
    path = Path(path)
    with replacing(path) as part:
        try:
            torch.save(state, part)
        except RuntimeError as error:  # what torch makes of a full disk or a missing permission
            why = "can't be written: is the disk full, or the folder read-only?"
            raise OSError(errno.EIO, why, str(path)) from error
        if keep and path.is_file():
            # Another name for the same bytes, where the file system knows hard links.
            with suppress(OSError), replacing(previous(path)) as link:
                os.link(path, link)


def is_finite(value):
    """Tell whether all tensors in dicts and lists hold finite numbers only."""
    if isinstance(value, dict):
        return all(map(is_finite, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(is_finite, value))
    return not torch.is_tensor(value) or bool(value.isfinite().all())


def previous(path):
    """Name the file that keeps the checkpoint before the last one."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


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
    :rtype: State
    :raises UserError: if there is none, it can't be read, or another script wrote it
    """
    path = Path(path)
    path = path / "checkpoint.pt" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: give the folder of an earlier run")
    try:
        state = read_tensors(path)
    except Exception as error:
        kept = previous(path)
        what = f"go on from the one before it, {kept}" if kept.is_file() else "start a new run"
        raise UserError(
            f"{path} is not a readable checkpoint ({type(error).__name__}): "
            f"it may be cut short or of another program; {what}"
        ) from error
    found = state.get("script") if isinstance(state, dict) else None
    if found != script:
        who = found or "another program"
        raise UserError(f"{path} was written by {who}, not by {script}: give a run of {script}")
    state = State(state)
    state.path = path
    return state


def restore(parts, state):
    """Fill networks and optimizers from a checkpoint.

    :param dict parts: by name in the checkpoint, what has a ``load_state_dict``
    :param State state: as from :func:`load_checkpoint`
    :raises UserError: if they don't fit: other layers, other sizes
    """
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
            if isinstance(part, torch.optim.Optimizer):  # it doesn't compare sizes itself
                for weight, values in part.state.items():
                    if any(getattr(v, "ndim", 0) and v.shape != weight.shape
                           for v in values.values()):  # fmt: skip
                        raise ValueError("sizes")
    except UserError:
        raise
    except Exception as error:  # whatever wrong shapes and types set off in torch
        raise UserError(
            f"{state.path} doesn't fit this version of the networks: start a new run"
        ) from error


def resume_args(parser, argv, saved, free):
    """Read a command line that resumes a run: the settings are the run's own.

    :param argparse.ArgumentParser parser: the script's; its defaults are changed
    :param list[str] argv: the command line, or None for sys.argv
    :param dict saved: the arguments of the run, from its checkpoint
    :param set[str] free: names of those that may be given anew
    :return: the arguments
    :rtype: argparse.Namespace
    :raises UserError: if the command line changes another one
    """
    parser.set_defaults(**saved)  # whatever differs from here on was typed
    args = parser.parse_args(argv)
    changed = [name for name in saved if name not in free and getattr(args, name) != saved[name]]
    if changed:
        flags = ", ".join("--" + name.replace("_", "-") for name in changed)
        raise UserError(f"--resume keeps the run's own {flags}: leave that out")
    return args
