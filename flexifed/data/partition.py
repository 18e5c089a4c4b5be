"""Which samples a client has: i.i.d. shards, and the window of its shard that a client trains on in a round.

Source: the FlexiFed authors' published program.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flexifed.errors import ConfigError, DataError


def iid_shards(
    num_samples: int, num_shards: int, num_clients: int, generator: np.random.Generator, *, split: str
) -> tuple[NDArray[np.int64], ...]:
    """Cut a random permutation of the samples into equal shards, and give one to each client.

    Args:
        num_samples: number of samples in the split.
        num_shards: number of shards, each of floor(num_samples / num_shards) samples; the remaining samples are unused.
        num_clients: number of clients; client k gets shard k, and further shards are unused.
        generator: source of the permutation; one permutation is drawn.
        split: name of the split for error messages: `training` or `test`.

    Returns:
        The indices of each client's samples, shape (samples per shard,), in the order of the permutation, so a shard is
        shuffled even if the data set is sorted.

    Raises:
        ConfigError: there are fewer shards than clients.
        DataError: there are fewer samples than shards.

    >>> [shard.size for shard in iid_shards(11, 5, 2, np.random.default_rng(0), split="test")]
    [2, 2]
    """
    if num_shards < num_clients:
        raise ConfigError(
            f"num_shards is {num_shards}, fewer than the {num_clients} clients that need one each; "
            f"ask for at least {num_clients} shards or for fewer clients"
        )
    if num_samples < num_shards:
        raise DataError(
            f"num_shards is {num_shards}, but there are only {num_samples} {split} samples; "
            f"ask for at most {num_samples} shards or use a larger data set"
        )
    permutation = generator.permutation(num_samples).astype(np.int64, copy=False)
    length = num_samples // num_shards
    # Copies, so that keeping one shard does not keep the whole permutation alive.
    return tuple(permutation[client * length : (client + 1) * length].copy() for client in range(num_clients))


def window(shard: NDArray[np.int64], round_index: int, windows_per_shard: int) -> NDArray[np.int64]:
    """Return the part of its shard that a client trains on in a round; windows follow one another and wrap around.

    Args:
        shard: sample indices, shape (n,).
        round_index: index of the round, from 0.
        windows_per_shard: w; a window holds floor(n / w) samples and begins at round_index * floor(n / w) mod n.

    Returns:
        Sample indices, shape (floor(n / w),), in the order of the shard.

    Raises:
        ConfigError: the window would be empty.

    >>> [window(np.arange(6), round_index, 3).tolist() for round_index in range(4)]
    [[0, 1], [2, 3], [4, 5], [0, 1]]
    """
    length = len(shard) // windows_per_shard
    if length == 0:
        raise ConfigError(
            f"windows_per_shard is {windows_per_shard}, but a shard has only {len(shard)} samples, so a round would "
            f"train on none; ask for at most {len(shard)} windows, or for fewer shards"
        )
    return shard[(round_index * length + np.arange(length)) % len(shard)]
