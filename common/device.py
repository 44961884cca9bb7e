"""Where a script computes, what its randomness comes from, and how its processes join."""

import os
import random
import secrets
import sys
import threading
import time
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from common.errors import PeerError, UserError, given_rank, is_out_of_memory
from common.fast import keep_memory

JOINING = 600  # seconds that the others have to start; clusters start their machines one by one
WORKING = timedelta(days=7)  # that one may be slower than the others, as with a folder of photos
SOON = 30  # seconds after which it is said who is waited for


def set_up(cuda, seed, name=None):
    """Join torchrun's processes, choose the device, seed everything, and print what was chosen.

    :param bool cuda: use a GPU; where there is none, a warning, and the CPU
    :param int seed: same seed, same machine, same result
    :param str name: any other device that torch knows, for example "mps" or "cuda:1"
    :return: the device; under torchrun each process has its own
    :rtype: torch.device
    :raises UserError: if this torch can't compute there
    """
    keep_memory()
    # Denormal floats are up to a hundred times slower on a CPU and too small to matter. Threads
    # inherit the flag when they start, so it comes before the first real computation.
    torch.set_flush_denormal(True)
    device = choose_device(cuda, name)
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        join_group(device)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True
    if is_first():
        count = ranks()[1]
        processes = f", {count} processes" if count > 1 else ""
        print(f"device   {describe_device(device)}{processes}")
    return device


def join_group(device):
    """Join torchrun's other processes.

    :param torch.device device: of this process
    :raises UserError: if they don't come, or aren't to be found where the environment says
    """
    names = {n: os.environ.get(n) for n in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    where = ", ".join(f"{name}={value}" for name, value in names.items() if value is not None)
    try:
        with saying(f"waiting for the other processes ({where})"):
            # Not by init_process_group: its one timeout would hold for the work as well.
            timeout = timedelta(seconds=JOINING)
            store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
            store = dist.PrefixStore(agree_on_name(store, rank, world), store)
            # Gradients travel by the device's own backend, plain Python values by gloo.
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=world, timeout=WORKING
            )
    except Exception as error:  # of many types: a port in use, a wrong number, nobody there
        why = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"can't join the other processes ({where}): {why}; start them by torchrun, or alone "
            "without these variables"
        ) from error


def agree_on_name(store, rank, world):
    """Agree on a name that no earlier start of these processes has used.

    torchrun --max-restarts starts them again with the same store, in which the addresses of the
    ended ones are left.

    :param torch.distributed.Store store: what all can write to and read
    :return: the name
    :rtype: str
    :raises TimeoutError: if not all come
    """

    def read(key):
        return store.get(key).decode() if store.check([key]) else ""

    mine = secrets.token_hex(8)
    store.set(f"hello {rank}", mine)
    others = range(1, world)
    end = time.monotonic() + JOINING
    while time.monotonic() < end:
        if rank == 0:
            for other in others:  # what was an old greeting is answered again when it is new
                store.set(f"welcome {other}", read(f"hello {other}") + mine)
            if all(read(f"thanks {other}") == mine for other in others):
                return mine
        elif read(f"welcome {rank}").startswith(mine):
            name = read(f"welcome {rank}").removeprefix(mine)
            store.set(f"thanks {rank}", name)
            return name
        time.sleep(0.02)
    raise TimeoutError("not all of them have come")


