"""One cell from its first round to its last: the driver's side, with what it writes. Needs hosts, but not Ray."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from flexifed.config import CellConfig
from flexifed.data import DatasetInfo
from flexifed.errors import ResultsError
from flexifed.federation.checkpoint import Checkpoint, Checkpoints
from flexifed.federation.client import ClientShards
from flexifed.federation.rounds import Federation, Hosts, RoundResult, make_shards
from flexifed.results.runlog import RunLog
from flexifed.results.store import ResultsFolder, RoundsWriter, read_metadata, write_table

CHECKPOINT_EVERY_S = 60.0
CHECKPOINT_SHARE = 0.03  # of the time may go into checkpoints
_OF_AN_ATTEMPT = ("computed_on", "machine", "versions")
_PACKAGES = ("flexifed", "torch", "torchvision", "ray", "numpy", "pyarrow")


@dataclass(frozen=True, kw_only=True)
class CellRun:
    """A cell, the data it runs on, how long it runs, and where its results go.

    Attributes:
        profile: the name under which its rows are found; it decides nothing.
        rounds: rounds of training; one more is scored.
        results: absolute path of the experiment's results.
        checkpoint_every: rounds between checkpoints; None: by time.
        keep_final: keep the state after the last round of training, from which more rounds can go on.
    """

    config: CellConfig
    info: DatasetInfo
    profile: str
    rounds: int
    results: Path
    checkpoint_every: int | None = None
    keep_final: bool = True

    @property
    def run_id(self) -> str:
        """See `CellConfig.run_id`."""
        return self.config.run_id(self.info.fingerprint)

    @property
    def name(self) -> str:
        """Under which its files are kept: words for people, and the run id."""
        config = self.config
        source = self.info.source
        return f"{config.dataset}-{source}-{config.family}-{config.scheme}-seed{config.seed}-{self.run_id}"

    @property
    def label(self) -> str:
        """What people call it."""
        config = self.config
        return f"{config.dataset}/{config.family}/{config.scheme} seed {config.seed}"

    @property
    def is_finished(self) -> bool:
        """Whether its last round has been written."""
        last = ResultsFolder(self.results).last_round(self.name)
        return last is not None and last >= self.rounds

    def checkpoints(self) -> Checkpoints:
        """Those of this run; there may be none."""
        return Checkpoints(ResultsFolder(self.results).run_folder(self.name) / "checkpoints", self.run_id, self.rounds)


class CellSession:
    """A cell that is running.

    Args:
        run: the cell.
        placement: words that say where it runs, for its metadata.
    """

    def __init__(self, run: CellRun, placement: str) -> None:
        self.run = run
        self.shards = make_shards(run.config, run.info)
        folder = ResultsFolder(run.results)
        self._log = RunLog(folder.run_folder(run.name))
        self._folder = folder
        self._placement = placement
        self._checkpoints = run.checkpoints()
        self._checkpoint_due = time.monotonic() + CHECKPOINT_EVERY_S
        self._committed_round = 0
        self._federation: Federation | None = None
        self._writer: RoundsWriter | None = None
        _write_shards(folder.run_folder(run.name) / "shards.parquet", self.shards)
        self._log.write(f"begin {run.name}: {run.rounds} rounds on {run.info.source} data, {placement}")

    def start(self, hosts: Hosts) -> None:
        """Begin to play, or go on from the last checkpoint, on hosts that hold this cell's clients."""
        self._federation = Federation(self.run.config, self.run.info, hosts)
        before = self._restore(self._federation)
        metadata = _metadata(self.run, self._placement) | {"computed_on": sorted(set(hosts.device_names()))}
        metadata["attempts"] = self._attempts(metadata, self._federation.next_round)
        if finished := self._finished_before():
            metadata["finished_rounds"] = finished
        path = self._folder.rounds_file(self.run.name)
        self._writer = RoundsWriter(path, metadata, at_least=finished, before=before)

    def play_round(self) -> RoundResult:
        """Play the next round, and write what it measured."""
        assert self._federation is not None
        assert self._writer is not None
        train = self._federation.next_round < self.run.rounds
        result = self._federation.play_round(train=train)
        if not train:
            self._writer.note(state_sha256=self._federation.state_sha256())
        self._writer.append(_rows(self.run, self.shards, result))
        self._log_round(result)
        if not train:
            self._writer.flush()
            self._checkpoints.end(keep_final=self.run.keep_final)
            self._log.write("end")
        elif self._is_checkpoint_due(result.round_index + 1):
            self._checkpoint(self._federation, self._writer)
        return result

    def stop(self) -> None:
        """Commit the rounds that were played, to go on from there another time."""
        assert self._federation is not None
        assert self._writer is not None
        if self._committed_round != self._federation.next_round:
            self._checkpoint(self._federation, self._writer)
        self._log.write(f"stopped, as asked; round {self._federation.next_round} is next")

    def note(self, what: str) -> None:
        """Write it into the cell's log."""
        self._log.write(what)

    def fail(self, reason: str) -> None:
        """Note why the cell can't go on, if the log can still be written."""
        with suppress(ResultsError):
            self._log.write(f"failed: {reason}")

    def close(self) -> None:
        """Close its files."""
        self._log.close()

    def _restore(self, federation: Federation) -> pa.Table | None:
        """Go on from the last checkpoint that is whole and whose rows are there; returns those rows."""
        num_clients = self.run.config.partition.num_clients

        def rows_before(checkpoint: Checkpoint) -> pa.Table:
            return self._folder.rows_before(self.run.name, checkpoint.next_round)

        checkpoint = self._checkpoints.latest(
            self._log.write, fits=lambda one: rows_before(one).num_rows == one.next_round * num_clients
        )
        if checkpoint is None:
            if self._folder.last_round(self.run.name) is not None:
                self._log.write("there are rows but no checkpoint: begins with round 0")
            return None
        federation.restore(checkpoint)
        self._log.write(f"goes on with round {checkpoint.next_round}, from {checkpoint.folder.name}")
        return rows_before(checkpoint)

    def _attempts(self, metadata: Mapping[str, Any], next_round: int) -> list[dict[str, Any]]:
        """What computed which rounds: a run that goes on elsewhere, or under other versions, says so of both parts."""
        now = {"from_round": next_round, **{name: metadata[name] for name in _OF_AN_ATTEMPT}}
        path = self._folder.rounds_file(self.run.name)
        if next_round == 0 or not path.exists():
            return [now]
        stored: dict[str, Any] = read_metadata(path)
        first = {"from_round": 0, **{name: stored.get(name) for name in _OF_AN_ATTEMPT}}
        before = [one for one in stored.get("attempts", [first]) if one["from_round"] < next_round]
        if before and _decides_bits(before[-1]) == _decides_bits(now):
            return before
        self._log.write(
            f"from round {next_round} on other hardware or under other versions than before, so an undisturbed run may "
            "differ in the last bits; both are in the file's metadata"
        )
        return [*before, now]

    def _finished_before(self) -> int | None:
        """The last round of a shorter run that has ended; its file stays until there is more. Others are replaced."""
        path = self._folder.rounds_file(self.run.name)
        if not path.exists():
            return None
        stored: dict[str, Any] = read_metadata(path)
        return self._folder.last_round(self.run.name) if "state_sha256" in stored else stored.get("finished_rounds")

    def _is_checkpoint_due(self, next_round: int) -> bool:
        if next_round == self.run.rounds and self.run.keep_final:
            return True
        if self.run.checkpoint_every is not None:
            return next_round % self.run.checkpoint_every == 0
        return time.monotonic() >= self._checkpoint_due

    def _checkpoint(self, federation: Federation, writer: RoundsWriter) -> None:
        """Write the rows first, then everything that later rounds depend on, and the manifest last."""
        started = time.monotonic()
        writer.flush()
        folder = self._checkpoints.begin(federation.next_round)
        self._checkpoints.commit(federation.next_round, federation.save(folder))
        self._committed_round = federation.next_round
        finished = time.monotonic()
        self._checkpoint_due = finished + max(CHECKPOINT_EVERY_S, (finished - started) / CHECKPOINT_SHARE)

    def _log_round(self, result: RoundResult) -> None:
        accuracies = accuracy_by_version(self.run.config, result)
        losses = [client.train_loss for client in result.clients if client.train_loss is not None]
        values = {f"accuracy/{version}": accuracy for version, accuracy in accuracies.items()}
        values["seconds/round"] = result.round_s
        if losses:
            values["train_loss"] = float(np.mean(losses))
        self._log.scalars(values, result.round_index)
        self._log.write(
            f"round {result.round_index}/{self.run.rounds} "
            + " ".join(f"{version}={accuracy:.4f}" for version, accuracy in accuracies.items())
            + (f" train_loss={values['train_loss']:.4f}" if losses else "")
            + f" round_s={result.round_s:.2f} aggregate_s={result.aggregate_s:.3f}"
        )


