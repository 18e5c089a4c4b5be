"""Which samples a client has: its shard, i.i.d. or with skewed labels, and the window of it that a round trains on.

Sources: the FlexiFed authors' published program (i.i.d. shards, windows); Hsu, Qi and Brown, "Measuring the Effects of
Non-Identical Data Distribution for Federated Visual Classification", 2019 (class proportions from a Dirichlet
distribution, shards of equal size).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flexifed.errors import ConfigError, DataError


def shard_length(num_samples: int, num_shards: int, num_clients: int, *, split: str) -> int:
    """Number of samples of each shard; arguments and errors are those of `iid_shards`."""
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
    return num_samples // num_shards


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
    length = shard_length(num_samples, num_shards, num_clients, split=split)
    permutation = generator.permutation(num_samples).astype(np.int64, copy=False)
    # Copies, so that keeping one shard does not keep the whole permutation alive.
    return tuple(permutation[client * length : (client + 1) * length].copy() for client in range(num_clients))


def dirichlet_proportions(
    class_counts: NDArray[np.int64], num_clients: int, alpha: float, generator: np.random.Generator
) -> NDArray[np.float64]:
    """Draw the class proportions of each client from a Dirichlet distribution.

    Its parameter for a class is `alpha` times the class's size over the mean size of a class: `alpha` for every class
    if all are equally frequent. Clients' proportions differ the more, the smaller `alpha` is, and their expectation is
    the proportions of the whole set. (Hsu et al. state the sum over all classes, here `alpha` times their number.)

    Args:
        class_counts: number of samples of each class, shape (classes,); classes without samples get no share.
        num_clients: number of clients.
        alpha: concentration, above 0.
        generator: source of the proportions.

    Returns:
        Proportions, shape (clients, classes); each row sums to 1.

    >>> dirichlet_proportions(np.array([5, 0, 5]), 1, 1e9, np.random.default_rng(0)).round(3)
    array([[0.5, 0. , 0.5]])
    """
    present = class_counts > 0
    counts = class_counts[present]
    proportions = np.zeros((num_clients, len(class_counts)))
    proportions[:, present] = generator.dirichlet(alpha * counts / counts.mean(), size=num_clients)
    return proportions


def skewed_shards(
    labels: NDArray[np.int64],
    proportions: NDArray[np.float64],
    num_shards: int,
    generator: np.random.Generator,
    *,
    split: str,
) -> tuple[NDArray[np.int64], ...]:
    """Draw a shard for each client, without replacement, in which classes are as frequent as the client's proportions.

    Clients draw in random order. When a class has no samples left, its share goes to the client's other classes in
    their proportions; a client whose classes have all run out draws from what is left. The fewer of the shards the
    clients use, the more rarely this happens.

    Args:
        labels: label of each sample, shape (samples,).
        proportions: proportions of the classes, shape (clients, classes); each row sums to 1.
        num_shards: number of shards, whose size is that of `iid_shards`.
        generator: source of the order of the clients, of the number of samples of each class, and of the samples.
        split: name of the split for error messages: `training` or `test`.

    Returns:
        The indices of each client's samples, shape (samples per shard,), shuffled; shards are disjoint.

    Raises:
        ConfigError: there are fewer shards than clients.
        DataError: there are fewer samples than shards.

    >>> labels, generator = np.array([0, 0, 0, 1, 1, 1]), np.random.default_rng(0)
    >>> [sorted(shard.tolist()) for shard in skewed_shards(labels, np.eye(2), 2, generator, split="test")]
    [[0, 1, 2], [3, 4, 5]]
    """
    num_clients, num_classes = proportions.shape
    length = shard_length(len(labels), num_shards, num_clients, split=split)
    unused = [generator.permutation(np.flatnonzero(labels == label)) for label in range(num_classes)]
    shards: dict[int, NDArray[np.int64]] = {}
    for client in generator.permutation(num_clients).tolist():
        available = np.array([len(samples) for samples in unused])
        counts = _draw_counts(length, proportions[client], available, generator)
        drawn = [samples[:count] for samples, count in zip(unused, counts, strict=True)]
        unused = [samples[count:] for samples, count in zip(unused, counts, strict=True)]
        shards[client] = generator.permutation(np.concatenate(drawn)).astype(np.int64, copy=False)
    return tuple(shards[client] for client in range(num_clients))


def _draw_counts(
    size: int, proportions: NDArray[np.float64], available: NDArray[np.int64], generator: np.random.Generator
) -> NDArray[np.int64]:
    """How many samples of each class a client draws: multinomial, but no more than are available.

    Each pass draws all samples that are still missing, or uses up a class.
    """
    counts = np.zeros_like(available)
    while (missing := size - counts.sum()) > 0:
        left = available - counts
        weights = np.where(left > 0, proportions, 0.0)
        if not weights.any():
            weights = left.astype(np.float64)
        counts += np.minimum(generator.multinomial(missing, weights / weights.sum()), left)
    return counts


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
    length = window_length(len(shard), windows_per_shard)
    return shard[(round_index * length + np.arange(length)) % len(shard)]


def window_length(num_samples: int, windows_per_shard: int) -> int:
    """Number of samples of each window of a shard of `num_samples`.

    Raises:
        ConfigError: there would be none.
    """
    if num_samples < windows_per_shard:
        raise ConfigError(
            f"windows_per_shard is {windows_per_shard}, but a shard has only {num_samples} samples, so a round would "
            f"train on none; ask for at most {num_samples} windows, or for fewer shards"
        )
    return num_samples // windows_per_shard
