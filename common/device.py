"""Where a script computes, what its randomness comes from, and how its processes join."""

import contextlib
import ctypes
import os
import random
import sys

import numpy as np
import torch
import torch.distributed as dist

from common.errors import PeerError, UserError, is_out_of_memory


def set_up(cuda, seed):
    """Join torchrun's processes, choose the device, seed everything, and print what was chosen.

    :param bool cuda: whether to use a GPU; a missing one costs a warning, not the run
    :param int seed: the same seed on the same machine gives the same result
    :return: the device; under torchrun each process has its own
    :rtype: torch.device
    """
    keep_memory()
    # Denormal floats are up to a hundred times slower on a CPU and too small to matter. Threads
    # inherit the flag when they start, so it comes before the first real computation.
    torch.set_flush_denormal(True)
    device = torch.device("cpu")
    if cuda and torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    elif cuda and is_first():
        print(
            "warning: --cuda was given, but there is no usable GPU: going on with the CPU",
            file=sys.stderr,
        )
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        # Gradients travel by the device's own backend, plain Python values by gloo.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True
    if is_first():
        count = ranks()[1]
        print(f"device   {describe_device(device)}" + f", {count} processes" * (count > 1))
    return device


def keep_memory():
    """Keep freed memory in the process; on Linux with glibc, elsewhere nothing happens.

    A step frees and allocates the same large tensors again. By default they go back to the kernel
    in between, which hands them out page by page, each filled with zeros: on a CPU some 5 % of the
    time of a step of train_dcgan.py, and a third of that of smoothgrad.py, whose largest tensors
    exceed any threshold that glibc accepts (benchmarks/README.md).
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch: large tensors in huge pages
    if sys.platform == "linux":
        mmap_max, trim_threshold = -4, -1  # numbers from glibc's malloc.h
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(mmap_max, 0)  # no tensor gets a mapping of its own, however large
            libc.mallopt(trim_threshold, 2**31 - 1)


def ranks():
    """Tell which of torchrun's processes this is.

    :return: its rank and the number of processes; (0, 1) without torchrun
    :rtype: tuple[int, int]
    """
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_first():
    """Tell whether this process is the one that writes and prints.

    :return: True without torchrun, and for its rank 0
    :rtype: bool
    """
    return int(os.environ.get("RANK", 0)) == 0


def describe_device(device):
    """Name the device for the first line of a run.

    :param torch.device device: as from :func:`set_up`
    :return: for example "cpu (2 threads)" or "cuda:0 (NVIDIA H100 80GB HBM3)"
    :rtype: str
    """
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    threads = torch.get_num_threads()
    return f"cpu ({threads} thread{'s' * (threads > 1)})"


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
    :raises UserError: if another process has ended
    """
    if ranks()[1] > 1:
        combine(values, dist.ReduceOp.SUM)
        values /= ranks()[1]


def combine(values, operation):
    """Replace a tensor by the sum, the maximum, ... over all processes.

    :param torch.Tensor values: on the device of its process; changed in place
    :param torch.distributed.ReduceOp operation: how two values become one
    :raises UserError: if another process has ended
    """
    try:
        dist.all_reduce(values, operation)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise PeerError from error


def share_from_first(value):
    """Give every process what rank 0 has.

    :param object value: a plain Python value; only rank 0's counts
    :return: rank 0's value
    :rtype: object
    :raises UserError: if rank 0 has ended, which it will have said why
    """
    if not dist.is_initialized():
        return value
    box = [value]
    try:
        dist.broadcast_object_list(box, src=0)
    except RuntimeError as error:
        raise PeerError from error
    return box[0]
