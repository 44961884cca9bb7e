"""How a script ends: done, by a mistake that its user can mend, or by a signal."""

import contextlib
import errno
import itertools
import os
import shlex
import signal
import sys
import time
import traceback
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
SIGNALS = [  # Windows has no SIGHUP
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]
MARKS = ("checkpoint.pt", "records/arguments.txt")  # what --resume goes on from
PATIENCE = 10  # seconds that torchrun has to end a process which would say the same again


def plain(text):
    """Write a name for a terminal: what can't be printed, and might be obeyed, becomes escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class UserError(Exception):
    """A mistake that the user can mend.

    :param str message: one line: what is wrong, and what to do
    :param int code: exit code; 1 if part of the work was done
    """

    def __init__(self, message, code=2):
        super().__init__(plain(" ".join(message.splitlines())))  # file names may hold anything
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
def interruptible(script, folder):
    """Let Ctrl-C, SIGTERM and SIGHUP end the block with one line that says how to go on.

    :param str script: name of the script, without .py
    :param pathlib.Path folder: the run folder
    """

    def stop(signum, frame):
        for other in before:  # a second signal must not cut short what the first one set off
            signal.signal(other, signal.SIG_IGN)
        raise Interrupted(how_to_go_on(script, folder), signum)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    # What nohup, or a shell in the background, has set to be ignored stays ignored.
    before = {number: how for number, how in before.items() if how != signal.SIG_IGN}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def how_to_go_on(script, folder):
    """Word what to do about a run that was stopped."""
    name = plain(str(folder))
    if any((folder / mark).is_file() for mark in MARKS):
        return f"stopped: go on with  python {script}.py --resume {shlex.quote(name)}"
    return f"stopped, and nothing to go on with yet: start again; {name} can be removed"


def exit_code(main):
    """Run a script's main, and turn every way in which it can end into an exit code.

    :param Callable main: the script's ``main``
    :return: 0 done, 1 partly done, 2 user's mistake (one line on stderr), 128 + n stopped by
        signal n
    :rtype: int
    """
    mend_streams()
    sys.argv += go_on_after_restart(sys.argv)
    try:
        code = run(main)
    except Exception:  # a bug
        if not dist.is_initialized():
            raise
        traceback.print_exc()
        code = 1
    if dist.is_initialized():  # others are gone: torch's threads would end this one by an abort
        sys.stdout.flush()
        os._exit(code)
    return code


def run(main):
    """Do the work of :func:`exit_code`."""
    try:
        main()
        leave_group()
        return 0
    except UserError as error:
        complain(error)
        return error.code
    except Interrupted as stop:
        if given_rank() == 0:  # torchrun stops all its processes; one line will do
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


class Forgiving:
    """A stream that nothing can be written to any more costs what is said there, not the run.

    :param io.TextIOBase stream: stderr, or None where it was closed before the start
    """

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115 (as long as the process)

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        """Write, or from now on write to nowhere."""
        return self.attempt(self.stream.write, text)

    def flush(self):
        """Flush, or from now on write to nowhere."""
        return self.attempt(self.stream.flush)

    def attempt(self, function, *arguments):
        """Call a method of the stream; when it fails, give the stream a file that takes all."""
        try:
            return function(*arguments)
        except (OSError, ValueError):  # a full disk, a file that has been closed
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        return None


def mend_streams():
    """Make stdout and stderr take whatever is said, as names may be odd and stderr closed."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name that can't be printed is no mistake
            stream.reconfigure(errors="backslashreplace")
    if sys.stdout is None:
        sys.stdout = Forgiving(None)
    if not isinstance(sys.stderr, Forgiving):
        sys.stderr = Forgiving(sys.stderr)


def given_rank():
    """Return this process's rank as torchrun has given it; 0 where there is no torchrun."""
    rank = os.environ.get("RANK", "0")
    return int(rank) if "WORLD_SIZE" in os.environ and rank.isdecimal() else 0


def go_on_after_restart(argv):
    """Return what a command line lacks when torchrun --max-restarts gives it a second time.

    :param list[str] argv: the command line
    :return: --resume and the folder, if that is typed and there is something to go on with
    :rtype: list[str]
    """
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" or "--resume" in argv:
        return []
    joined = [word.partition("=")[2] for word in argv if word.startswith("--out=")]
    split = [value for word, value in itertools.pairwise(argv) if word == "--out"]
    for folder in joined + split:
        if any(Path(folder, mark).is_file() for mark in MARKS):
            return ["--resume", folder]
    return []


def complain(error):
    """Print a mistake once: what all of torchrun's processes say, the first one says."""
    rank = given_rank()
    if rank and isinstance(error, PeerError):
        return
    if rank and not dist.is_initialized():
        # Before they are a group, nearly always all have the same to say: then the first one has
        # said it, and torchrun ends this one meanwhile. But a file may be missing on one machine.
        time.sleep(PATIENCE)
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
    words = ("out of memory", "allocate memory", "ALLOC_FAILED", "size calculation overflowed",
             "bad_alloc")  # fmt: skip
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
    :param float high: largest; None for no limit but that of torch's own numbers
    :return: the converter; its name is what argparse calls a value that it refuses
    :rtype: Callable[[str], float]
    """
    largest = high
    if high is None:  # a float32 has room for more, but not for what is made of it
        largest = 2**31 - 1 if kind is int else 1e30

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
