"""A federation of one client computes what plain PyTorch does: here its loops are written out, image by image.

The only thing that the two sides share is the named generators from which they draw.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torchvision.transforms import functional as vision

from flexifed.config import (
    CellConfig,
    ModelConfig,
    NumericsConfig,
    PartitionConfig,
    TrainingConfig,
)
from flexifed.data import open_dataset, synthetic
from flexifed.data.augment import CropAndFlip
from flexifed.data.pipeline import ImagePipeline
from flexifed.errors import ClientError, ConfigError
from flexifed.federation.cell import ClientShards, make_shards
from flexifed.federation.rounds import Federation, LocalHosts
from flexifed.models import build_model
from flexifed.seeding import derive_seed, torch_generator
from flexifed.training.evaluate import Score, evaluate
from flexifed.training.numerics import numeric_settings, seeded_dropout
from flexifed.training.streams import Steps, run_to_end
from flexifed.training.workspace import Workspace

INFO = synthetic.info()
SEED = 3
ROUNDS = 3


def one_client(
    *,
    numerics: NumericsConfig = NumericsConfig(),  # noqa: B008
    num_clients: int = 1,
    **training: object,
) -> CellConfig:
    """A client with 50 samples a round, in batches of 16, 16, 16 and 2; the third round reuses the first window."""
    return CellConfig(
        dataset="cifar10",
        family="vgg",
        scheme="standalone",
        seed=SEED,
        model=ModelConfig(width=0.03),
        partition=PartitionConfig(num_clients=num_clients, num_shards=500, windows_per_shard=2),
        training=TrainingConfig(**{"local_epochs": 2, "batch_size": 16, "learning_rate": 0.05, **training}),
        numerics=numerics,
    )


@dataclass(frozen=True)
class Trained:
    """What has become of a client.

    Attributes:
        state: its state after `ROUNDS` rounds.
        accuracies: on its test shard, at the start of each round and after the last.
        losses: likewise.
        train_losses: the mean over the samples and epochs of each round.
    """

    state: dict[str, torch.Tensor]
    accuracies: list[float]
    losses: list[float]
    train_losses: list[float]


def federated(config: CellConfig) -> list[Trained]:
    """The clients of a federation in this process."""
    hosts = LocalHosts(config, INFO, make_shards(config, INFO))
    federation = Federation(config, INFO, hosts)
    results = [federation.play_round(train=round_index < ROUNDS) for round_index in range(ROUNDS + 1)]
    (host,) = hosts._hosts
    return [
        Trained(
            state=dict(client.state(host._complete(federation.shared))),
            accuracies=[result.clients[client.index].accuracy for result in results],
            losses=[result.clients[client.index].loss for result in results],
            train_losses=[result.clients[client.index].train_loss for result in results[:-1]],
        )
        for client in host._clients
    ]


def plain(config: CellConfig, shards: ClientShards, client: int = 0) -> Trained:
    """The same training and scoring in plain PyTorch."""
    options = config.training
    memory_format = torch.channels_last if config.numerics.channels_last else torch.contiguous_format
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=config.numerics.precision == "bf16")
    model = build_model(
        config.model_name(client), num_classes=10, width=0.03, generator=torch_generator(SEED, "init", client)
    ).to(memory_format=memory_format)

    def to_inputs(images: torch.Tensor) -> torch.Tensor:
        return torch.stack([normalised(image) for image in images]).to(memory_format=memory_format)

    images, labels = open_dataset(INFO).train.take(shards.train)
    test_images, test_labels = open_dataset(INFO).test.take(shards.test)
    length = len(images) // config.partition.windows_per_shard
    accuracies, losses, train_losses = [], [], []
    with torch.random.fork_rng():
        for round_index in range(ROUNDS + 1):
            torch.manual_seed(derive_seed(SEED, "scoring", client, round_index))
            scored_model = copy.deepcopy(model).train(options.scoring == "train")
            with torch.no_grad(), autocast:
                outputs = scored_model(to_inputs(test_images)).float()
            accuracies.append(int((outputs.argmax(1) == test_labels).sum()) / len(test_labels))
            losses.append(functional.cross_entropy(outputs, test_labels, reduction="sum").item() / len(test_labels))
            if round_index == ROUNDS:
                break
            first = round_index * length % len(images)
            window, targets = images[first : first + length], labels[first : first + length]
            batches = torch_generator(SEED, "batches", client, round_index)
            augmentation = torch_generator(SEED, "augmentation", client, round_index)
            torch.manual_seed(derive_seed(SEED, "dropout", client, round_index))
            optimizer = torch.optim.SGD(
                model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, fused=config.numerics.fused
            )
            model.train()
            loss_sum = 0.0
            for _ in range(options.local_epochs):
                order = torch.randperm(length, generator=batches)
                for start in range(0, length, options.batch_size):
                    rows = order[start : start + options.batch_size]
                    batch = window[rows]
                    if options.augment:
                        batch = cropped_and_flipped(batch, augmentation)
                    inputs = to_inputs(batch)
                    optimizer.zero_grad()
                    with autocast:
                        loss = functional.cross_entropy(model(inputs), targets[rows])
                    loss.backward()
                    optimizer.step()
                    loss_sum += loss.item() * len(rows)
            train_losses.append(loss_sum / (options.local_epochs * length))
    return Trained(model.state_dict(), accuracies, losses, train_losses)


def cropped_and_flipped(images: torch.Tensor, generator: torch.Generator, padding: int = 4) -> torch.Tensor:
    """Apply torchvision's padding, crop and flip to one image after another, with the pipeline's random numbers."""
    count, _, height, width = images.shape
    rows, columns = torch.randint(2 * padding + 1, (2, count, 1), generator=generator).squeeze(2).tolist()
    flips = (torch.rand(count, 1, generator=generator) < 0.5).squeeze(1).tolist()
    shifted = []
    for image, row, column, flip in zip(images, rows, columns, flips, strict=True):
        cut = vision.crop(vision.pad(image, [padding] * 4), row, column, height, width)
        shifted.append(vision.hflip(cut) if flip else cut)
    return torch.stack(shifted)


def normalised(image: torch.Tensor) -> torch.Tensor:
    """(pixel - mean) / std for each channel, with pixels counted from 0 to 255."""
    return torch.stack(
        [
            (channel.float() - 255 * torch.tensor(mean)) / (255 * torch.tensor(std))
            for channel, mean, std in zip(image, INFO.mean, INFO.std, strict=True)
        ]
    )


def differing(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that are not equal to the last bit."""
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def assert_same(first: Trained, second: Trained) -> None:
    """States and scores are equal to the last bit. Sums of losses may be rounded in another order."""
    assert differing(first.state, second.state) == []
    assert (first.accuracies, first.losses) == (second.accuracies, second.losses)
    assert first.train_losses == pytest.approx(second.train_losses, rel=1e-6)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("augment", [True, False])
