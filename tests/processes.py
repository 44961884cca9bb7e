"""Scripts in child processes that are forked: as one starts them, but without waiting for torch."""

import contextlib
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

from common.errors import exit_code

with contextlib.suppress(ImportError):  # Windows has none
    import resource


def fork(function, log, **environment):
    """Run a function in a child process, as a script would be run.

    :param Callable function: like a script's ``main``
    :param pathlib.Path log: gets what the child prints
    :param str environment: further variables
    :return: the child's process id
    :rtype: int
    """
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork, which Windows does not have")
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 99  # a traceback
    try:
        os.environ.update(environment)
        file = open(log, "w", buffering=1)  # noqa: SIM115 (closed with the process)
        sys.stdout = sys.stderr = file
        code = exit_code(function)
    except BaseException as error:
        print("Traceback", repr(error), flush=True)
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(child, seconds=180):
    """Wait for a child process to end; fail if it doesn't."""
    code, _ = finish(child, seconds, kill=False)
    if code is None:
        finish(child, 0)
        pytest.fail(f"still running after {seconds} seconds")
    return code


def finish(child, seconds=600.0, kill=True):
    """Wait for a child process, and kill it when its time is over.

    :param float seconds: its time
    :param bool kill: or leave it running
    :return: its exit code, or minus the signal that it died of; and what it took. None and None if
        it is still running
    :rtype: tuple[int, resource.struct_rusage]
    """
    end = time.monotonic() + seconds
    done, status, usage = os.wait4(child, os.WNOHANG)
    while not done and time.monotonic() < end:
        time.sleep(0.003)
        done, status, usage = os.wait4(child, os.WNOHANG)
    if not done and not kill:
        return None, None
    if not done:
        os.kill(child, signal.SIGKILL)
        _, status, usage = os.wait4(child, 0)
    return os.waitstatus_to_exitcode(status), usage


def start(function, argument, log, memory=None):
    """Start a function, mostly a script's main, in a child process and a folder of its own.

    :param object argument: what it is given; of a command line, words and paths
    :param pathlib.Path log: gets what it prints; beside it is the folder "elsewhere"
    :param int memory: bytes that it may take beyond what it has
    :return: the child's process id
    :rtype: int
    """

    def call():
        os.dup2(sys.stderr.fileno(), 2)  # libraries in C write of their own accord
        os.chdir(log.parent / "elsewhere")  # what is written there by mistake is found
        if memory:
            status = Path("/proc/self/status").read_text()
            most = 1024 * int(re.search(r"VmData:\s+(\d+)", status)[1]) + memory
            resource.setrlimit(resource.RLIMIT_DATA, (most, most))
        try:
            function([str(a) for a in argument] if isinstance(argument, list) else argument)
        except SystemExit as stop:  # argparse's own way
            os._exit(stop.code)

    return fork(call, log)


def describe_end(code, log):
    """Say how a script ended, and what was bad about it, or None."""
    said = log.read_text(errors="replace")
    end = {0: "done", 1: "partly", 2: "one line"}.get(code, f"code {code}")
    errors = said.count("error: ")
    if end.startswith("code") or "Traceback" in said or errors != (1 if code else 0):
        return end, f"{end}: {said[-300:]}"
    return end, None


def free_port():
    """Find a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def group(function, tmp_path, count=2):
    """Start processes as torchrun does.

    :param Callable function: from the rank; like a script's ``main``
    :return: process ids, and what they print
    :rtype: tuple[list[int], list[pathlib.Path]]
    """
    common_part = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(count)}
    logs = [tmp_path / f"rank{rank}.txt" for rank in range(count)]
    children = [
        fork(lambda rank=rank: function(rank), logs[rank], RANK=str(rank), LOCAL_RANK=str(rank),
             **common_part)
        for rank in range(count)
    ]  # fmt: skip
    return children, logs


def wait_for(child, log, words, seconds=60):
    """Wait until a child process has printed something."""
    end = time.monotonic() + seconds
    while words not in (log.read_text() if log.exists() else ""):
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            pytest.fail(f"no {words!r} after {seconds} seconds")
        time.sleep(0.01)


def train_together(script, train, tmp_path, monkeypatch):
    """Train with two processes: they agree on every weight, and the first alone says something.

    :param module script: the script
    :param Callable train: trains, without arguments
    :return: what the first process says
    :rtype: str
    """
    step, kept = script.average_gradients, {}

    def average(model):
        step(model)
        kept[type(model).__name__] = model

    def main(rank):
        train()
        weights = [p.detach().numpy().tobytes() for m in kept.values() for p in m.parameters()]
        (tmp_path / f"weights{rank}").write_bytes(b"".join(weights))

    monkeypatch.setattr(script, "average_gradients", average)
    children, logs = group(main, tmp_path)
    ends = [wait(child) for child in children]
    said = [log.read_text() for log in logs]
    assert ends == [0, 0], "".join(said)
    first, second = ((tmp_path / f"weights{rank}").read_bytes() for rank in range(2))
    assert len(first) > 1000
    assert first == second
    assert said[0].count("epoch   1") == 1
    assert "2 processes" in said[0]
    assert said[1] == ""
    return said[0]


def act_at(module, name, call, action):
    """Let a function of a module act, at its n-th call from now, before it does its work.

    For child processes: the module stays as it is.
    """
    work = getattr(module, name)
    calls = []

    def act(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            action()
        return work(*arguments)

    setattr(module, name, act)


def pause(mark):
    """Leave a mark, a file, and wait for a signal."""
    mark.touch()
    time.sleep(60)


def wait_for_mark(mark, seconds=60):
    """Wait until a child process has left its mark."""
    end = time.monotonic() + seconds
    while not mark.exists():
        assert time.monotonic() < end, f"no {mark.name} after {seconds} seconds"
        time.sleep(0.01)
