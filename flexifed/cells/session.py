"""The driver's side of a cell while it runs: rounds, rows, checkpoints and log."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from flexifed.cells.provenance import merge_attempts, provenance
from flexifed.cells.run import CellRun
from flexifed.cells.shards import shards_sha256, shards_table
from flexifed.config import CellConfig
from flexifed.errors import ResultsError
from flexifed.federation.cell import ClientShards
from flexifed.federation.checkpoint import Checkpoint
from flexifed.federation.rounds import Federation, Hosts, RoundResult
from flexifed.results.rounds_file import RoundsWriter, read_metadata
from flexifed.results.runlog import RunLog
from flexifed.results.store import ResultsFolder
from flexifed.results.tables import write_table

CHECKPOINT_EVERY_S = 60.0
CHECKPOINT_SHARE = 0.03  # the largest part of the time that checkpoints may take


def open_log(run: CellRun, placement: str) -> RunLog:
    """Open the log of a cell and write that the cell begins.

    This comes before the cell's hosts begin, so that the log gets their failures too.

    Args:
        run: the cell.
        placement: where the cell's clients are, in words.
    """
    log = RunLog(ResultsFolder(run.results).run_folder(run.name))
    log.write(f"begin {run.name}: {run.rounds} rounds on {run.info.source} data, {placement}")
    return log


def log_failure(log: RunLog, reason: str) -> None:
    """Write why a cell can't continue, if its log can still be written."""
    with suppress(ResultsError):
        log.write(f"failed: {reason}")


class CellSession:
    """A cell that is running. It resumes from the cell's last checkpoint, if there is one.

    Args:
        run: the cell.
        placement: where the cell's clients are, in words for the metadata.
        hosts: the hosts of the cell's clients.
        shards: each client's samples.
        log: the cell's log, from `open_log`; the caller closes it.

    Attributes:
        notes: what the user should know of how the cell resumes, such as that a checkpoint is damaged.
    """

    def __init__(self, run: CellRun, placement: str, hosts: Hosts, shards: Sequence[ClientShards], log: RunLog) -> None:
        self.run = run
        self.notes: list[str] = []
        self._shards = shards
        self._log = log
        self._folder = ResultsFolder(run.results)
        self._checkpoints = run.checkpoints()
        self._checkpoint_due = time.monotonic() + CHECKPOINT_EVERY_S
        self._committed_round = 0
        log.write(hosts.exchange)
        self._federation = Federation(run.config, run.info, hosts)
        self._digests = {"shards_sha256": shards_sha256(shards), "plan_sha256": self._federation.plan.digest}
        before = self._restore()
        write_table(self._folder.shards_file(run.name), shards_table(shards))
        metadata = provenance(run, placement, hosts.exchange, hosts.device_names())
        self._writer = self._open_writer(metadata | self._digests, before)

    def play_round(self) -> RoundResult:
        """Play the next round, and write its measurements."""
        train = self._federation.next_round < self.run.rounds
        result = self._federation.play_round(train=train)
        if not train:
            self._writer.note(state_sha256=self._federation.state_sha256())
        self._writer.append(_rows(self.run, self._shards, result))
        self._log_round(result)
        if not train:
            self._writer.flush()
            self._checkpoints.end(keep_final=self.run.keep_final)
            self._log.write("end")
        elif self._is_checkpoint_due(result.round_index + 1):
            self._checkpoint()
        return result

    def stop(self) -> None:
        """Commit the rounds that have been played, so that the same command resumes from here."""
        if self._committed_round != self._federation.next_round:
            self._checkpoint()
        self._log.write(f"stopped as requested; round {self._federation.next_round} is next")

    def _open_writer(self, metadata: dict[str, Any], before: pa.Table | None) -> RoundsWriter:
        """Open the writer of the run's rows; the file's metadata says what computed which rounds.

        Args:
            metadata: `provenance` of this session.
            before: the rows of the rounds before a checkpoint, if the run resumes.
        """
        path, next_round = self._folder.rounds_file(self.run.name), self._federation.next_round
        stored: dict[str, Any] = read_metadata(path) if path.exists() else {}
        metadata["attempts"], has_changed = merge_attempts(metadata, stored, next_round)
        if has_changed:
            self._note(
                f"from round {next_round} on other hardware or under other versions than before, so an undisturbed run "
                "may differ in the last bits; both are in the file's metadata"
            )
        # The last round of a shorter run that has ended: its file stays until there are more rounds. The files of
        # unfinished runs are replaced.
        finished = self._folder.last_round(self.run.name) if "state_sha256" in stored else stored.get("finished_rounds")
        if finished:
            metadata["finished_rounds"] = finished
        return RoundsWriter(path, metadata, at_least=finished, before=before)

    def _restore(self) -> pa.Table | None:
        """Resume from the last valid checkpoint whose rows are complete; returns those rows."""
        num_clients = self.run.config.partition.num_clients

        def rows_before(checkpoint: Checkpoint) -> pa.Table:
            return self._folder.rows_before(self.run.name, checkpoint.next_round)

        def has_its_rows(checkpoint: Checkpoint) -> bool:
            return rows_before(checkpoint).num_rows == checkpoint.next_round * num_clients

        checkpoint = self._checkpoints.latest(self._note, fits=has_its_rows)
        if checkpoint is None:
            if self._folder.last_round(self.run.name) is not None:
                self._note("there are rows but no checkpoint: starting with round 0")
            return None
        self._check_digests()
        self._federation.restore(checkpoint)
        self._log.write(f"resuming with round {checkpoint.next_round}, from {checkpoint.folder.name}")
        return rows_before(checkpoint)

    def _note(self, message: str) -> None:
        self._log.write(message)
        self.notes.append(message)

    def _check_digests(self) -> None:
        """Check that the clients still have the samples, and share the layers, of the rounds before the checkpoint.

        Raises:
            ResultsError: they do not: other versions of NumPy or of this package may draw other samples, and someone
                may have edited a scheme or a model.
        """
        stored = read_metadata(self._folder.rounds_file(self.run.name))
        # Older files have no digests.
        changed = [name for name, digest in self._digests.items() if stored.get(name, digest) != digest]
        if changed:
            versions = " and ".join(f"{name} {stored.get('versions', {}).get(name)}" for name in ("flexifed", "numpy"))
            remedy = f"resume with the versions that it began with ({versions}), or start over with --fresh"
            what = "have other samples"
            if "shards_sha256" not in changed:
                what, remedy = "share other layers", f"undo edits of its scheme or models, {remedy}"
            raise ResultsError(
                f"the clients of this run {what} now than in its first rounds, so it can't be continued; {remedy}"
            )

    def _is_checkpoint_due(self, next_round: int) -> bool:
        if next_round == self.run.rounds and self.run.keep_final:
            return True
        if self.run.checkpoint_every is not None:
            return next_round % self.run.checkpoint_every == 0
        return time.monotonic() >= self._checkpoint_due

    def _checkpoint(self) -> None:
        """Write the rows first, then everything that later rounds depend on, and the manifest last."""
        started = time.monotonic()
        next_round = self._federation.next_round
        self._writer.flush()
        folder = self._checkpoints.begin(next_round)
        self._checkpoints.commit(next_round, self._federation.save(folder))
        self._committed_round = next_round
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
            "version": config.version(measured.client),
            "model": config.model_name(measured.client),
            "num_train": len(shards[measured.client].train),
            "num_test": len(shards[measured.client].test),
            "round_s": result.round_s,
            "device": config.device,
            "actor": host,
            **asdict(measured),
        }
        for measured, host in zip(result.clients, result.host_of, strict=True)
    ]
