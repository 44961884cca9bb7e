"""How a script ends: done, by a mistake that its user can mend, or by a signal."""

import errno
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

MAKE_ROOM = ": make room, then go on with --resume, or start again"
ELSEWHERE = ": choose a place that you may read and write"
ADVICE = {
    errno.ENOSPC: MAKE_ROOM,
    errno.EFBIG: MAKE_ROOM,
    errno.EACCES: ELSEWHERE,
    errno.EPERM: ELSEWHERE,
    errno.EROFS: ELSEWHERE,
}


class UserError(Exception):
    """A mistake that the user can mend.

    :param str message: one line: what is wrong, and what to do
    :param int code: exit code; 1 if part of the work was done
    """

    def __init__(self, message, code=2):
        super().__init__(" ".join(message.splitlines()))  # file names may hold line breaks
        self.code = code


class PeerError(UserError):
    """Another of torchrun's processes has ended; that one, or torchrun, says why."""

    def __init__(self):
        super().__init__("another process has ended: see the lines around this one, then --resume")


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM: no ``except Exception`` may take it for something else.

    :param str message: the line to print
    :param int signum: number of the signal
    """

    def __init__(self, message, signum):
        super().__init__(message)
        self.signum = signum


@contextmanager
def interruptible(message):
    """Let Ctrl-C and SIGTERM end the block with one line that says how to go on.

    :param str message: that line
    """

    def stop(signum, frame):
        for other in before:  # a second signal must not cut short what the first one set off
            signal.signal(other, signal.SIG_IGN)
        raise Interrupted(message, signum)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_code(main):
    """Run a script's main, and turn every way in which it can end into an exit code.

    :param Callable main: the script's ``main``
    :return: 0 done, 1 partly done, 2 user's mistake (one line on stderr), 128 + n stopped by
        signal n
    :rtype: int
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name that can't be printed is no mistake
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
        leave_group()
        return 0
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
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 + SIGPIPE, a name that Windows doesn't have
    except OSError as error:  # a full disk, a folder without permission
        line = f"{error.filename or 'writing'}: {error.strerror or error}"
        complain(UserError(line + ADVICE.get(error.errno, "")))
        return 2
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            line = "out of memory: ask for less (--batch-size, --chunk, --size, --width)"
        elif is_device_lost(error):
            line = f"the GPU failed ({str(error).splitlines()[0]}): go on with --resume"
        else:
            raise
        complain(UserError(line))
        return 2


def complain(error):
    """Print a mistake once: what all of torchrun's processes say, the first one says."""
    rank = int(os.environ.get("RANK", 0))
    if rank and (isinstance(error, PeerError) or not dist.is_initialized()):
        return  # before they are a group, they all have the same arguments and files
    process = f"process {rank}: " if rank else ""
    print(f"{Path(sys.argv[0]).name}: error: {process}{error}", file=sys.stderr)


def leave_group():
    """Leave torchrun's group, if this process is in one: torch warns of those who just end."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_out_of_memory(error):
    """Tell whether an exception means that memory has run out, the CPU's or a GPU's.

    :param Exception error: torch has several types for it, on a CPU a plain RuntimeError
    :rtype: bool
    """
    words = ("out of memory", "allocate memory", "ALLOC_FAILED", "size calculation overflowed")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def is_device_lost(error):
    """Tell whether an exception means that a GPU, not a mistake in the code, ended the work.

    :param Exception error: whose text is that of CUDA
    :rtype: bool
    """
    words = (
        "unspecified launch failure", "launch timed out", "ECC error", "hardware", "device is lost",
        "no CUDA-capable device", "busy or unavailable", "GPU is lost",
    )  # fmt: skip
    return str(error).startswith("CUDA") and any(word in str(error) for word in words)


def number(kind, low, high=None):
    """Make a type for an argument: a number of one range.

    :param type kind: int or float
    :param float low: smallest number accepted
    :param float high: largest; None for no limit but what torch can count to
    :return: the converter; its name is what argparse calls a value that it refuses
    :rtype: Callable[[str], float]
    """
    largest = high
    if high is None:
        largest = 2**31 - 1 if kind is int else sys.float_info.max

    def convert(text):
        value = kind(text)
        if not low <= value <= largest:  # also refuses NaN
            raise ValueError(text)
        return value

    name = "integer" if kind is int else "number"
    convert.__name__ = f"{name} >= {low}" if high is None else f"{name} from {low} to {high}"
    return convert


positive_int = number(int, 1)
positive_float = number(float, 1e-12)
seed_int = number(int, 0, 2**32 - 1)
