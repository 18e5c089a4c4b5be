"""Who has which samples: i.i.d. shards, and the window of its shard that a client trains on in a round.

Source: the FlexiFed authors' published program.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flexifed.errors import ConfigError, DataError


def iid_shards(
    num_samples: int, num_shards: int, num_clients: int, generator: np.random.Generator, *, what: str
) -> tuple[NDArray[np.int64], ...]:
    """Cut a random permutation of the samples into equal shards, and give one to each client.

    Args:
        num_samples: samples of the split.
        num_shards: shards of floor(num_samples / num_shards) samples; what is left over, nobody gets.
        num_clients: client k gets shard k; further shards stay unused.
        generator: the source of the permutation, drawn from once.
        what: what is cut, for errors: `training`, `test`.

    Returns:
        For each client the indices of its samples, shape (samples a shard,), in the permutation's order: a shard is
        shuffled, however the data set is sorted.

    Raises:
        ConfigError: fewer shards than clients.
        DataError: fewer samples than shards.

    >>> [shard.size for shard in iid_shards(11, 5, 2, np.random.default_rng(0), what="test")]
    [2, 2]
    """
    if num_shards < num_clients:
        raise ConfigError(
            f"num_shards is {num_shards}, fewer than the {num_clients} clients that need one each; "
            f"ask for at least {num_clients} shards or for fewer clients"
        )
    if num_samples < num_shards:
        raise DataError(
            f"num_shards is {num_shards}, but there are only {num_samples} {what} samples; "
            f"ask for at most {num_samples} shards or use a larger data set"
        )
    permutation = generator.permutation(num_samples).astype(np.int64, copy=False)
    length = num_samples // num_shards
    # Copies, so that keeping one shard does not keep the whole permutation alive.
    return tuple(permutation[client * length : (client + 1) * length].copy() for client in range(num_clients))


def window(shard: NDArray[np.int64], round_index: int, windows_per_shard: int) -> NDArray[np.int64]:
    """The part of its shard that a client trains on in a round: the next one each round, and round again.

    Args:
        shard: indices of samples, shape (n,).
        round_index: from 0.
        windows_per_shard: w; the window holds floor(n / w) samples and begins at round_index * floor(n / w) mod n.

    Returns:
        Indices of samples, shape (floor(n / w),), in the shard's order.

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