@pytest.mark.parametrize("scoring", ["eval", "train"])
def test_one_client_trains_and_scores_exactly_as_plain_pytorch_does(
    channels_last: bool, augment: bool, scoring: str
) -> None:
    config = one_client(numerics=NumericsConfig(channels_last=channels_last), augment=augment, scoring=scoring)
    (trained,) = federated(config)
    assert_same(trained, plain(config, make_shards(config, INFO)[0]))


def test_every_client_has_samples_weights_and_random_numbers_of_its_own() -> None:
    config = one_client(num_clients=2)
    shards = make_shards(config, INFO)
    for client, trained in enumerate(federated(config)):
        assert_same(trained, plain(config, shards[client], client))


@pytest.mark.parametrize("numerics", [NumericsConfig(fused=True), NumericsConfig(precision="bf16")])
def test_other_numerics_agree_with_pytorch_and_change_bits(numerics: NumericsConfig) -> None:
    config = one_client(numerics=numerics)
    (trained,) = federated(config)
    assert_same(trained, plain(config, make_shards(config, INFO)[0]))
    (default,) = federated(one_client())
    assert differing(trained.state, default.state), "or they need not be settings"
    assert trained.losses != default.losses


def test_tf32_is_refused_on_cpus() -> None:
    with pytest.raises(ConfigError, match="precision is 'tf32', which CPUs do not have; leave it out, or choose bf16"):
        one_client(numerics=NumericsConfig(precision="tf32"))