@contextmanager
def saying(line, seconds=None):
    """Print a line, should a block take longer than expected.

    :param str line: what the block waits for
    :param float seconds: how long it may take; None for SOON
    """
    timer = threading.Timer(seconds or SOON, lambda: print(line, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def choose_device(cuda, name=None):
    """Choose where to compute; parameters and errors as in :func:`set_up`."""
    if name is not None:
        try:
            torch.empty(1, device=name)
        except Exception as error:  # torch has a type of its own for each missing device
            why = str(error).splitlines()[0]
            raise UserError(f"--device {name} can't be used here: {why}") from error
        return torch.device(name)
    if not cuda:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        if is_first():
            print("warning: no usable GPU: falling back to the CPU", file=sys.stderr)
        return torch.device("cpu")
    local = os.environ.get("LOCAL_RANK", "0")
    index = int(local) if local.isdecimal() else 0
    count = torch.cuda.device_count()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if max(index + 1, processes) > count:  # each process says so, since the first one speaks
        raise UserError(
            f"{processes} processes share {count} GPU{'s' * (count > 1)}: lower --nproc-per-node"
            f" to {count}"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def ranks():
    """Tell which of torchrun's processes this is.

    :return: its rank and the number of processes; (0, 1) without torchrun
    :rtype: tuple[int, int]
    """
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_first():
    """Tell whether this process is the one that writes and prints.

    :return: True without torchrun, and for its rank 0
    :rtype: bool
    """
    return given_rank() == 0


def describe_device(device):
    """Name the device for the first line of a run.

    :param torch.device device: as from :func:`set_up`
    :return: for example "cpu (2 threads)" or "cuda:0 (NVIDIA H100 80GB HBM3)"
    :rtype: str
    """
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type != "cpu":
        return str(device)
    threads = torch.get_num_threads()
    return "cpu (1 thread)" if threads == 1 else f"cpu ({threads} threads)"


def fit_memory(compute, size, flag="--chunk"):
    """Compute in chunks, and in smaller ones when memory runs out.

    :param Callable compute: from the size of a chunk to a result that doesn't depend on it
    :param int size: the chunk to try first
    :param str flag: the option that sets it
    :return: the result, and the size that it was computed with
    :rtype: tuple[object, int]
    :raises UserError: if there isn't even memory for 1
    """
    while True:
        try:
            return compute(size), size
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        if size == 1:
            raise UserError(f"out of memory, even with {flag} 1: choose a smaller --model")
        size //= 2
        print(f"warning: out of memory: going on with {flag} {size}", file=sys.stderr)
        torch.cuda.empty_cache()


def choose_chunk(device, compute, most=64):
    """Choose how many images to compute at once: on a GPU, what half of its free memory holds.

    :param torch.device device: where
    :param Callable compute: computes as many images as it's told
    :param int most: where a GPU is busy
    :return: the number; 8 on a CPU, whose caches are smaller, and ``most`` elsewhere
    :rtype: int
    """
    if device.type != "cuda":
        return 8 if device.type == "cpu" else most
    some = 4
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    compute(some)
    each = (torch.cuda.max_memory_allocated(device) - before) / some
    free, _ = torch.cuda.mem_get_info(device)
    return int(min(most, max(1, free / 2 / each)))


def split_evenly(count, most):
    """Return the size of the fewest chunks for ``count`` images, of which the last isn't small."""
    return -(-count // -(-count // most))


def wait_for(device):
    """Wait until a GPU has done what it was given, as a clock must; elsewhere it has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_rng(device, *key):
    """Make a generator of its own from a key such as (seed, epoch, rank).

    A stream that is a function of its key needs no saved state: a resumed run makes it again.

    :param torch.device device: where the random numbers are wanted
    :param int key: non-negative integers; different keys of one length give independent streams
    :return: the generator
    :rtype: torch.Generator
    """
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state) % 2**63)


def average_gradients(model):
    """Replace each gradient by its mean over all processes; does nothing where there is one.

    What DistributedDataParallel does, without its wrapper: a GAN calls one network twice before
    one backward pass and once frozen, which the wrapper's bookkeeping is not made for.

    :param torch.nn.Module model: its parameters' ``.grad`` are changed in place
    """
    if ranks()[1] == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    average_over_ranks(flat)
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def average_over_ranks(values):
    """Replace a tensor by its mean over all processes; does nothing where there is one.

    :param torch.Tensor values: on the device of its process; changed in place
    :raises PeerError: if another process has ended
    """
    world = ranks()[1]
    if world == 1:
        return
    try:
        dist.all_reduce(values)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise PeerError from error
    values /= world


def share_from_first(value):
    """Give every process what rank 0 has.

    :param object value: a plain Python value; only rank 0's counts
    :return: rank 0's value
    :rtype: object
    :raises PeerError: if rank 0 has ended, which it will have said why
    """
    if not dist.is_initialized():
        return value
    box = [value]
    try:
        dist.broadcast_object_list(box, src=0)
    except RuntimeError as error:
        raise PeerError from error
    return box[0]


def gather(found):
    """Join what each process found, a dict, into one that all have.

    :param dict found: by keys that no other process has
    :rtype: dict
    :raises PeerError: if another process has ended
    """
    rank, world = ranks()
    joined = dict(found)
    try:
        if rank > 0:
            dist.send_object_list([found], 0)
        for other in range(1, world if rank == 0 else 1):
            box = [None]
            with saying(f"waiting for process {other}, which is not done yet"):
                dist.recv_object_list(box, other)
            joined.update(box[0])
    except RuntimeError as error:
        raise PeerError from error
    return share_from_first(joined)
