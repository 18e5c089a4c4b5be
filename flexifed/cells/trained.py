"""The models of a run's clients, as trained so far, from its last checkpoint."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import nn

from flexifed.cells.plans import shared_otherwise
from flexifed.cells.shards import shards_of, shards_sha256
from flexifed.config import CellConfig
from flexifed.core.aggregate import State, apply_group_state, blocks_of
from flexifed.core.schemes import Group, SharingPlan
from flexifed.data import DatasetInfo
from flexifed.errors import ConfigError, FlexifedWarning, ResultsError
from flexifed.federation.cell import ClientShards, averaged_groups, cell_model, cell_plan
from flexifed.federation.checkpoint import (
    Checkpoint,
    Checkpoints,
    read_clients,
    read_groups,
    state_sha256,
    write_tensors,
)
from flexifed.files import atomic_write, writing
from flexifed.results.rounds_file import read_metadata
from flexifed.results.store import ResultsFolder
from flexifed.results.tables import read_table

INDEX = "clients.json"
_EXPORTED = ("run_id", "profile", "config", "data", "versions")  # of a run's metadata, without names of its machines
_CLIENTS_AT_ONCE = 8  # whose states are in memory together


@dataclass(frozen=True, kw_only=True)
class TrainedClients:
    """The clients of a run, after as many rounds of training as its last checkpoint has.

    Attributes:
        folder: the run's folder, `<results_dir>/<experiment>/runs/<cell>`.
        config: the run's settings.
        info: its data set. The location is that on the machine of the run.
        metadata: what its Parquet file says of it; see docs/report.md.
        checkpoint: what the models are read from.
    """

    folder: Path
    config: CellConfig
    info: DatasetInfo
    metadata: Mapping[str, Any]
    checkpoint: Checkpoint

    def __len__(self) -> int:
        """The number of clients."""
        return self.config.partition.num_clients

    @property
    def rounds(self) -> int:
        """The number of rounds of training, of which clients have had all or, with `clients_per_round`, some."""
        return self.checkpoint.next_round

    @property
    def is_final(self) -> bool:
        """Whether these are the models after the run's last round."""
        return "state_sha256" in self.metadata and self.rounds == self.metadata["rounds"]

    def state(self, client: int) -> dict[str, torch.Tensor]:
        """The state dict of a client's model, on the CPU: its personal tensors, and the means of its groups.

        Raises:
            ConfigError: there is no such client.
            ResultsError: the checkpoint can't be read; or these are not the values with which the run ended, or not
                those of a model with its settings.
        """
        self._check(client)
        return self._states([client])[client]

    def model(self, client: int) -> nn.Module:
        """A client's model in evaluation mode, on the CPU; its input is what the run's `Pipeline` makes of samples.

        Raises:
            ConfigError: there is no such client.
            ResultsError: see `state`.
        """
        state = self.state(client)
        model = self._empty_model(client)
        model.load_state_dict(state, assign=True)
        return model.eval()

    def shards(self, client: int) -> ClientShards:
        """The samples of a client, as indices into the training set and the test set, from the run's `shards.parquet`.

        Raises:
            ConfigError: there is no such client.
            ResultsError: the file can't be read, or does not have the samples that the run used.
        """
        self._check(client)
        return self._shards[client]

    def export(self, folder: Path) -> Path:
        """Write a safetensors file with the state dict of each client, and last `clients.json`, which describes them.

        Args:
            folder: where a folder with the run's name is made; models that it has already are replaced.

        Returns:
            The folder with the files.

        Raises:
            ResultsError: they can't be written, or see `state`.
        """
        target = folder / self.folder.name
        with writing(target):
            target.mkdir(parents=True, exist_ok=True)
            (target / INDEX).unlink(missing_ok=True)
        accuracies = self.accuracies()
        clients = []
        for block in blocks_of(range(len(self)), _CLIENTS_AT_ONCE):
            for client, state in self._states(block).items():
                file = f"client-{client:06d}.safetensors"
                sha256 = write_tensors(target / file, state)
                build = {"name": self.config.model_name(client), **self._build_options}
                clients.append(
                    {"file": file, "sha256": sha256, "build_model": build, "accuracy": accuracies.get(client)}
                )
        description = {"run": self.folder.name, "rounds": self.rounds, "is_final": self.is_final}
        description |= {"scoring": self.config.training.scoring, "clients": clients}
        description |= {"metadata": {name: self.metadata.get(name) for name in _EXPORTED}}
        with atomic_write(target / INDEX) as stream:
            stream.write(json.dumps(description, indent=1).encode())
        return target

    def accuracies(self) -> dict[int, float]:
        """The accuracy of each client's model on its own test shard, 0 to 1, as the run scored it (`training.scoring`).

        Empty if the run has not scored these models yet, as after a stop.

        Raises:
            ResultsError: the run's rows can't be read.
        """
        folder = ResultsFolder.of_run(self.folder)
        rows = folder.read([self.folder.name], ["round", "client", "accuracy"])
        scored = rows[rows["round"] == self.rounds]
        return {int(client): float(score) for client, score in zip(scored["client"], scored["accuracy"], strict=True)}

    def _check(self, client: int) -> None:
        if isinstance(client, bool) or client not in range(len(self)):
            raise ConfigError(f"client is {client!r}; this run has clients 0 to {len(self) - 1}")

    def _states(self, clients: Sequence[int]) -> dict[int, dict[str, torch.Tensor]]:
        """The state dicts of some clients, by client; see `state`."""
        plan = self._plan
        indices = {group.index for client in clients for group in plan.groups_of(plan.architecture_of[client])}
        try:
            shared = read_groups(self.checkpoint, [group for group in self._averaged if group.index in indices])
            kept = read_clients(self.checkpoint, clients)
        except ResultsError as error:
            if self.checkpoint.folder.exists():
                raise
            raise ResultsError(
                f"the run has replaced {self.checkpoint.folder} since it was found; load its clients again"
            ) from error
        states = {client: apply_group_state(plan, client, kept[client], shared) for client in clients}
        for client, state in states.items():
            if _shapes(state) != _shapes(self._empty_model(client).state_dict()):
                raise ResultsError(
                    f"client {client} in {self.checkpoint.folder} is not a {self.config.model_name(client)} with the "
                    "settings of the run's metadata; use the version that wrote them"
                )
            if self.is_final and state_sha256(state) != self.metadata["state_sha256"][client]:
                raise ResultsError(
                    f"client {client} in {self.checkpoint.folder} does not have the values with which the run ended; "
                    "run the same command with --fresh to make them again"
                )
        return states

    def _empty_model(self, client: int) -> nn.Module:
        return cell_model(self.config, self.info, self.config.model_name(client), device="meta")

    @cached_property
    def _plan(self) -> SharingPlan:
        return cell_plan(self.config, self.info)

    @cached_property
    def _averaged(self) -> Sequence[Group]:
        return averaged_groups(self.config, self._plan, self.rounds)

    @cached_property
    def _shards(self) -> list[ClientShards]:
        path = ResultsFolder.of_run(self.folder).shards_file(self.folder.name)
        remedy = "flexifed.federation.cell.make_shards(config, info) draws them again, with the same versions"
        try:
            shards = shards_of(read_table(path), len(self))
        except (KeyError, pa.ArrowException, ResultsError) as error:
            raise ResultsError(f"the clients' samples can't be read from {path} ({error}); {remedy}") from error
        if self.metadata.get("shards_sha256", digest := shards_sha256(shards)) != digest:  # older files have none
            raise ResultsError(f"{path} does not have the samples that the run used, so it has been changed; {remedy}")
        return shards

    @property
    def _build_options(self) -> dict[str, object]:
        """What `build_model` takes besides a model's name."""
        channels = {} if self.info.in_channels is None else {"in_channels": self.info.in_channels}
        return {"num_classes": self.info.num_classes, "width": self.config.model.width, **channels}


