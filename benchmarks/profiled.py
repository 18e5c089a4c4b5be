"""A round under PyTorch's profiler, in a process of its own: how busy and how full a GPU is."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch
from busy import device_use

from flexifed.config import CellConfig
from flexifed.data import DatasetInfo
from flexifed.data.partition import window_length
from flexifed.federation.cell import make_shards
from flexifed.federation.rounds import Federation, LocalHosts

TIMEOUT_S = 180.0
LEAST_OPERATIONS = 50
"""Fewer operations on a GPU than any training step has. The eight convolutions of VGG-11, each with a batch norm and a
ReLU, already make 64: a kernel for each of the three forward, and five backward."""


def profile_in_one_process(config: CellConfig, info: DatasetInfo, streams: int, warm_up: int) -> dict[str, object]:
    """Measure how busy and how full a GPU is with all clients in one process, as a profiler sees only its own process.

    This runs in a new process with a time limit: a profiler can fail or hang, and minutes of measurements would be
    lost.

    Args:
        config: the cell.
        info: its data.
        streams: the number of clients that overlap.
        warm_up: rounds before the one that is profiled.

    Returns:
        `device_busy`, `operations` and `seen_until`, as in `DeviceUse`, or `error`: the reason why there are none; and
        `device_memory_mib`, the most memory that PyTorch reserved, unless the process itself has failed.
    """
    return in_new_process(profile_round, config, info, streams, warm_up, timeout_s=TIMEOUT_S)


def profile_round(config: CellConfig, info: DatasetInfo, streams: int, warm_up: int) -> dict[str, object]:
    """Profile a round in this process; see `profile_in_one_process`."""
    shards = make_shards(config, info)
    federation = Federation(config, info, LocalHosts(config, info, shards, streams=streams))
    for _ in range(warm_up):
        federation.play_round()
    use = device_use(torch.device(config.device), federation.play_round)
    memory = {"device_memory_mib": round(torch.cuda.max_memory_reserved() / 2**20)}
    lengths = (window_length(len(client.train), config.partition.windows_per_shard) for client in shards)
    steps = config.training.local_epochs * sum(-(-length // config.training.batch_size) for length in lengths)
    if use.operations < LEAST_OPERATIONS * steps:
        error = (
            f"PyTorch's profiler saw {use.operations} operations in a round of {steps} training steps, fewer than "
            f"{LEAST_OPERATIONS} a step, so it misses some, such as those of replayed CUDA graphs"
        )
        return {"error": error, **memory}
    return {
        "device_busy": round(use.share, 3),
        "operations": use.operations,
        "seen_until": round(use.seen_until, 3),
        **memory,
    }


def in_new_process(
    function: Callable[..., dict[str, object]], *arguments: object, timeout_s: float
) -> dict[str, object]:
    """Call a function in a new process; returns its result, or the reason why there is none as `error`."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, function, arguments))
    process.start()
    sender.close()  # so that receiving fails once the process has ended
    try:
        if not receiver.poll(timeout_s):
            return {"error": f"no answer within {timeout_s:g} s"}
        result: dict[str, object] = receiver.recv()
        return result
    except EOFError:
        process.join()
        return {"error": f"the process ended with status {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def _send(sender: Connection, function: Callable[..., dict[str, object]], arguments: tuple[object, ...]) -> None:
    try:
        result = function(*arguments)
    except RuntimeError as error:
        result = {"error": str(error)}
    sender.send(result)
