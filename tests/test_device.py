"""Where it runs and where randomness comes from: streams that repeat, one warning, no surprise."""

import os
import random
import socket
import time

import numpy as np
import pytest
import torch

import common.device
import common.errors
from common.device import (
    average_gradients,
    average_over_ranks,
    choose_chunk,
    fit_memory,
    gather,
    is_first,
    make_rng,
    ranks,
    set_up,
    share_from_first,
    split_evenly,
)
from tests.helpers import POSIX, refusal
from tests.processes import fork, free_port, group, wait


@pytest.fixture(autouse=True)
def unchanged(monkeypatch):
    """Give the next test the process as it was, and this one no GPU and no torchrun."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    deterministic = torch.backends.cudnn.deterministic
    yield
    torch.set_flush_denormal(False)
    torch.backends.cudnn.deterministic = deterministic


def draw(*key, n=1000):
    """Draw from a stream."""
    return torch.rand(n, generator=make_rng("cpu", *key))


def test_a_stream_is_a_function_of_its_key():
    """A resumed run draws what the first one drew, whatever was drawn in between."""
    first = draw(3, 7)
    draw(3, 8)
    torch.rand(5)
    assert torch.equal(first, draw(3, 7))


def test_streams_are_independent():
    """Neighbouring seeds, epochs and ranks share no numbers and are not correlated."""
    keys = [
        (seed, epoch, rank) for seed in (0, 1, 2**32 - 1) for epoch in (1, 2) for rank in (1, 2)
    ]
    drawn = torch.stack([draw(*key) for key in keys])
    assert drawn.unique().numel() > 0.99 * drawn.numel()  # 2^24 values: a few fall together
    correlation = torch.corrcoef(drawn) - torch.eye(len(keys))
    assert correlation.abs().max() < 0.15  # 0.03 is one sigma at 1,000 numbers
    assert torch.allclose(drawn.mean(1), torch.tensor(0.5), atol=0.05)


def test_streams_leave_the_global_generator_alone():
    """Drawing samples to look at can't change what is drawn elsewhere."""
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    draw(1, 2)
    assert torch.equal(torch.rand(3), wanted)


def test_a_missing_gpu_costs_one_warning(capsys):
    """--cuda without a GPU warns once and falls back to the CPU."""
    assert set_up(cuda=True, seed=0) == torch.device("cpu")
    out, error = capsys.readouterr()
    assert "no usable GPU" in error
    assert error.count("\n") == 1
    assert out == "device   cpu (1 thread)\n"  # tests/conftest.py says so


def test_a_cpu_needs_no_warning(capsys):
    """Who asks for no GPU reads nothing about one."""
    assert set_up(cuda=False, seed=0) == torch.device("cpu")
    assert capsys.readouterr().err == ""


def test_any_device_that_torch_knows():
    """--device takes torch's names, and says in one line what this torch doesn't have."""
    assert set_up(False, 0, "cpu") == torch.device("cpu")
    for name in ("mps", "cuda:99", "toaster", ""):
        assert "--device" in refusal(set_up, False, 0, name)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    """Torchrun with two processes on one GPU: one line, not CUDA's traceback."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for rank in ("0", "1"):  # the first one is heard
        monkeypatch.setenv("LOCAL_RANK", rank)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        assert "2 processes share 1 GPU: lower --nproc-per-node to 1" in refusal(set_up, True, 0)


@pytest.mark.parametrize(("free", "chunk"), [(80e6, 40), (1e12, 64), (1e6, 1)])
def test_a_chunk_takes_half_of_a_gpus_free_memory(free, chunk, monkeypatch):
    """As much as some images took, times the chunk; not more than a GPU can use, and at least 1."""
    allocated = [5e6]

    def compute(count):
        allocated.append(5e6 + count * 1e6)

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated[-1])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: max(allocated))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
    assert choose_chunk(torch.device("cuda"), compute) == chunk
    assert choose_chunk(torch.device("cpu"), None) == 8


@pytest.mark.parametrize(
    ("count", "most", "size"), [(100, 64, 50), (64, 64, 64), (5, 64, 5), (5000, 64, 64), (7, 3, 3)]
)
def test_chunks_are_even(count, most, size):
    """None is left over that could have been spread over the others."""
    assert split_evenly(count, most) == size


def test_memory_is_fitted_by_halving(capsys):
    """A chunk that doesn't fit is halved until one does, or there is no smaller one."""

    def compute(size):
        if size > 3:
            raise RuntimeError("CUDA out of memory")
        return "result"

    assert fit_memory(compute, 16) == ("result", 2)
    assert capsys.readouterr().err.count("\n") == 3
    assert "--batch 1" in refusal(fit_memory, lambda size: compute(9), 2, "--batch")


def test_memory_hides_no_other_error():
    """A network that fails on the images of a chunk would fail on half of them, too."""

    def compute(size):
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape"):
        fit_memory(compute, 4)


@pytest.mark.parametrize("seed", [0, 5, 2**32 - 1])
def test_set_up_seeds_everything(seed):
    """Python, NumPy and PyTorch repeat themselves for the same seed, and not for another."""

    def numbers(seed):
        set_up(cuda=False, seed=seed)
        return random.random(), np.random.rand(), torch.rand(1).item()

    first = numbers(seed)
    assert numbers(seed) == first
    assert all(a != b for a, b in zip(first, numbers(seed - 1 if seed else 1), strict=True))


