"""The samples of a run's clients, as a table and as a digest, on which what reads or resumes the run can rely."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from flexifed.federation.cell import ClientShards


def shards_table(shards: Sequence[ClientShards]) -> pa.Table:
    """The samples of each client, as columns client, split (`train` or `test`) and index."""
    parts = [
        pa.table(
            {
                "client": pa.array(np.full(len(indices), client, dtype=np.int32)),
                "split": pa.array([split] * len(indices)).dictionary_encode(),
                "index": pa.array(indices),
            }
        )
        for client, client_shards in enumerate(shards)
        for split, indices in (("train", client_shards.train), ("test", client_shards.test))
    ]
    return pa.concat_tables(parts, promote_options="default").unify_dictionaries()


def shards_of(table: pa.Table, num_clients: int) -> list[ClientShards]:
    """The inverse of `shards_table`.

    Raises:
        KeyError: a column is missing.
    """
    clients, splits, indices = (table[name] for name in ("client", "split", "index"))

    def samples(client: int, split: str) -> np.ndarray:
        chosen = pc.and_(pc.equal(clients, client), pc.equal(splits, split))
        return np.asarray(indices.filter(chosen).to_numpy())

    return [ClientShards(samples(client, "train"), samples(client, "test")) for client in range(num_clients)]


def shards_sha256(shards: Sequence[ClientShards]) -> str:
    """SHA-256 over each client's training and test samples, in order."""
    digest = hashlib.sha256()
    for client in shards:
        for indices in (client.train, client.test):
            digest.update(f"{len(indices)}\n".encode() + np.ascontiguousarray(indices, dtype="<i8").tobytes())
    return digest.hexdigest()
