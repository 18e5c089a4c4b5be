"""One row for each seed, round and client: what was measured, and what is needed to trust it later."""

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

`round` r is the score of what the client holds at the start of round r, and the training that follows; the last round
of a run is scored only, so its `train_loss`, `train_s` and `train_started` are null. `accuracy` is in 0 to 1; `loss`
and `train_loss` are mean cross-entropies in nats; `num_train` and `num_test` are the sizes of the client's shards;
`bytes_up` and `bytes_down` are what the scheme makes the client send and get in this round, wherever it runs; `_s` are
seconds of wall time, which clients that overlap on a GPU have in common; `train_started` is Unix time; `actor` is the
process, counted within the cell. `data_source` is `real`, `real-partial`, `real-other` or `synthetic`.
"""
