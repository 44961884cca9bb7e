"""What a user can do wrong, said in one line; and how a script ends."""

import errno
import os
import signal
import sys
import textwrap
from argparse import (
    ArgumentDefaultsHelpFormatter,
    ArgumentParser,
    ArgumentTypeError,
    RawDescriptionHelpFormatter,
)

import torch.distributed as dist

ROOM = ": make room, then go on with --resume, or start again"
RIGHTS = ": choose a place that you may read and write"
ADVICE = {  # by what the system calls the error
    "ENOSPC": ROOM, "EDQUOT": ROOM, "EFBIG": ROOM,
    "EACCES": RIGHTS, "EPERM": RIGHTS, "EROFS": RIGHTS,
}  # fmt: skip


class UserError(Exception):
    """Something that the user can mend: one line that says what is wrong and what to do.

    :param str message: the line; names of files in it may hold line breaks
    :param int code: the exit code; 1 if a part of the work was done
    """

    def __init__(self, message, code=2):
        super().__init__(" ".join(message.splitlines()))
        self.code = code


class PeerError(UserError):
    """Another of torchrun's processes has ended; it, or torchrun, says why."""

    def __init__(self):
        super().__init__("another process has ended: see the lines around this one, then --resume")


class Interrupted(Exception):
    """Stopped by a signal, after saving: the line to print and the signal's number."""

    def __init__(self, message, signum):
        super().__init__(message)
        self.signum = signum


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Fit the description to the terminal, not equations, and name defaults that say something."""

    def _fill_text(self, text, width, indent):
        parts = text.split("\n\n")
        return "\n\n".join(p if "  " in p else textwrap.fill(p, width) for p in parts)

    def _get_help_string(self, action):
        # A flag that turns something off has the default True, which would read as its own.
        silent = action.default is None or action.default is False or action.const is False
        if silent or "(default" in action.help:
            return action.help
        return super()._get_help_string(action)


def make_parser(script, description):
    """Make a parser without arguments, whose errors are one line instead of a usage block.

    :param str script: name of the script, without .py
    :param str description: its docstring, kept as it is
    :return: the parser; its ``error`` raises :class:`UserError`
    :rtype: argparse.ArgumentParser
    """

    def fail(message):
        raise UserError(f"{message} (--help lists every option)")

    parser = ArgumentParser(f"{script}.py", description=description, formatter_class=HelpFormatter)
    parser.error = fail
    return parser


def exit_code(main):
    """Run a script's main, and turn the ways in which it can end into exit codes.

    :param Callable main: the script's ``main``
    :return: 0 done, 1 done in part, 2 the user's mistake (one line on stderr), 128 + n stopped by
        signal n
    :rtype: int
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name that can't be printed is no mistake
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
        leave_group()
    except UserError as error:
        complain(error)
        return error.code
    except Interrupted as stop:
        if os.environ.get("RANK", "0") == "0":  # torchrun stops all its processes; one line will do
            print(stop, file=sys.stderr)
        leave_group()
        return 128 + stop.signum
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of our output left, as `head` does: nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 + SIGPIPE, a name that Windows does not have
    except OSError as error:  # a full disk, a folder without permission
        line = f"{error.filename or 'writing'}: {error.strerror or error}"
        complain(UserError(line + ADVICE.get(errno.errorcode.get(error.errno), "")))
        return 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        complain(UserError("out of memory: ask for less (--batch-size, --chunk, --size, --width)"))
        return 2
    return 0


def complain(error):
    """Print what is wrong, once: what all of torchrun's processes say the first one says.

    :param UserError error: the line
    """
    rank = int(os.environ.get("RANK", 0))
    if rank and (isinstance(error, PeerError) or not dist.is_initialized()):
        return  # before they are a group, they all have the same arguments and files
    print(f"error: {f'process {rank}: ' if rank else ''}{error}", file=sys.stderr)


def leave_group():
    """Leave torchrun's group, if this process is in one; torch warns of those who just end."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_out_of_memory(error):
    """Tell whether an exception means that memory has run out, of the CPU or of a GPU.

    :param Exception error: torch has several types for it, a plain RuntimeError on a CPU
    :rtype: bool
    """
    words = ("out of memory", "allocate memory", "ALLOC_FAILED", "size calculation overflowed")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def number(kind, low, high=None):
    """Make an argparse type that accepts numbers of one range and says so otherwise.

    :param type kind: int or float
    :param float low: the smallest value that is accepted
    :param float high: the largest; None for no limit but what torch can count to
    :return: the converter from text
    :rtype: Callable[[str], float]
    """
    words = "a whole number" if kind is int else "a number"
    words += f" of at least {low}" if high is None else f" from {low} to {high}"
    most = 2**31 - 1 if kind is int else sys.float_info.max

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        # inf is no useful setting; NaN fails both comparisons
        if not (low <= value <= (most if high is None else high)):
            limit = f" and at most {most}" if kind is int and high is None and value > most else ""
            raise ArgumentTypeError(f"must be {words}{limit}, not {text[:50]!r}")
        return value

    return convert