def scored(scoring: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor, Score]:
    """A model, its test images and labels, and its score in batches of 24, 24 and 12."""
    model = build_model("vgg11_bn", num_classes=10, width=0.03, generator=torch_generator(SEED, "init", 0))
    images, labels = open_dataset(INFO).test.take(make_shards(one_client(), INFO)[0].test)
    images, labels = images.repeat(3, 1, 1, 1), labels.repeat(3)
    pipeline = ImagePipeline(INFO.mean, INFO.std, torch.device("cpu"), channels_last=False)
    config = TrainingConfig(scoring=scoring, eval_batch_size=24)
    workspace = Workspace(model, config, NumericsConfig())
    with seeded_dropout(11, torch.device("cpu")):
        score = run_to_end(evaluate(workspace, images, labels, pipeline=pipeline))
    return model, images, labels, score


@pytest.mark.parametrize("scoring", ["eval", "train"])
def test_a_score_is_exactly_that_of_a_plain_loop_in_the_same_mode(scoring: str) -> None:
    model, images, labels, score = scored(scoring)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train(scoring == "train")
    loss_function = nn.CrossEntropyLoss(reduction="sum")
    correct, loss = 0, 0.0
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(11)
        for start in range(0, len(images), 24):
            inputs = torch.stack([normalised(image) for image in images[start : start + 24]])
            outputs, targets = model(inputs), labels[start : start + 24]
            correct += int((outputs.argmax(1) == targets).sum())
            loss += loss_function(outputs, targets).item()
    assert score == Score(accuracy=correct / len(images), loss=loss / len(images))
    changed = differing(before, model.state_dict())
    assert bool(changed) == (scoring == "train"), "only in training mode does the plain loop change running statistics"


def test_scoring_modes_give_different_scores() -> None:
    assert scored("eval")[-1].loss != scored("train")[-1].loss


@pytest.mark.parametrize("scoring", ["eval", "train"])
def test_scoring_leaves_every_tensor_as_it_was(scoring: str) -> None:
    model = scored(scoring)[0]
    fresh = build_model("vgg11_bn", num_classes=10, width=0.03, generator=torch_generator(SEED, "init", 0))
    assert differing(model.state_dict(), fresh.state_dict()) == []