def accuracy_by_version(config: CellConfig, result: RoundResult) -> dict[str, float]:
    """Mean accuracy, in 0 to 1, over the clients of each version, V1 first."""
    by_version: dict[str, list[float]] = {}
    for client in result.clients:
        by_version.setdefault(config.version(client.client), []).append(client.accuracy)
    return {name: float(np.mean(by_version[name])) for name in sorted(by_version)}


def _rows(run: CellRun, shards: Sequence[ClientShards], result: RoundResult) -> list[dict[str, object]]:
    config = run.config
    return [
        {
            "run_id": run.run_id,
            "dataset": config.dataset,
            "data_source": run.info.source,
            "family": config.family,
            "scheme": config.scheme,
            "seed": config.seed,
            "profile": run.profile,
            "round": result.round_index,
            "version": config.version(one.client),
            "model": config.model_name(one.client),
            "num_train": len(shards[one.client].train),
            "num_test": len(shards[one.client].test),
            "round_s": result.round_s,
            "device": config.device,
            "actor": actor,
            **asdict(one),
        }
        for one, actor in zip(result.clients, result.host_of, strict=True)
    ]


def _metadata(run: CellRun, placement: str) -> dict[str, object]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # run from a folder that is not installed
            versions[package] = "not installed"
    return {
        "run_id": run.run_id,
        "profile": run.profile,
        "rounds": run.rounds,
        "config": asdict(run.config),
        "data": asdict(run.info),
        "placement": placement,
        "machine": f"{platform.system()} {platform.machine()} {platform.node()}",
        "versions": versions,
    }


def _decides_bits(attempt: Mapping[str, Any]) -> tuple[object, ...]:
    """What of an attempt can change the last bits: kinds of processor and of system, and versions, but no host."""
    kinds = {name.rsplit(" in ", 1)[0] for name in attempt["computed_on"] or ()}
    return kinds, str(attempt["machine"]).rsplit(" ", 1)[0], attempt["versions"]


def _write_shards(path: Path, shards: Sequence[ClientShards]) -> None:
    """Which samples each client has: columns client, split, index."""
    parts = [
        pa.table(
            {
                "client": pa.array(np.full(len(indices), client, dtype=np.int32)),
                "split": pa.array([split] * len(indices)).dictionary_encode(),
                "index": pa.array(indices),
            }
        )
        for client, one in enumerate(shards)
        for split, indices in (("train", one.train), ("test", one.test))
    ]
    write_table(path, pa.concat_tables(parts, promote_options="default").unify_dictionaries())
