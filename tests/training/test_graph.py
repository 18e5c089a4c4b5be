"""A recorded and replayed step gives the same bits as a step without recording, with all settings of training.

`CpuRecorder` stands in for CUDA graphs and detects what a recording would get wrong. The tests at the end need a GPU.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import MagicMock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recording import CaptureError, CpuRecorder
from torch import nn

from flexifed.config import CellConfig, ModelConfig, NumericsConfig, PartitionConfig, TrainingConfig
from flexifed.data import find_dataset
from flexifed.data.pipeline import ImagePipeline
from flexifed.errors import ConfigError
from flexifed.federation.cell import make_shards
from flexifed.federation.rounds import Federation, LocalHosts
from flexifed.models import build_model
from flexifed.training.graph import CudaGraphs, Record, RecordedStep
from flexifed.training.local import train
from flexifed.training.numerics import numeric_settings, seeded_dropout
from flexifed.training.step import Step
from flexifed.training.streams import Steps, Stream, overlap, run_to_end
from flexifed.training.workspace import Workspace

CPU = torch.device("cpu")
CLASSES = 3


class SmallModel(nn.Module):
    """A small model with all kinds of layers that the families have: (batch, 1, 4, 4) to (batch, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(16, CLASSES),
        )
        self.register_buffer("mask", torch.zeros(8, 8))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.mask.copy_(nn.functional.dropout(torch.ones_like(self.mask), 0.5, self.training))
        scores: torch.Tensor = self.layers(images)
        return scores


def small_model(seed: int = 0, device: torch.device = CPU) -> SmallModel:
    model = SmallModel()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return model.to(device, memory_format=torch.channels_last)


def images(count: int, seed: int, device: torch.device = CPU) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, 1, 4, 4), generator=generator).to(torch.uint8)
    return pixels.to(device), torch.randint(CLASSES, (count,), generator=generator).to(device)


State = dict[str, torch.Tensor]


def take_turns(
    workspace: Workspace, counts: Sequence[int], rounds: int = 2
) -> tuple[list[State], list[float], torch.Tensor]:
    """Let clients train in turn in one workspace, each from its own state.

    Args:
        workspace: the shared workspace.
        counts: number of samples of each client.
        rounds: how often each client trains.

    Returns:
        The state of each client after each round, the losses, and random numbers that are drawn afterwards.
    """
    device = workspace.device
    pipeline = ImagePipeline((0.5,), (0.25,), device, channels_last=True)
    clients = [small_model(seed, device).state_dict() for seed in range(len(counts))]
    states, losses = [], []
    torch.manual_seed(99)
    for round_index in range(rounds):
        for client, count in enumerate(counts):
            with torch.no_grad():
                for name, tensor in workspace.model.state_dict().items():
                    tensor.copy_(clients[client][name])
            samples, labels = images(count, client, device)
            with seeded_dropout(10 * client + round_index, device):
                steps = train(
                    workspace,
                    samples,
                    labels,
                    pipeline=pipeline,
                    batches=torch.Generator().manual_seed(client),
                    augmentation=torch.Generator().manual_seed(round_index),
                )
                losses.append(run_to_end(steps).item())
            clients[client] = {name: tensor.clone() for name, tensor in workspace.model.state_dict().items()}
            states.append(clients[client])
    return states, losses, torch.rand(4, device=device)


def workspaces(
    config: TrainingConfig, numerics: dict[str, object], record: Record | None = None, device: torch.device = CPU
) -> tuple[Workspace, Workspace]:
    """A workspace that runs every step eagerly, and one that records its steps."""
    eager = Workspace(small_model(device=device), config, NumericsConfig(**numerics))
    recorded = Workspace(small_model(device=device), config, NumericsConfig(cuda_graph=True, **numerics), record)
    return eager, recorded