def test_denormal_numbers_are_flushed():
    """Training does not slow down when numbers get too small to matter."""
    set_up(cuda=False, seed=0)
    assert torch.tensor(1e-30) * torch.tensor(1e-12) == 0


def test_one_process_is_the_first_and_only_one():
    """Without torchrun the same code runs, and averages nothing."""
    assert (ranks(), is_first()) == ((0, 1), True)
    assert share_from_first(["emnist"]) == ["emnist"]
    layer = torch.nn.Linear(3, 2)
    layer(torch.randn(4, 3)).sum().backward()
    layer.bias.grad = None  # a parameter without a gradient is no obstacle
    before = layer.weight.grad.clone()
    average_gradients(layer)
    assert torch.equal(layer.weight.grad, before)
    assert layer.bias.grad is None


def test_two_processes_average_and_share(tmp_path):
    """Each gets the mean of both gradients, and what the first one has; both say so once."""

    def main(rank):
        set_up(False, 0)
        layer = torch.nn.Linear(3, 2)
        layer.weight.grad = torch.full((2, 3), [1.0, 4.0][rank])
        layer.bias.grad = torch.tensor([[3.0, -1.0], [5.0, 2.0]][rank])
        average_gradients(layer)
        assert (layer.weight.grad == 2.5).all()
        assert layer.bias.grad.tolist() == [4.0, 0.5]
        assert share_from_first({"rank": rank}) == {"rank": 0}
        assert ranks() == (rank, 2)

    children, logs = group(main, tmp_path)
    ends = [wait(child, 60) for child in children]
    said = [log.read_text() for log in logs]
    assert ends == [0, 0], said
    assert said == ["device   cpu (1 thread), 2 processes\n", ""]


@pytest.mark.parametrize("step", ["average", "share"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_ends_takes_the_other_along(victim, step, tmp_path):
    """Soon, by one line at most: the first one's, as the other's would tell nothing new."""

    def main(rank):
        set_up(False, 0)
        if rank == victim:
            os._exit(9)
        if step == "average":
            average_over_ranks(torch.ones(3))
        else:
            for _ in range(3):  # the first one sends without waiting for an answer
                share_from_first("x")
                average_over_ranks(torch.ones(3))

    children, logs = group(main, tmp_path)
    assert wait(children[victim], 60) == 9
    assert wait(children[1 - victim], 60) == 2
    said = logs[1 - victim].read_text()
    assert said.count("error: ") == (1 if victim == 1 else 0)
    assert "Traceback" not in said


def test_only_the_first_rank_speaks(monkeypatch, capsys):
    """Of many processes that torchrun starts, one prints the device and the warning."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(common.device, "join_group", lambda device: None)
    set_up(cuda=True, seed=0)
    assert capsys.readouterr() == ("", "")


def test_a_stray_rank_means_nothing(monkeypatch, capsys):
    """Left in the environment by something else: without WORLD_SIZE a run is alone, and speaks."""
    for rank in ("1", "abc"):
        monkeypatch.setenv("RANK", rank)
        set_up(cuda=False, seed=0)
        assert is_first()
        assert capsys.readouterr().out.startswith("device")


@POSIX
@pytest.mark.parametrize(
    "environment",
    [{"RANK": "0"}, {"RANK": "abc"}, {"RANK": "1"}, {}, {"WORLD_SIZE": "many"},
     {"MASTER_PORT": "-5"}, {"MASTER_ADDR": "nowhere.invalid"}],
    ids=str,
)  # fmt: skip
def test_a_group_that_never_forms_is_one_line(environment, tmp_path, monkeypatch):
    """A process that is alone, or has odd variables, says what it waits for, and gives up."""
    monkeypatch.setattr(common.device, "JOINING", 1)
    monkeypatch.setattr(common.device, "SOON", 0.2)
    monkeypatch.setattr(common.errors, "PATIENCE", 0)
    common_part = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    child = fork(lambda: set_up(False, 0), tmp_path / "log", **common_part | environment)
    assert wait(child, 60) == 2
    lines = [x for x in (tmp_path / "log").read_text().splitlines() if "error: " in x]
    assert len(lines) == 1
    assert "WORLD_SIZE=" in lines[0]
    if environment in ({"RANK": "0"}, {"RANK": "1"}):
        assert "waiting for the other processes" in (tmp_path / "log").read_text()


@POSIX
def test_a_port_in_use_is_one_line(tmp_path):
    """Somebody else listens where the first process would."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        environment = {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        child = fork(lambda: set_up(False, 0), tmp_path / "log", **environment, MASTER_PORT=port)
        assert wait(child, 60) == 2
    assert (tmp_path / "log").read_text().count("error: ") == 1
    assert f"MASTER_PORT={port}" in (tmp_path / "log").read_text()


def test_who_is_waited_for_is_said(tmp_path, monkeypatch):
    """One process may be slower, for as long as it takes; the first one names it."""
    monkeypatch.setattr(common.device, "SOON", 0.3)

    def main(rank):
        set_up(False, 0)
        time.sleep(rank)
        assert gather({rank: rank}) == {0: 0, 1: 1}

    children, logs = group(main, tmp_path)
    assert [wait(child, 60) for child in children] == [0, 0], [log.read_text() for log in logs]
    assert "waiting for process 1" in logs[0].read_text()
    assert logs[1].read_text() == ""
