"""The job of `flower.py` as a Flower app, run by Flower's simulation engine; needs `flwr[simulation]`, and not our Ray.

    python benchmarks/flower_app.py '{"clients": 8, ...}' tutorial

A ClientApp with train, evaluate and query, a ServerApp, and a strategy that lets Flower's own FedAvg average what the
clients of each architecture reply. As in Flower's tutorials a client has nothing between two calls but the number of
its partition: its model is built anew, loads the arrays of the message, and goes back as arrays. It is one of:

- `tutorial`: batches from a `DataLoader` that makes tensors of one image after another with torchvision's transforms,
  as in Flower's PyTorch tutorial.
- `defaults`: the same, with Flower's own default of two CPUs a client.
- `lean`: batches, local steps and scoring by flexifed's own functions, so that what differs is the engine alone.

What a process needs of the data it loads once, at its first call, for all clients. Prints JSON in its last line: when
each round ended, what each client scored in it, and for how long it trained and was scored.
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
    """A job as a client process knows it: models, data, and what a client does with them, with so many threads."""

    def __init__(self, job: Job, threads: int = 1) -> None:
        config, self.info = job.config(), job.info()
        self.config = replace(config, numerics=replace(config.numerics, threads=threads))
        data = open_dataset(self.info)
        shards = make_shards(self.config, self.info)
        self.train_samples = [data.train.take(shard.train) for shard in shards]
        self.test_samples = [data.test.take(shard.test) for shard in shards]
        self.pipeline = make_pipeline(data, self.config.family, device=CPU, channels_last=True)

    def model(self, client: int) -> nn.Module:
        """The model of a client, with the weights that all of its architecture begin with."""
        generator = torch_generator(self.config.seed, "init")
        model = cell_model(self.config, self.info, self.config.model_name(client), generator=generator)
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def window(self, client: int, round_index: int) -> torch.Tensor:
        """Which of its training samples the client trains on in a round, int64 (count,)."""
        shard = np.arange(len(self.train_samples[client][1]))
        return torch.from_numpy(window(shard, round_index, self.config.partition.windows_per_shard))

    def train(self, model: nn.Module, client: int, round_index: int) -> float:
        """Train in place; returns the mean loss."""
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
        """Accuracy and loss on the client's own test shard."""
        samples, labels = self.test_samples[client]
        # Without Winograd's algorithm, which a workspace would switch on for wide convolutions: all records of this
        # benchmark were scored by PyTorch's own.
        workspace = Workspace(model, self.config.training, replace(self.config.numerics, winograd=False))
        score = streams.run_to_end(evaluate.evaluate(workspace, samples, labels, pipeline=self.pipeline))
        return score.accuracy, score.loss


class Images(TorchDataset[tuple[torch.Tensor, torch.Tensor]]):
    """A client's samples as PIL images, which torchvision's transforms make tensors of, one by one."""

    def __init__(self, samples: LabelledSamples, transform: Compose) -> None:
        images, self._labels = samples
        self._images = [to_pil_image(image) for image in images]
        self._transform = transform

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._transform(self._images[index]), self._labels[index]


class TutorialTask(Task):
    """The same with PyTorch's DataLoader and loops, as in Flower's tutorials."""

    def __init__(self, job: Job, threads: int = 1) -> None:
        super().__init__(job, threads)
        plain = [ToTensor(), Normalize(self.info.mean, self.info.std)]
        varied = [RandomCrop(32, padding=4), RandomHorizontalFlip()] if self.config.training.augment else []
        self._train_images = [Images(samples, Compose([*varied, *plain])) for samples in self.train_samples]
        self._test_images = [Images(samples, Compose(plain)) for samples in self.test_samples]

    def train(self, model: nn.Module, client: int, round_index: int) -> float:
        """Train in place; returns the mean loss over the batches."""
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
        """Accuracy and loss on the client's own test shard."""
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
        """The model of a client, in PyTorch's own memory format."""
        return super().model(client).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


PROGRAMS = {"defaults": TutorialTask, "tutorial": TutorialTask, "lean": Task}


@cache
def task(program: str, job: str) -> Task:
    """Made once in each process, for all its calls."""
    if program == "lean":
        keep_freed_memory()  # as flexifed's own processes do
    return PROGRAMS[program](Job.from_json(job), CPUS_PER_CLIENT[program])


def _received(message: Message, context: Context) -> tuple[Task, int, nn.Module, int]:
    """What a call is about: the task, the client, its model with the arrays of the message, the round from 0."""
    config = message.content["config"]
    mine = task(str(config["program"]), str(config["job"]))
    client = int(context.node_config["partition-id"])
    model = mine.model(client)
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    return mine, client, model, int(config["server-round"]) - 1


