"""Save and load checkpoints: atomically, and without executing what a file may hold."""

import errno
import zipfile
from pathlib import Path

import torch

from common.errors import UserError
from common.run import replacing


def save_checkpoint(path, state):
    """Write a checkpoint atomically.

    :param str path: the file, usually RUN/checkpoint.pt
    :param dict state: tensors, and plain Python values: numbers, strings, lists, dicts
    :raises OSError: if it can't be written; an earlier file is still there, then
    """
    with replacing(path) as part:
        try:
            torch.save(state, part)
        except RuntimeError as error:  # what torch makes of a full disk or a missing permission
            why = "can't be written: is the disk full, or the folder read-only?"
            raise OSError(errno.EIO, why, str(path)) from error


def load_checkpoint(path, script):
    """Read a checkpoint, executing nothing that it may hold.

    :param str path: the file, or the run folder that it lies in
    :param str script: the script that must have written it, as state["script"] says
    :return: the state, on the CPU
    :rtype: dict
    :raises UserError: if there is none, it can't be read, or another script wrote it
    """
    path = Path(path)
    path = path / "checkpoint.pt" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: give the folder of an earlier run")
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch compares no checksums: a flipped bit would be a weight
                raise zipfile.BadZipFile
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch and zipfile make of a damaged file
        raise UserError(
            f"{path} is not a readable checkpoint ({type(error).__name__}): "
            "it may be cut short or of another program; start a new run"
        ) from error
    found = state.get("script") if isinstance(state, dict) else None
    if found != script:
        raise UserError(f"{path} was written by {found or 'another program'}, not by {script}")
    return state


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
