"""The job of `flower.py` as a Flower app for Flower's simulation engine; needs `flwr[simulation]`, not flexifed's Ray.

    python benchmarks/flower_app.py '{"clients": 8, ...}' tutorial

The app has a ClientApp with train, evaluate and query, a ServerApp, and a strategy that lets Flower's own FedAvg
average the replies of the clients of each architecture. As in Flower's tutorials, a client keeps nothing between two
calls but the number of its partition: each call builds the model, loads the arrays of the message into it, and sends
the model back as arrays. The program is one of:

- `tutorial`: batches from a `DataLoader` that converts images to tensors one by one with torchvision's transforms, as
  in Flower's PyTorch tutorial.
- `defaults`: the same, with Flower's own default of two CPUs a client.
- `lean`: batches, local steps and scoring by flexifed's own functions, so that the sides differ in the engine alone.

A process loads its data once, at its first call, for all clients. The last line of the output is JSON: when each round
ended, the scores of each client in it, and the seconds of training and scoring.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from flower_job import CPUS_PER_CLIENT, Job
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Subset
from torch.utils.data import Dataset as TorchDataset
from torchvision.transforms import Compose, Normalize, RandomCrop, RandomHorizontalFlip, ToTensor
from torchvision.transforms.functional import to_pil_image

from flexifed.data import LabelledSamples, make_pipeline, open_dataset
from flexifed.data.partition import window
from flexifed.federation.cell import cell_model, make_shards
from flexifed.seeding import derive_seed, torch_generator
from flexifed.training import evaluate, local, streams
from flexifed.training.memory import keep_freed_memory
from flexifed.training.numerics import numeric_settings, seeded_dropout
from flexifed.training.workspace import Workspace

client_app = ClientApp()
CPU = torch.device("cpu")


class Task:
    """A job in a client process: models, data, training and scoring, with a given number of threads."""

    def __init__(self, job: Job, threads: int = 1) -> None:
        config, self.info = job.config(), job.info()
        self.config = replace(config, numerics=replace(config.numerics, threads=threads))
        data = open_dataset(self.info)
        shards = make_shards(self.config, self.info)
        self.train_samples = [data.train.take(shard.train) for shard in shards]
        self.test_samples = [data.test.take(shard.test) for shard in shards]
        self.pipeline = make_pipeline(data, self.config.family, device=CPU, channels_last=True)

    def model(self, client: int) -> nn.Module:
        """Build the model of a client, with the initial weights of its architecture."""
        generator = torch_generator(self.config.seed, "init")
        model = cell_model(self.config, self.info, self.config.model_name(client), generator=generator)
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def window(self, client: int, round_index: int) -> torch.Tensor:
        """The indices of the training samples that a client trains on in a round, int64 (count,)."""
        shard = np.arange(len(self.train_samples[client][1]))
        return torch.from_numpy(window(shard, round_index, self.config.partition.windows_per_shard))

    def train(self, model: nn.Module, client: int, round_index: int) -> float:
        """Train the model in place; returns the mean loss."""
        samples, labels = (stored[self.window(client, round_index)] for stored in self.train_samples[client])
        seed = self.config.seed
        with seeded_dropout(derive_seed(seed, "dropout", client, round_index), CPU):
            steps = local.train(
                Workspace(model, self.config.training, self.config.numerics),
                samples,
                labels,
                pipeline=self.pipeline,
                batches=torch_generator(seed, "batches", client, round_index),
                augmentation=torch_generator(seed, "augmentation", client, round_index),
            )
            return streams.run_to_end(steps).item()

    def test(self, model: nn.Module, client: int) -> tuple[float, float]:
        """Score the model on the client's own test shard; returns accuracy and loss."""
        samples, labels = self.test_samples[client]
        # Without Winograd's algorithm, which a workspace would switch on for wide convolutions: all records of this
        # benchmark were scored by PyTorch's own.
        workspace = Workspace(model, self.config.training, replace(self.config.numerics, winograd=False))
        score = streams.run_to_end(evaluate.evaluate(workspace, samples, labels, pipeline=self.pipeline))
        return score.accuracy, score.loss


class Images(TorchDataset[tuple[torch.Tensor, torch.Tensor]]):
    """A client's samples as PIL images, which torchvision's transforms convert to tensors one by one."""

    def __init__(self, samples: LabelledSamples, transform: Compose) -> None:
        images, self._labels = samples
        self._images = [to_pil_image(image) for image in images]
        self._transform = transform

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._transform(self._images[index]), self._labels[index]