@client_app.query()
def query(message: Message, context: Context) -> Message:
    """Say which client this is, and which architecture it has."""
    client = int(context.node_config["partition-id"])
    name = Job.from_json(str(message.content["config"]["job"])).config().model_name(client)
    return Message(RecordDict({"who": ConfigRecord({"client": client, "architecture": name})}), reply_to=message)


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Train the model of the message on the client's samples."""
    mine, client, model, round_index = _received(message, context)
    started = time.perf_counter()
    with numeric_settings(mine.config.numerics):
        loss = mine.train(model, client, round_index)
    metrics: dict[str, Any] = {
        "train_loss": loss,
        "train_s": time.perf_counter() - started,
        "num-examples": len(mine.window(client, round_index)),
    }
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord(metrics)})
    return Message(content, reply_to=message)


@client_app.evaluate()
def test(message: Message, context: Context) -> Message:
    """Score the model of the message on the client's own test samples."""
    mine, client, model, _ = _received(message, context)
    started = time.perf_counter()
    with numeric_settings(mine.config.numerics):
        accuracy, loss = mine.test(model, client)
    metrics: dict[str, Any] = {
        "client": client,
        "accuracy": accuracy,
        "loss": loss,
        "eval_s": time.perf_counter() - started,
        "num-examples": len(mine.test_samples[client][0]),
    }
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)


class FedAvgByArchitecture(FedAvg):
    """FedAvg among the clients of each architecture; all of them take part in every round.

    One record holds the arrays of all architectures, named `<architecture>/<name>`; a client gets those of its own.

    Args:
        architecture_of: by node, in the order of clients.
    """

    def __init__(self, architecture_of: dict[int, str]) -> None:
        super().__init__()
        self.rounds: list[dict[str, Any]] = []
        self._architecture_of = architecture_of
        self._train_s = 0.0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """A message to every client, with the arrays of its architecture."""
        return self._messages(server_round, arrays, config, MessageType.TRAIN)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The same, to be scored."""
        return self._messages(server_round, arrays, config, MessageType.EVALUATE)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Flower's own FedAvg, for one architecture after another."""
        by_node = _by_node(replies, len(self._architecture_of))
        self._train_s = sum(reply.content["metrics"]["train_s"] for reply in by_node.values())
        merged = ArrayRecord()
        for architecture in dict.fromkeys(self._architecture_of.values()):
            own = [by_node[node] for node, name in self._architecture_of.items() if name == architecture]
            arrays, _ = super().aggregate_train(server_round, own)
            assert arrays is not None
            merged.update({f"{architecture}/{name}": array for name, array in arrays.items()})
        return merged, None

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Note what each client scored, and the time: the round has ended."""
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
        told = ConfigRecord({**config, "server-round": server_round})
        by_architecture: dict[str, ArrayRecord] = {}
        for full_name, array in arrays.items():
            architecture, name = full_name.split("/", 1)
            by_architecture.setdefault(architecture, ArrayRecord())[name] = array
        contents = {
            architecture: RecordDict({self.arrayrecord_key: own, self.configrecord_key: told})
            for architecture, own in by_architecture.items()
        }
        return [
            Message(contents[name], dst_node_id=node, message_type=message_type)
            for node, name in self._architecture_of.items()
        ]


def _by_node(replies: Iterable[Message], expected: int) -> dict[int, Message]:
    """Replies by the node that sent them.

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
    """A ServerApp that plays the job, and puts what it heard of each round into `rounds`."""
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        config = job.config()
        told = ConfigRecord({"job": job.to_json(), "program": program})
        while len(nodes := list(grid.get_node_ids())) < job.clients:
            time.sleep(0.1)
        questions = [
            Message(RecordDict({"config": told}), dst_node_id=node, message_type=MessageType.QUERY) for node in nodes
        ]
        answers = _by_node(grid.send_and_receive(questions), job.clients)
        who = {node: answer.content["who"] for node, answer in answers.items()}
        ordered = sorted(who, key=lambda node: who[node]["client"])
        strategy = FedAvgByArchitecture({node: str(who[node]["architecture"]) for node in ordered})
        models = Task(job)
        initial = {
            f"{config.model_name(client)}/{name}": tensor
            for client in range(min(job.clients, len(config.versions)))
            for name, tensor in models.model(client).state_dict().items()
        }
        strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord(initial),
            num_rounds=job.rounds,
            train_config=told,
            evaluate_config=ConfigRecord(told),
        )
        rounds.extend(strategy.rounds)

    return server_app


def play(job: Job, program: str) -> list[dict[str, Any]]:
    """Let Flower's simulation engine play the job; returns what was heard of each round."""
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
    """Play, and print."""
    try:
        print(json.dumps(play(Job.from_json(sys.argv[1]), sys.argv[2])), flush=True)
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # when the engine has failed, the thread of the ServerApp waits for it without end


if __name__ == "__main__":
    from flower_app import main as importable_main  # so that Flower's actors import this file once, and keep its caches

    importable_main()
