"""One client: its shard, its state between rounds, and its part of a round."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch

from flexifed.config import CellConfig
from flexifed.core.aggregate import GroupState, State, apply_group_state, shared_tensors
from flexifed.core.schemes import SharingPlan
from flexifed.data import Dataset, Pipeline
from flexifed.data.partition import window
from flexifed.errors import ClientError, FlexifedError
from flexifed.federation.cell import ClientShards, cell_model
from flexifed.seeding import Purpose, derive_seed, torch_generator
from flexifed.training.evaluate import Score, evaluate
from flexifed.training.local import train
from flexifed.training.numerics import seeded_dropout
from flexifed.training.streams import Steps
from flexifed.training.workspace import Workspace


@dataclass(frozen=True, kw_only=True)
class ClientRound:
    """What one client measured in one round.

    Attributes:
        client: index of the client.
        accuracy: accuracy on the client's test shard, 0 to 1.
        loss: mean cross-entropy on the test shard, in nats.
        train_loss: mean cross-entropy in training, in nats; None if the client did not train.
        bytes_up: bytes that the scheme makes the client send; 0 if it did not train.
        bytes_down: bytes that the scheme makes the client receive; 0 if it did not take part in the round.
        eval_s: wall time of scoring, in seconds. If clients overlap, the steps of other clients in between count too.
        train_s: wall time of training and copying the trained tensors, in seconds, as `eval_s`; None without training.
        train_started: Unix time at which training started; None without training.
    """

    client: int
    accuracy: float
    loss: float
    train_loss: float | None = None
    bytes_up: int = 0
    bytes_down: int
    eval_s: float
    train_s: float | None = None
    train_started: float | None = None


class Client:
    """A client of a federation.

    Between rounds a client keeps only the tensors that it will not receive: its whole model before it has trained for
    the first time, its personal tensors after that. It trains in a workspace that clients of its architecture use in
    turn.

    Args:
        index: number of the client, from 0.
        config: the cell.
        plan: which of the client's tensors are shared.
        workspace: a model of the client's architecture, on the device; its values are overwritten.
        data: the data set; the client's shards are copied to the device.
        shards: the client's samples.
        pipeline: makes model inputs from stored samples.

    Attributes:
        kept: the tensors that the client keeps: its whole model until it has trained, then the personal ones.
    """

    def __init__(
        self,
        index: int,
        *,
        config: CellConfig,
        plan: SharingPlan,
        workspace: Workspace,
        data: Dataset,
        shards: ClientShards,
        pipeline: Pipeline,
    ) -> None:
        self.index = index
        self.num_train = len(shards.train)
        self._config = config
        self._plan = plan
        self._workspace = workspace
        self._pipeline = pipeline
        self._device = workspace.device
        self._train_samples, self._train_labels = (part.to(self._device) for part in data.train.take(shards.train))
        self._test_samples, self._test_labels = (part.to(self._device) for part in data.test.take(shards.test))
        stream = () if config.model.init == "shared" else (index,)
        initial = cell_model(
            config,
            data.info,
            config.model_name(index),
            generator=torch_generator(config.seed, "init", *stream),
            device=self._device,
        )
        self.kept: State = initial.state_dict()

    def play_round(
        self, round_index: int, shared: GroupState, *, train: bool, participates: bool = True
    ) -> Steps[tuple[ClientRound, GroupState | None]]:
        """Score the client's model as it is at the start of the round, then train it.

        Yields, so that other clients of this process can run, before waiting for the score, after each training step,
        and before waiting for the trained tensors.

        Args:
            round_index: from 0.
            shared: the global state, from which the client takes its groups; empty before the first aggregation.
            train: False for the round after the last aggregation, which is only scored.
            participates: False for a client that does not take part in this round, and is only scored.

        Returns:
            The client's measurements, and copies of the tensors that it shares (None if it did not train).

        Raises:
            ClientError: any failure, with client, round and stage.
        """
        with self._stage(round_index, "loading"):
            self._load(self.state(shared))
        with self._stage(round_index, "scoring"):
            started = time.perf_counter()
            score = yield from self._score(round_index)
            eval_s = time.perf_counter() - started
        scored = ClientRound(
            client=self.index,
            accuracy=score.accuracy,
            loss=score.loss,
            bytes_down=self._bytes_of(shared) if participates else 0,
            eval_s=eval_s,
        )
        if not (train and participates):
            return scored, None
        with self._stage(round_index, "training"):
            train_started, started = time.time(), time.perf_counter()
            train_loss, contribution = yield from self._train(round_index)
            train_s = time.perf_counter() - started
        trained = replace(
            scored,
            train_loss=train_loss,
            bytes_up=self._plan.bytes_per_round(self.index),
            train_s=train_s,
            train_started=train_started,
        )
        return trained, contribution

    def state(self, shared: GroupState) -> State:
        """The client's whole state: the tensors it keeps, and its groups' tensors in the global state. Not copied."""
        return apply_group_state(self._plan, self.index, self.kept, shared)

    def _bytes_of(self, shared: GroupState) -> int:
        """The size of the client's groups that have been averaged."""
        groups = self._plan.groups_of(self._plan.architecture_of[self.index])
        return sum(group.num_bytes for group in groups if group.index in shared)

    def restore(self, kept: State) -> None:
        """Resume from the tensors that a client with this index kept."""
        self.kept = {name: tensor.to(self._device) for name, tensor in kept.items()}

    def _load(self, state: State) -> None:
        tensors = self._workspace.model.state_dict()
        with torch.no_grad():
            # A GPU copies all tensors of one type in one launch, if their memory layouts agree.
            for dtype in dict.fromkeys(tensor.dtype for tensor in tensors.values()):
                names = [name for name, tensor in tensors.items() if tensor.dtype == dtype]
                torch._foreach_copy_([tensors[name] for name in names], [state[name] for name in names])

    def _score(self, round_index: int) -> Steps[Score]:
        with seeded_dropout(self._seed("scoring", round_index), self._device):
            score = yield from evaluate(self._workspace, self._test_samples, self._test_labels, pipeline=self._pipeline)
        if not math.isfinite(score.loss):
            raise ArithmeticError(f"the loss on the test shard is {score.loss}; {self._remedy}")
        return score

    def _train(self, round_index: int) -> Steps[tuple[float, GroupState]]:
        """Train on the round's window and keep the personal tensors; returns the mean loss and the shared tensors."""
        loss = yield from self._train_epochs(round_index)
        extremes = self._extremes()
        contribution, kept = self._take_out()
        yield
        train_loss = loss.item()
        self._check_finite(train_loss, extremes.tolist())
        self.kept = kept
        return train_loss, contribution

    def _train_epochs(self, round_index: int) -> Steps[torch.Tensor]:
        seed = self._config.seed
        samples = window(np.arange(self.num_train), round_index, self._config.partition.windows_per_shard)
        rows = torch.from_numpy(samples).to(self._device)
        with seeded_dropout(self._seed("dropout", round_index), self._device):
            return (
                yield from train(
                    self._workspace,
                    self._train_samples[rows],
                    self._train_labels[rows],
                    pipeline=self._pipeline,
                    batches=torch_generator(seed, "batches", self.index, round_index),
                    augmentation=torch_generator(seed, "augmentation", self.index, round_index),
                )
            )

    @property
    def _remedy(self) -> str:
        return f"lower --learning-rate (now {self._config.training.learning_rate:g})"

    def _trained(self) -> dict[str, torch.Tensor]:
        """The tensors in which training can produce NaN or infinity: all but counters."""
        state = self._workspace.model.state_dict()
        return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}

    def _extremes(self) -> torch.Tensor:
        """The minimum and maximum of each tensor, both NaN if it has a NaN: one pass, without waiting for the GPU."""
        values = [value for tensor in self._trained().values() for value in torch.aminmax(tensor)]
        return torch.stack(values).view(-1, 2)

    def _check_finite(self, train_loss: float, extremes: Sequence[Sequence[float]]) -> None:
        """Refuse values that would spread to all clients that share a layer.

        The loss alone does not show them: the last step can spoil the weights after a finite loss.
        """
        if not math.isfinite(train_loss):
            raise ArithmeticError(f"the training loss is {train_loss}; {self._remedy}")
        for name, values in zip(self._trained(), extremes, strict=True):
            if not all(map(math.isfinite, values)):
                raise ArithmeticError(f"{name} is no longer finite after training; {self._remedy}")

    def _take_out(self) -> tuple[GroupState, dict[str, torch.Tensor]]:
        """Copy the tensors to share and those to keep, because the next client overwrites the workspace."""
        trained = self._workspace.model.state_dict()
        contribution = {
            group: tuple(tensor.clone() for tensor in tensors)
            for group, tensors in shared_tensors(self._plan, self.index, trained).items()
        }
        shared_names = {name for names in self._plan.shared_names(self.index).values() for name in names}
        kept = {name: tensor.clone() for name, tensor in trained.items() if name not in shared_names}
        return contribution, kept

    def _seed(self, purpose: Purpose, round_index: int) -> int:
        return derive_seed(self._config.seed, purpose, self.index, round_index)

    @contextmanager
    def _stage(self, round_index: int, stage: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            is_expected = isinstance(error, ArithmeticError | FlexifedError)
            reason = str(error) if is_expected else traceback.format_exc()
            raise ClientError(self.index, round_index, stage, reason) from error