class TutorialTask(Task):
    """A task with PyTorch's DataLoader and plain loops, as in Flower's tutorials."""

    def __init__(self, job: Job, threads: int = 1) -> None:
        super().__init__(job, threads)
        plain = [ToTensor(), Normalize(self.info.mean, self.info.std)]
        augmentation = [RandomCrop(32, padding=4), RandomHorizontalFlip()] if self.config.training.augment else []
        self._train_images = [Images(samples, Compose([*augmentation, *plain])) for samples in self.train_samples]
        self._test_images = [Images(samples, Compose(plain)) for samples in self.test_samples]

    def train(self, model: nn.Module, client: int, round_index: int) -> float:
        """Train the model in place; returns the mean loss over the batches."""
        config = self.config.training
        torch.manual_seed(derive_seed(self.config.seed, "batches", client, round_index))
        images = Subset(self._train_images[client], self.window(client, round_index).tolist())
        batches = DataLoader(images, batch_size=config.batch_size, shuffle=True)
        optimizer = torch.optim.SGD(
            model.parameters(), lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
        )
        model.train()
        total = 0.0
        for _ in range(config.local_epochs):
            for inputs, labels in batches:
                optimizer.zero_grad()
                loss = functional.cross_entropy(model(inputs), labels)
                loss.backward()
                optimizer.step()
                total += loss.item()
        return total / (config.local_epochs * len(batches))

    def test(self, model: nn.Module, client: int) -> tuple[float, float]:
        """Score the model on the client's own test shard; returns accuracy and loss."""
        images = self._test_images[client]
        correct, total = 0, 0.0
        model.eval()
        with torch.no_grad():
            for batch, labels in DataLoader(images, batch_size=self.config.training.batch_size):
                scores = model(batch)
                total += functional.cross_entropy(scores, labels, reduction="sum").item()
                correct += int((scores.argmax(1) == labels).sum())
        return correct / len(images), total / len(images)

    def model(self, client: int) -> nn.Module:
        """Build the model of a client, in PyTorch's default memory format."""
        return super().model(client).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


PROGRAMS = {"defaults": TutorialTask, "tutorial": TutorialTask, "lean": Task}


@cache
def cached_task(program: str, job: str) -> Task:
    """The task of this process, which is made at its first call."""
    if program == "lean":
        keep_freed_memory()  # as flexifed's own processes do
    return PROGRAMS[program](Job.from_json(job), CPUS_PER_CLIENT[program])


def _unpack(message: Message, context: Context) -> tuple[Task, int, nn.Module, int]:
    """Read a message: the task, the client, its model with the arrays of the message, and the round, from 0."""
    config = message.content["config"]
    task = cached_task(str(config["program"]), str(config["job"]))
    client = int(context.node_config["partition-id"])
    model = task.model(client)
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    return task, client, model, int(config["server-round"]) - 1


@client_app.query()
def query(message: Message, context: Context) -> Message:
    """Reply with the client's number and its architecture."""
    client = int(context.node_config["partition-id"])
    name = Job.from_json(str(message.content["config"]["job"])).config().model_name(client)
    return Message(RecordDict({"identity": ConfigRecord({"client": client, "architecture": name})}), reply_to=message)


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Train the model of the message on the client's samples."""
    task, client, model, round_index = _unpack(message, context)
    started = time.perf_counter()
    with numeric_settings(task.config.numerics):
        loss = task.train(model, client, round_index)
    metrics: dict[str, Any] = {
        "train_loss": loss,
        "train_s": time.perf_counter() - started,
        "num-examples": len(task.window(client, round_index)),
    }
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord(metrics)})
    return Message(content, reply_to=message)


@client_app.evaluate()
def test(message: Message, context: Context) -> Message:
    """Score the model of the message on the client's own test samples."""
    task, client, model, _ = _unpack(message, context)
    started = time.perf_counter()
    with numeric_settings(task.config.numerics):
        accuracy, loss = task.test(model, client)
    metrics: dict[str, Any] = {
        "client": client,
        "accuracy": accuracy,
        "loss": loss,
        "eval_s": time.perf_counter() - started,
        "num-examples": len(task.test_samples[client][0]),
    }
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)