def assert_equal(first: State, second: State) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize("precision", [None, "bf16"])
@pytest.mark.parametrize("fused", [None, False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_replayed_steps_equal_eager_steps(
    momentum: float, weight_decay: float, fused: bool | None, precision: str | None
) -> None:
    """The clients' batches are 8, 8 and 4; 8 and 1; only 7; and again 8, 8 and 4."""
    record = CpuRecorder()
    config = TrainingConfig(
        local_epochs=2, batch_size=8, learning_rate=0.1, momentum=momentum, weight_decay=weight_decay
    )
    eager, recorded = workspaces(config, {"fused": fused, "precision": precision}, record)
    counts = [20, 9, 7, 20]
    states, losses, drawn = take_turns(eager, counts)
    replayed, replayed_losses, also_drawn = take_turns(recorded, counts)
    for state, replayed_state in zip(states, replayed, strict=True):
        assert_equal(state, replayed_state)
    assert losses == replayed_losses
    assert torch.equal(drawn, also_drawn), "no recording may use up random numbers"
    assert record.recorded == 4, "one for each batch size"
    assert record.replayed == 2 * 2 * (3 + 2 + 1 + 3)
    assert len({state["mask"].numpy().tobytes() for state in replayed}) > len(counts), "or no random number was tested"


@given(
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    batch_size=st.integers(1, 13),
    epochs=st.integers(1, 2),
    momentum=st.sampled_from([0.0, 0.5]),
)
@settings(max_examples=25)
def test_replayed_steps_equal_eager_steps_for_any_number_of_samples(
    counts: list[int], batch_size: int, epochs: int, momentum: float
) -> None:
    config = TrainingConfig(local_epochs=epochs, batch_size=batch_size, learning_rate=0.1, momentum=momentum)
    record = CpuRecorder()
    eager, recorded = workspaces(config, {}, record)
    states, losses, drawn = take_turns(eager, counts, rounds=1)
    replayed, replayed_losses, also_drawn = take_turns(recorded, counts, rounds=1)
    for state, replayed_state in zip(states, replayed, strict=True):
        assert_equal(state, replayed_state)
    assert losses == replayed_losses
    assert torch.equal(drawn, also_drawn)
    sizes = {min(batch_size, count - first) for count in counts for first in range(0, count, batch_size)}
    assert record.recorded == len(sizes)


@pytest.mark.parametrize(
    ("dataset", "family", "width", "streams"),
    [
        ("cifar10", "vgg", 0.03, 1),
        ("cifar10", "vgg", 0.03, 5),
        ("cifar10", "resnet", 0.1, 1),
        ("agnews", "charcnn", 0.02, 2),
        ("agnews", "vdcnn", 0.02, 1),
    ],
)
def test_a_federation_of_replayed_steps_ends_with_the_same_bits(
    dataset: str, family: str, width: float, streams: int, tmp_path: object
) -> None:
    """Clients 0 and 4 train in turn in one workspace, or overlap; they have shared and personal layers."""
    info = find_dataset(dataset, data="synthetic", data_dir=tmp_path)  # type: ignore[arg-type]
    config = CellConfig(
        dataset=dataset,  # type: ignore[arg-type]
        family=family,  # type: ignore[arg-type]
        scheme="basic_common",
        model=ModelConfig(width=width),
        partition=PartitionConfig(num_clients=5, num_shards=100, windows_per_shard=2, max_train=20, max_test=4),
        training=TrainingConfig(local_epochs=1, batch_size=6),
    )
    digests, losses, record = [], [], CpuRecorder()
    for recorded in (False, True):
        hosts = LocalHosts(config, info, make_shards(config, info), streams=streams if recorded else 1)
        [host] = hosts._hosts
        if recorded:  # the config of a cell on a CPU can't ask for graphs
            numerics = NumericsConfig(cuda_graph=True)
            built = {id(client._workspace): client._workspace for client in host._clients}
            recording = {
                key: Workspace(workspace.model, workspace.config, numerics, record) for key, workspace in built.items()
            }
            for client in host._clients:
                client._workspace = recording[id(client._workspace)]
        federation = Federation(config, info, hosts)
        played = [federation.play_round().clients for _ in range(2)]
        losses.append([(client.loss, client.train_loss) for clients in played for client in clients])
        digests.append(host.state_sha256(federation.shared))
    assert digests[0] == digests[1]
    assert losses[0] == losses[1]
    assert record.recorded == 2 * len(recording), "two batch sizes"
    assert len(recording) == max(4, streams), "one for each of four architectures, or as many as overlap"


# What the stand-in detects


def make_step(**config: object) -> Step:
    return Step(small_model(), TrainingConfig(learning_rate=0.1, **config), NumericsConfig())  # type: ignore[arg-type]


def inputs(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    samples, labels = images(count, seed)
    return samples / 255, labels


@pytest.mark.parametrize(
    "work",
    [
        lambda tensor: tensor.sum().item(),
        lambda tensor: tensor[tensor > 0],
        lambda tensor: tensor + torch.tensor(3.0),
        lambda tensor: tensor.nonzero(),
    ],
    ids=["item", "mask", "tensor", "nonzero"],
)
def test_the_stand_in_refuses_what_a_capture_refuses(work: Callable[[torch.Tensor], object]) -> None:
    with pytest.raises(CaptureError, match="waits for the device, or copies from the host"):
        CpuRecorder()(lambda: work(torch.ones(3)))


def test_the_stand_in_detects_steps_that_are_not_all_alike() -> None:
    total, runs = torch.zeros(()), []

    def work() -> None:
        runs.append(None)
        total.add_(len(runs))

    replay = CpuRecorder()(work)
    assert (total.item(), len(runs)) == (1 + 2, 2)
    replay()
    assert (total.item(), len(runs)) == (1 + 2 + 2, 2), "Python is not run again"


def test_the_stand_in_detects_tensors_that_outlive_a_step() -> None:
    total, kept = torch.zeros(3), []

    def work() -> None:
        if len(kept) < 2:  # the recording is the second run
            kept.append(torch.ones(3))
        total.add_(kept[-1])

    replay = CpuRecorder()(work)
    kept[-1].fill_(5)
    replay()
    assert total.tolist() == [3, 3, 3], "created again in every replay"


def test_recordings_are_freed_with_their_workspace() -> None:
    _, recorded = workspaces(TrainingConfig(batch_size=4, local_epochs=1), {}, CpuRecorder())
    take_turns(recorded, [6])
    model = weakref.ref(recorded.model)
    gc.disable()
    try:
        del recorded
        assert model() is None, "or a GPU's memory would be held until the garbage collector runs"
    finally:
        gc.enable()


def test_a_recording_leaves_values_momentum_and_losses_as_they_were() -> None:
    """The second batch size first occurs when the model has already been trained with the first."""
    step = make_step()
    recorded = RecordedStep(step, CpuRecorder())
    recorded.reset()
    recorded(*inputs(4))
    before = [tensor.clone() for tensor in step.tensors()]
    drawn = torch.get_rng_state()
    recorded._recording(*inputs(3))
    assert all(torch.equal(old, tensor) for old, tensor in zip(before, step.tensors(), strict=True))
    assert torch.equal(drawn, torch.get_rng_state())


class FakeGenerator:
    """A fake of a GPU's default generator, which points to a state of (seed, offset)."""

    def __init__(self, state: list[int]) -> None:
        self.state = state

    def clone_state(self) -> FakeGenerator:
        return FakeGenerator(list(self.state))

    def graphsafe_get_state(self) -> FakeGenerator:
        return FakeGenerator(self.state)

    def graphsafe_set_state(self, other: FakeGenerator) -> None:
        self.state = other.state

    def get_state(self) -> list[int]:
        return list(self.state)

    def set_state(self, values: list[int]) -> None:
        self.state[:] = values


class FakeCuda:
    """A fake of what graphs use of `torch.cuda`. A graph draws random numbers from the state it was recorded with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.generator = FakeGenerator([3, 0])
        self.drawn: list[tuple[int, int]] = []
        self.capturing: list[int] | None = None  # offsets within the graph
        self.states: list[list[int]] = []
        fakes = {
            "default_generators": (self.generator,),
            "current_device": lambda: 0,
            "graph_pool_handle": object,
            "Stream": lambda: self.stream("side"),
            "current_stream": lambda: self.stream("client"),
            "stream": self.entered,
            "CUDAGraph": MagicMock,
            "graph": self.graph,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: self.order.append("clear"))
        self.order: list[str] = []
        self.current = "client"

    def stream(self, name: str) -> MagicMock:
        stream = MagicMock(wait_stream=lambda other: self.order.append(f"{name} waits for {other.label}"))
        stream.label = name
        return stream

    @contextmanager
    def entered(self, stream: MagicMock) -> Iterator[None]:
        before, self.current = self.current, stream.label
        yield
        self.current = before

    def draw(self) -> None:
        self.order.append(f"work on {self.current}" if self.capturing is None else "captured")
        if self.capturing is None:
            self.drawn.append((self.generator.state[0], self.generator.state[1]))
            self.generator.state[1] += 4
        else:
            self.capturing.append(4 * len(self.capturing))

    @contextmanager
    def graph(self, graph: MagicMock, pool: object, stream: MagicMock) -> Iterator[None]:
        state, self.capturing = self.generator.state, []
        self.order.append(f"capture on {stream.label}")
        yield
        offsets, self.capturing = self.capturing, None
        self.states.append(state)

        def replay() -> None:
            self.drawn += [(state[0], state[1] + offset) for offset in offsets]
            state[1] += 4 * len(offsets)

        graph.replay = replay


def test_each_recorder_has_its_own_generator_state_and_draws_what_the_default_one_would(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """PyTorch keeps a state's seed and offset in one place on the GPU, to which overlapping graphs would both write."""
    cuda = FakeCuda(monkeypatch)
    own = cuda.generator.state
    replays = [record(lambda: (cuda.draw(), cuda.draw())) for record in (CudaGraphs(), CudaGraphs())]
    assert cuda.generator.state is own
    assert len({id(state) for state in (own, *cuda.states)}) == 3
    assert own == [3, 2 * 3 * 2 * 4], "warm-ups draw; the caller restores the state"
    cuda.drawn.clear()
    own[:] = [8, 0]
    for replay in (*replays, replays[0]):
        replay()
    cuda.draw()
    assert cuda.drawn == [(8, 4 * count) for count in range(7)]


def test_a_recording_waits_and_is_waited_for_and_has_its_own_cublas_workspace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = FakeCuda(monkeypatch)
    CudaGraphs()(cuda.draw)
    warm_up = ["side waits for client", "work on side", "work on side", "work on side", "client waits for side"]
    assert cuda.order == [*warm_up, "clear", "capture on side", "captured", "clear", "client waits for side"]


def test_a_recording_never_writes_to_the_callers_batch() -> None:
    recorded = RecordedStep(make_step(), CpuRecorder())
    recorded.reset()
    first = inputs(4, seed=1)
    recorded(*first)
    recorded(*inputs(4, seed=2))
    assert all(torch.equal(tensor, same) for tensor, same in zip(first, inputs(4, seed=1), strict=True))


def test_graphs_are_refused_on_cpus() -> None:
    with pytest.raises(ConfigError, match="cuda_graph is True, which CPUs do not have; leave it out, or choose --dev"):
        CellConfig(dataset="cifar10", family="vgg", scheme="standalone", numerics=NumericsConfig(cuda_graph=True))
    with pytest.raises(ConfigError, match="cuda_graph is 1; choose one of: True, False"):
        NumericsConfig(cuda_graph=1)  # type: ignore[arg-type]


def test_graphs_change_the_run_id() -> None:
    with_graphs = CellConfig(
        dataset="cifar10", family="vgg", scheme="standalone", device="cuda", numerics=NumericsConfig(cuda_graph=True)
    )
    plain = CellConfig(dataset="cifar10", family="vgg", scheme="standalone", device="cuda")
    assert with_graphs.run_id("data") != plain.run_id("data")


# On a GPU

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: PyTorch finds none")


@needs_gpu
@pytest.mark.parametrize("precision", [None, "bf16"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_on_a_gpu_graphs_and_eager_steps_agree(momentum: float, precision: str | None) -> None:
    """Within rounding differences, since a library may choose other kernels during a capture."""
    device = torch.device("cuda")
    config = TrainingConfig(local_epochs=2, batch_size=8, learning_rate=0.1, momentum=momentum)
    numerics = {"precision": precision}
    eager, recorded = workspaces(config, numerics, device=device)
    with numeric_settings(NumericsConfig(**numerics)):
        states, losses, drawn = take_turns(eager, [20, 9, 7, 20])
        replayed, replayed_losses, also_drawn = take_turns(recorded, [20, 9, 7, 20])
    tolerance = 1e-3 if precision is None else 2e-2
    for state, replayed_state in zip(states, replayed, strict=True):
        assert torch.equal(state["mask"], replayed_state["mask"]), "dropout draws the same"
        assert state.keys() == replayed_state.keys()
        for name in state:
            torch.testing.assert_close(state[name], replayed_state[name], rtol=tolerance, atol=tolerance)
    assert losses == pytest.approx(replayed_losses, rel=tolerance)
    assert torch.equal(drawn, also_drawn)


@needs_gpu
def test_on_a_gpu_graphs_that_overlap_draw_what_they_draw_alone() -> None:
    device = torch.device("cuda")
    config = TrainingConfig(local_epochs=20, batch_size=8, learning_rate=0.1)
    pipeline = ImagePipeline((0.5,), (0.25,), device, channels_last=True)

    def computation(workspace: Workspace, seed: int) -> Steps[torch.Tensor]:
        """Combine all masks that a client's dropout draws."""
        total = torch.zeros(8, 8, device=device)
        streams = {name: torch.Generator().manual_seed(seed) for name in ("batches", "augmentation")}
        with seeded_dropout(seed, device):
            for _ in train(workspace, *images(20, seed, device), pipeline=pipeline, **streams):
                total = 3 * total.remainder(1000) + workspace.model.mask
                yield
        return total

    alone, together = ([workspaces(config, {}, device=device)[1] for _ in range(4)] for _ in range(2))
    expected = [run_to_end(computation(workspace, seed)) for seed, workspace in enumerate(alone)]
    for _ in range(2):  # the second time with the recordings of the first
        computations = [computation(workspace, seed) for seed, workspace in enumerate(together)]
        masks = overlap(computations, [Stream(device) for _ in computations])
        assert all(torch.equal(mask, expected_mask) for mask, expected_mask in zip(masks, expected, strict=True))


@needs_gpu
@pytest.mark.parametrize("name", ["vgg11_bn", "resnet20", "charcnn3", "vdcnn9"])
def test_on_a_gpu_every_familys_step_can_be_captured(name: str) -> None:
    device = torch.device("cuda")
    model = build_model(name, num_classes=10, width=0.1, device=device)
    is_text = name in ("charcnn3", "vdcnn9")
    length = 1014 if name == "charcnn3" else 1024
    batch = torch.randint(0, 70, (4, length), device=device) if is_text else torch.randn(4, 3, 32, 32, device=device)
    model.train()
    step = RecordedStep(Step(model, TrainingConfig(), NumericsConfig()), CudaGraphs())
    step.reset()
    step(batch, torch.arange(4, device=device))
    assert torch.isfinite(step.loss_sum)