@given(
    count=st.integers(1, 40),
    channels=st.integers(1, 3),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    padding=st.integers(0, 5),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_crop_and_flip_agree_pixel_by_pixel_with_torchvision(
    count: int, channels: int, height: int, width: int, padding: int, seed: int
) -> None:
    pixels = torch.randint(256, (count, channels, height, width), generator=torch.Generator().manual_seed(seed))
    images = pixels.to(torch.uint8)
    variation = CropAndFlip(padding)
    ours = variation.apply(images, variation.draw(count, torch.Generator().manual_seed(seed)))
    theirs = cropped_and_flipped(images, torch.Generator().manual_seed(seed), padding)
    assert ours.dtype == torch.uint8
    assert torch.equal(ours, theirs)


def test_crop_and_flip_reach_every_offset_and_flip_half() -> None:
    image = torch.arange(9).reshape(1, 1, 3, 3).to(torch.uint8) + 1
    variation = CropAndFlip(padding=1)
    shifted = variation.apply(image.repeat(4000, 1, 1, 1), variation.draw(4000, torch.Generator().manual_seed(0)))
    seen = {tuple(image.flatten().tolist()) for image in shifted}
    assert len(seen) == 2 * 3 * 3
    assert (shifted[:, 0, 1, 1] != 0).all(), "the centre pixel is never cropped away"


def settings_now() -> tuple[int, bool, bool, list[int]]:
    cudnn = torch.backends.cudnn
    return torch.get_num_threads(), cudnn.deterministic, cudnn.benchmark, torch.get_rng_state().tolist()


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(("deterministic", "benchmark"), [(False, True), (True, False)])
def test_numeric_settings_apply_inside_and_are_restored(
    fails: bool, deterministic: bool, benchmark: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", deterministic)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", benchmark)
    before = settings_now()

    def body() -> None:
        with numeric_settings(NumericsConfig(threads=2)):
            assert settings_now()[:3] == (2, True, False)
            if fails:
                raise KeyError("body")

    raises_if(fails, body)
    assert settings_now() == before


def test_tf32_is_allowed_for_all_products_if_the_config_says_so() -> None:
    def allowed() -> tuple[bool, bool]:
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    before = allowed()
    with numeric_settings(NumericsConfig()):
        assert allowed() == before
    with numeric_settings(NumericsConfig(precision="tf32")):
        assert allowed() == (True, True)
    assert allowed() == before


@pytest.mark.parametrize("fails", [False, True])
def test_seeded_dropout_draws_from_its_seed_and_restores_the_generator(fails: bool) -> None:
    torch.manual_seed(1)
    before = settings_now()
    drawn: list[torch.Tensor] = []

    def body() -> None:
        with seeded_dropout(5, torch.device("cpu")):
            drawn.append(nn.functional.dropout(torch.ones(64), 0.5))
            if fails:
                raise KeyError("body")

    for _ in range(2):
        raises_if(fails, body)
    assert torch.equal(*drawn)
    assert settings_now() == before


def raises_if(fails: bool, body: Callable[[], None]) -> None:
    if fails:
        with pytest.raises(KeyError, match="body"):
            body()
    else:
        body()


def play(config: CellConfig, rounds: int) -> Sequence[float]:
    """The losses of a single client in all scored rounds."""
    federation = Federation(config, INFO, LocalHosts(config, INFO, make_shards(config, INFO)))
    return [federation.play_round(train=index < rounds).clients[0].loss for index in range(rounds + 1)]


def test_a_loss_that_is_not_finite_names_client_round_stage_and_remedy() -> None:
    with pytest.raises(ClientError) as caught:
        play(one_client(learning_rate=1e30), rounds=2)
    error = caught.value
    assert (error.client, error.round_index, error.stage, error.exit_status) == (0, 0, "training", 1)
    assert str(error) == ("client 0, round 0, training: the training loss is nan; lower --learning-rate (now 1e+30)")


def test_weights_that_the_last_step_has_spoiled_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(workspace: Workspace, *_: object, **__: object) -> Steps[torch.Tensor]:
        yield
        with torch.no_grad():
            workspace.model.get_parameter("classifier.6.bias")[0] = torch.inf
        return torch.tensor(2.3)

    monkeypatch.setattr("flexifed.federation.client.train", spoiled)
    with pytest.raises(ClientError) as caught:
        play(one_client(), rounds=1)
    assert str(caught.value) == (
        "client 0, round 0, training: classifier.6.bias is no longer finite after training; "
        "lower --learning-rate (now 0.05)"
    )


def test_a_score_that_is_not_finite_is_an_error() -> None:
    one_step_a_round = one_client(learning_rate=1e30, local_epochs=1, batch_size=50)
    with pytest.raises(ClientError, match=r"client 0, round 1, scoring: .*--learning-rate"):
        play(one_step_a_round, rounds=1)