class FedAvgByArchitecture(FedAvg):
    """FedAvg among the clients of each architecture; all clients take part in every round.

    One record holds the arrays of all architectures, named `<architecture>/<name>`; a client gets the arrays of its
    own architecture.

    Args:
        architecture_of: the architecture of each node, in the order of clients.
    """

    def __init__(self, architecture_of: dict[int, str]) -> None:
        super().__init__()
        self.rounds: list[dict[str, Any]] = []
        self._architecture_of = architecture_of
        self._train_s = 0.0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Make a training message for every client, with the arrays of its architecture."""
        return self._messages(server_round, arrays, config, MessageType.TRAIN)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Make a scoring message for every client, with the arrays of its architecture."""
        return self._messages(server_round, arrays, config, MessageType.EVALUATE)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Apply Flower's own FedAvg to one architecture after another."""
        by_node = _by_node(replies, len(self._architecture_of))
        self._train_s = sum(reply.content["metrics"]["train_s"] for reply in by_node.values())
        merged = ArrayRecord()
        for architecture in dict.fromkeys(self._architecture_of.values()):
            members = [by_node[node] for node, name in self._architecture_of.items() if name == architecture]
            arrays, _ = super().aggregate_train(server_round, members)
            assert arrays is not None
            merged.update({f"{architecture}/{name}": array for name, array in arrays.items()})
        return merged, None

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Record the scores of all clients, and the time at which the round ended."""
        scored = [reply.content["metrics"] for reply in _by_node(replies, len(self._architecture_of)).values()]
        scored.sort(key=lambda metrics: metrics["client"])
        self.rounds.append(
            {
                "ended": time.perf_counter(),
                "accuracies": [metrics["accuracy"] for metrics in scored],
                "losses": [metrics["loss"] for metrics in scored],
                "computing_s": self._train_s + sum(metrics["eval_s"] for metrics in scored),
            }
        )
        return None

    def _messages(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, message_type: str
    ) -> Iterable[Message]:
        round_config = ConfigRecord({**config, "server-round": server_round})
        by_architecture: dict[str, ArrayRecord] = {}
        for full_name, array in arrays.items():
            architecture, name = full_name.split("/", 1)
            by_architecture.setdefault(architecture, ArrayRecord())[name] = array
        contents = {
            architecture: RecordDict({self.arrayrecord_key: record, self.configrecord_key: round_config})
            for architecture, record in by_architecture.items()
        }
        return [
            Message(contents[name], dst_node_id=node, message_type=message_type)
            for node, name in self._architecture_of.items()
        ]


def _by_node(replies: Iterable[Message], expected: int) -> dict[int, Message]:
    """Index the replies by the node that sent them.

    Raises:
        RuntimeError: a client failed or did not answer.
    """
    by_node = {}
    for reply in replies:
        if reply.has_error():
            raise RuntimeError(f"a client failed: {reply.error.reason}")
        by_node[reply.metadata.src_node_id] = reply
    if len(by_node) != expected:
        raise RuntimeError(f"{len(by_node)} of {expected} clients answered")
    return by_node


def make_server_app(job: Job, program: str, rounds: list[dict[str, Any]]) -> ServerApp:
    """Make a ServerApp that plays the job, and appends the figures of each round to `rounds`."""
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        config = job.config()
        job_config = ConfigRecord({"job": job.to_json(), "program": program})
        while len(nodes := list(grid.get_node_ids())) < job.clients:
            time.sleep(0.1)
        questions = [
            Message(RecordDict({"config": job_config}), dst_node_id=node, message_type=MessageType.QUERY)
            for node in nodes
        ]
        answers = _by_node(grid.send_and_receive(questions), job.clients)
        identities = {node: answer.content["identity"] for node, answer in answers.items()}
        ordered = sorted(identities, key=lambda node: identities[node]["client"])
        strategy = FedAvgByArchitecture({node: str(identities[node]["architecture"]) for node in ordered})
        models = Task(job)
        initial = {
            f"{config.model_name(client)}/{name}": tensor
            for client in range(len(config.model_names))
            for name, tensor in models.model(client).state_dict().items()
        }
        strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord(initial),
            num_rounds=job.rounds,
            train_config=job_config,
            evaluate_config=ConfigRecord(job_config),
        )
        rounds.extend(strategy.rounds)

    return server_app


def play(job: Job, program: str) -> list[dict[str, Any]]:
    """Play the job in Flower's simulation engine; returns the figures of each round."""
    logging.getLogger("flwr").setLevel(logging.WARNING)
    rounds: list[dict[str, Any]] = []
    run_simulation(
        server_app=make_server_app(job, program, rounds),
        client_app=client_app,
        num_supernodes=job.clients,
        backend_config={
            "init_args": {"address": "local", "num_cpus": job.cpus, "num_gpus": 0, "log_to_driver": False},
            "client_resources": {"num_cpus": CPUS_PER_CLIENT[program], "num_gpus": 0.0},
        },
    )
    return rounds


def main() -> None:
    """Play the job, and print the figures of its rounds."""
    try:
        print(json.dumps(play(Job.from_json(sys.argv[1]), sys.argv[2])), flush=True)
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # after a failure of the engine, the ServerApp's thread waits for it forever


if __name__ == "__main__":
    from flower_app import main as importable_main  # Flower's actors must import this file once, to keep its caches

    importable_main()
