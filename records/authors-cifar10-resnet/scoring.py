"""Score a run's trained models in several ways, on each client's own test shard. Prints scoring.txt.

uv run python records/authors-cifar10-resnet/scoring.py RUN_FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

import flexifed
from flexifed.data import make_pipeline, open_dataset


def accuracy(model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor, batch_size: int = 500) -> float:
    """The accuracy in percent."""
    with torch.no_grad():
        predicted = torch.cat([model(batch).argmax(1) for batch in inputs.split(batch_size)])
    return 100 * (predicted == labels).double().mean().item()


clients = flexifed.load_clients(Path(sys.argv[1]))
data = open_dataset(clients.info)
pipeline = make_pipeline(data, clients.config.family, device=torch.device("cpu"), channels_last=False)
print(f"{clients.config.scheme} after {clients.rounds} rounds, accuracy in percent")
print("client model     evaluation  training, batches of 64  re-estimated statistics  own training shard, evaluation")
for client in range(len(clients)):
    shards = clients.shards(client)
    samples, labels = data.test.take(shards.test)
    own_samples, own_labels = data.train.take(shards.train)
    inputs, own_inputs = pipeline.prepare(samples), pipeline.prepare(own_samples)
    model = clients.model(client)
    evaluation, own = accuracy(model, inputs, labels), accuracy(model, own_inputs, own_labels)
    training = accuracy(clients.model(client).train(), inputs, labels, batch_size=64)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # a plain mean over the batches that follow: those of the own training shard
    accuracy(model.train(), own_inputs, own_labels)
    again = accuracy(model.eval(), inputs, labels)
    name = clients.config.model_name(client)
    print(f"{client:6} {name:9} {evaluation:10.1f} {training:24.1f} {again:24.1f} {own:31.1f}")
