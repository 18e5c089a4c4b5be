"""The rows of results, one per seed, round and client: the measurements, and what is needed to trust them later."""

from __future__ import annotations

import pyarrow as pa

SCHEMA = pa.schema(
    [
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("dataset", pa.string(), nullable=False),
        pa.field("data_source", pa.string(), nullable=False),
        pa.field("family", pa.string(), nullable=False),
        pa.field("scheme", pa.string(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("profile", pa.string(), nullable=False),
        pa.field("round", pa.int32(), nullable=False),
        pa.field("client", pa.int32(), nullable=False),
        pa.field("version", pa.string(), nullable=False),
        pa.field("model", pa.string(), nullable=False),
        pa.field("accuracy", pa.float64(), nullable=False),
        pa.field("loss", pa.float64(), nullable=False),
        pa.field("train_loss", pa.float64()),
        pa.field("num_train", pa.int64(), nullable=False),
        pa.field("num_test", pa.int64(), nullable=False),
        pa.field("bytes_up", pa.int64(), nullable=False),
        pa.field("bytes_down", pa.int64(), nullable=False),
        pa.field("train_s", pa.float64()),
        pa.field("train_started", pa.float64()),
        pa.field("eval_s", pa.float64(), nullable=False),
        pa.field("round_s", pa.float64(), nullable=False),
        pa.field("device", pa.string(), nullable=False),
        pa.field("actor", pa.int32(), nullable=False),
    ]
)
"""Columns of the rounds files.

The row of round r has the score of the client's model at the start of the round, and the training that follows. The
last round of a run is only scored, so its `train_loss`, `train_s` and `train_started` are null; so are those of clients
that do not take part in a round (`clients_per_round`). `accuracy` is from 0 to 1; `loss` and `train_loss` are mean
cross-entropies in nats; `num_train` and `num_test` are the sizes of the client's shards; `bytes_up` and `bytes_down`
are the bytes that the scheme makes the client send and receive in this round, wherever it runs. Columns that end in
`_s` are wall time in seconds, which clients that overlap on a GPU share; `train_started` is a Unix time; `actor` is the
number of the process within the cell. `data_source` is `real`, `real-partial`, `real-other` or `synthetic`.
"""