def _shapes(state: State) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


def load_clients(run_folder: str | Path) -> TrainedClients:
    """Find the models of a run's clients: those after its last round or, of an unfinished run, in its last checkpoint.

    A run that is under way replaces its checkpoints: load the clients again to read the newest.

    Args:
        run_folder: the run's folder, `<results_dir>/<experiment>/runs/<cell>`.

    Raises:
        ResultsError: there is no such run, or no checkpoint that can be read, or its scheme has been edited since.
        ConfigError: the run has settings that this version does not know.

    Warns:
        FlexifedWarning: the newest checkpoint is damaged, and an older one is used.
    """
    folder = Path(run_folder).expanduser().resolve()
    results = ResultsFolder.of_run(folder)
    path = results.rounds_file(folder.name)
    if folder.parent.name != "runs" or not os.path.isdir(folder):
        candidates = [folder.parent, folder, folder / "runs", *folder.glob("*/runs")]
        found = [str(runs) for runs in candidates if runs.name == "runs" and os.path.isdir(runs)]
        where = " or ".join(found) or "<results_dir>/<experiment>/runs"
        raise ResultsError(f"{folder} is not the folder of a run; give one of the folders in {where}")
    if not os.path.exists(path):
        raise ResultsError(f"{folder} has no results yet, or has lost them: there is no {path}")
    metadata = read_metadata(path)
    try:
        run_id, rounds, data = str(metadata["run_id"]), metadata["rounds"], metadata["data"]
        digests = metadata.get("state_sha256")
        config = CellConfig.from_dict(metadata["config"])
        info = DatasetInfo(**data | {name: tuple(data[name]) for name in ("mean", "std")})
        if digests is not None and len(digests) != config.partition.num_clients:
            raise TypeError(f"{len(digests)} digests of {config.partition.num_clients} clients")
    except (KeyError, TypeError) as error:
        raise ResultsError(f"the metadata of {path} are not those of a run ({error}); run the cell again") from error
    notes: list[str] = []
    checkpoints = Checkpoints(results.checkpoints_folder(folder.name), run_id, rounds if digests else None)
    checkpoint = checkpoints.latest(notes.append, may_be_writing=True)
    if checkpoint is None:
        without = "it was run with --no-keep-final, or its checkpoints were deleted"
        why = "; ".join(notes) or (without if digests else "it has not got that far")
        remedy = "with --fresh, or with more --rounds, to train them again" if digests else "to train them"
        raise ResultsError(f"{folder} has no checkpoint to read models from ({why}); run the same command {remedy}")
    for note in notes:
        warnings.warn(f"{folder.name}: {note}", FlexifedWarning, stacklevel=2)
    clients = TrainedClients(folder=folder, config=config, info=info, metadata=metadata, checkpoint=checkpoint)
    if shared_otherwise(metadata, clients._plan):
        raise ResultsError(
            f"the clients of {folder} shared other layers in the run than they would now; read it with flexifed "
            f"{metadata.get('versions', {}).get('flexifed')}, and without edits of its schemes or models"
        )
    return clients
