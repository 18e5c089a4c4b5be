"""The configuration of a cell, as frozen dataclasses that check their values on creation.

`CellConfig` is what decides a cell's numbers. Where a cell runs (`PlacementOptions`), where its files are and how many
rounds it takes are not part of it, since none of that may change a number. This module imports neither torch nor Ray,
so that a command line can be parsed, or refused, at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, Literal, cast, get_args

from flexifed.checks import check_bool, check_integer, check_literal, check_number
from flexifed.errors import ConfigError

DatasetName = Literal["cifar10", "cinic10", "agnews", "speech_commands", "speech_commands_12"]
FamilyName = Literal["vgg", "vgg_plain", "resnet", "charcnn", "vdcnn"]
VersionName = Literal["v1", "v2", "v3", "v4"]
SchemeName = Literal["standalone", "clustered_fl", "basic_common", "clustered_common", "max_common"]
InputKind = Literal["image", "text"]
Device = Literal["cpu", "cuda"]
Weighting = Literal["uniform", "samples"]
BatchNormBuffers = Literal["average", "local"]
ClassifierSharing = Literal["prefix", "never", "always"]
Precision = Literal["tf32", "bf16"]

WIDEST = 64.0
SMALLEST_ALPHA, LARGEST_ALPHA = 1e-3, 1e6  # beyond them, shards of one class, and i.i.d. shards
_MOST_THREADS = 1024
_LARGEST_INT32 = 2**31 - 1

DATASETS: tuple[str, ...] = get_args(DatasetName)
SCHEMES: tuple[str, ...] = get_args(SchemeName)
VERSIONS: tuple[VersionName, ...] = get_args(VersionName)
"""The four depths of a family's models, from the shallowest to the deepest."""
FAMILIES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "vgg": ("vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn"),
        "vgg_plain": ("vgg11", "vgg13", "vgg16", "vgg19"),
        "resnet": ("resnet20", "resnet32", "resnet44", "resnet56"),
        "charcnn": ("charcnn3", "charcnn4", "charcnn5", "charcnn6"),
        "vdcnn": ("vdcnn9", "vdcnn17", "vdcnn29", "vdcnn49"),
    }
)
"""The model names of each family's versions, V1 first."""
assert all(len(models) == len(VERSIONS) for models in FAMILIES.values())
FAMILY_INPUTS: Mapping[str, InputKind] = MappingProxyType(
    {"vgg": "image", "vgg_plain": "image", "resnet": "image", "charcnn": "text", "vdcnn": "text"}
)
"""The inputs of each family's models: images, float (batch, channels, height, width), or texts as character indices,
int64 (batch, length)."""
DATASET_INPUTS: Mapping[str, InputKind] = MappingProxyType(
    {
        "cifar10": "image",
        "cinic10": "image",
        "agnews": "text",
        "speech_commands": "image",
        "speech_commands_12": "image",
    }
)
"""The kind of a data set's samples when they reach a model. A spoken word is a spectrogram, an image of one channel."""
TEXT_LENGTHS: Mapping[str, int] = MappingProxyType({"charcnn": 1014, "vdcnn": 1024})
"""Characters of an input, for each family that takes texts (Zhang et al. 2015; Conneau et al. 2017)."""


@dataclass(frozen=True)
class CellName:
    """A cell of a grid: `dataset/family/scheme`."""

    dataset: DatasetName
    family: FamilyName
    scheme: SchemeName

    def __str__(self) -> str:
        return f"{self.dataset}/{self.family}/{self.scheme}"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The clients' models."""

    width: float = 1.0
    """Factor on the number of channels of every layer. Depth, and so the layers in common, does not change."""
    init: Literal["own", "shared"] = "own"
    """`own`: each client draws its own weights, as the authors do. `shared`: common layers start with equal weights."""
    versions: tuple[VersionName, ...] | None = None
    """Versions of the clients' models, such as `v1 v4`; clients have them in turn. Default: all four."""

    def __post_init__(self) -> None:
        check_number(self, "width", above=0, below=WIDEST)
        check_literal(self, "init", ("own", "shared"))
        if self.versions is not None:
            _check_versions(self)

    def version_of(self, client: int) -> int:
        """The version of a client, from 0: clients have the versions in turn, from the shallowest to the deepest."""
        versions = self.versions or VERSIONS
        return VERSIONS.index(versions[client % len(versions)])

    def check_clients(self, num_clients: int) -> None:
        """Check that there is a client for each version that was chosen.

        Raises:
            ConfigError: there are too few.
        """
        if self.versions and len(self.versions) > num_clients:
            raise ConfigError(
                f"versions is {' '.join(self.versions)}, but there are only {num_clients} clients, one version each; "
                f"choose at most {num_clients} versions, or ask for more clients"
            )


@dataclass(frozen=True, kw_only=True)
class PartitionConfig:
    """How the data are divided among the clients."""

    num_clients: int = 8
    """Number of clients; they have the versions in turn: with all four, client k has version k modulo 4."""
    num_shards: int = 20
    """Number of equal shards into which training and test set are each split; a client gets one of each."""
    windows_per_shard: int = 10
    """Number of parts into which a training shard is split; a client trains on one part in each round, in turn."""
    dirichlet_alpha: float | None = None
    """Skew labels: a client's class proportions come from a Dirichlet distribution with this parameter per class.
    The smaller it is, the more skewed. Default: i.i.d. shards."""
    max_train: int | None = None
    """Maximum number of training samples that a client uses of its shard. Default: all."""
    max_test: int | None = None
    """Maximum number of test samples of its shard on which a client is scored. Default: all."""

    def __post_init__(self) -> None:
        for name in ("max_train", "max_test"):
            if getattr(self, name) is not None:
                check_integer(self, name, 1)
        check_integer(self, "num_clients", 1)
        check_integer(self, "num_shards", 1)
        check_integer(self, "windows_per_shard", 1)
        if self.dirichlet_alpha is not None:
            check_number(self, "dirichlet_alpha", minimum=SMALLEST_ALPHA, below=LARGEST_ALPHA)
        if self.num_shards < self.num_clients:
            raise ConfigError(
                f"num_shards is {self.num_shards}, fewer than the {self.num_clients} clients that need one each; "
                f"ask for at least {self.num_clients} shards or for fewer clients"
            )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a client trains and is scored in a round. Every round starts with a fresh SGD optimizer."""

    local_epochs: int = 10
    """Number of passes over the current part of the shard in each round."""
    batch_size: int = 64
    """Number of samples in a training step; the last batch of an epoch may be smaller."""
    learning_rate: float = 0.01
    """Step size of SGD."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 5e-4
    """Weight decay of SGD, applied to all parameters."""
    augment: bool = True
    """Augment training images (crop, flip) and spoken words (time shift, background noise). Texts stay as they are."""
    scoring: Literal["eval", "train"] = "eval"
    """Mode in which a model is scored. `train` is that of the authors' program: with dropout and batch statistics."""
    eval_batch_size: int = 500
    """Number of samples in a batch when scoring; with `scoring=train` it changes the scores."""

    def __post_init__(self) -> None:
        check_integer(self, "local_epochs", 1)
        check_integer(self, "batch_size", 1)
        check_integer(self, "eval_batch_size", 1)
        check_number(self, "learning_rate", above=0)
        check_number(self, "momentum", minimum=0, below=1)
        check_number(self, "weight_decay", minimum=0)
        check_bool(self, "augment")
        check_literal(self, "scoring", ("eval", "train"))


@dataclass(frozen=True, kw_only=True)
class SharingConfig:
    """Options that apply to every scheme."""

    weighting: Weighting = "uniform"
    """`uniform` weights all clients alike, as the authors do; `samples` by their number of training samples. Shards
    here have equal size, so only rounding differs; it matters for your own clients (`flexifed.aggregate`)."""
    batch_norm_buffers: BatchNormBuffers = "average"
    """Whether running statistics are averaged like weights, as the authors do, or stay with the client (`local`)."""
    classifier: ClassifierSharing = "prefix"
    """Whether classifier layers are shared where the common prefix reaches them, never, or always (across versions)."""
    clients_per_round: int | None = None
    """Number of clients that take part in a round, drawn anew for each; all are scored. Default: all clients."""
    reduce_block: int = 1
    """Number of consecutive clients that are summed in their own process before the driver adds up the blocks."""

    def __post_init__(self) -> None:
        check_literal(self, "weighting", get_args(Weighting))
        check_literal(self, "batch_norm_buffers", get_args(BatchNormBuffers))
        check_literal(self, "classifier", get_args(ClassifierSharing))
        if self.clients_per_round is not None:
            check_integer(self, "clients_per_round", 1)
        check_integer(self, "reduce_block", 1)


@dataclass(frozen=True, kw_only=True)
class NumericsConfig:
    """Settings that can change the last bits of a result, and with them everything that follows."""

    threads: int = 1
    """Number of CPU threads of a client."""
    channels_last: bool = True
    """Store images and convolution weights with channels last in memory."""
    fused: bool | None = None
    """Fuse optimizer steps into one pass through memory. Default: on GPUs only, since CPUs then round differently."""
    cuda_graph: bool = False
    """On GPUs, record a training step once and replay it with one launch instead of hundreds."""
    precision: Precision | None = None
    """Precision of products: `tf32` (GPUs) or `bf16` (autocast). Default: PyTorch's; on GPUs TF32 for convolutions."""
    winograd: bool = True
    """On CPUs in float32, use Winograd's algorithm for 3x3 convolutions of 128 channels or more, not PyTorch's own."""

    def __post_init__(self) -> None:
        check_integer(self, "threads", 1, _MOST_THREADS)
        check_bool(self, "channels_last")
        check_bool(self, "winograd")
        check_bool(self, "cuda_graph")
        if self.fused is not None:
            check_bool(self, "fused")
        if self.precision is not None:
            check_literal(self, "precision", get_args(Precision))

    def uses_winograd(self, device: str) -> bool:
        """Whether wide convolutions on this type of device use Winograd's algorithm."""
        return self.winograd and device == "cpu" and self.precision is None


@dataclass(frozen=True, kw_only=True)
class PlacementOptions:
    """Where clients run. These options change no result."""

    gpus_per_client: float | None = None
    """Fraction of a GPU for each client that computes on one. Default: 0.125, or less where clients take turns."""
    clients_per_actor: int | None = None
    """Number of clients in one process. Default: on CPUs, as many as give each CPU one process.
    On GPUs, one for each of --streams, or more if they don't fit otherwise and --gpus-per-client is not given."""
    streams: int = 1
    """On a GPU, number of clients of one process that compute at the same time, each on its own CUDA stream."""
    cuda_ipc: bool = True
    """Let processes on one GPU leave tensors there for each other (CUDA IPC), where that works."""

    def __post_init__(self) -> None:
        if self.gpus_per_client is not None:
            check_number(self, "gpus_per_client", minimum=0)
        if self.clients_per_actor is not None:
            check_integer(self, "clients_per_actor", 1, _LARGEST_INT32)
        check_integer(self, "streams", 1, _LARGEST_INT32)
        check_bool(self, "cuda_ipc")


@dataclass(frozen=True, kw_only=True)
class CellConfig:
    """A data set, a family and a scheme under one seed: everything that decides a cell's numbers but the data."""

    dataset: DatasetName
    family: FamilyName
    scheme: SchemeName
    seed: int = 0
    device: Device = "cpu"
    model: ModelConfig = field(default_factory=ModelConfig)
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sharing: SharingConfig = field(default_factory=SharingConfig)
    numerics: NumericsConfig = field(default_factory=NumericsConfig)

    def __post_init__(self) -> None:
        for name, group in self._groups().items():
            if not isinstance(getattr(self, name), group):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; give a {group.__name__}")
        check_literal(self, "dataset", DATASETS)
        check_literal(self, "family", FAMILIES)
        check_literal(self, "scheme", SCHEMES)
        if (samples := DATASET_INPUTS[self.dataset]) != FAMILY_INPUTS[self.family]:
            fitting = (family for family, kind in FAMILY_INPUTS.items() if kind == samples)
            raise ConfigError(
                f"family {self.family} takes {FAMILY_INPUTS[self.family]}s, but {self.dataset} holds {samples}s; "
                f"choose one of: {', '.join(fitting)}"
            )
        check_literal(self, "device", get_args(Device))
        check_integer(self, "seed", 0)
        num_clients, participants = self.partition.num_clients, self.sharing.clients_per_round
        if participants is not None and participants > num_clients:
            raise ConfigError(
                f"clients_per_round is {participants}, but there are only {num_clients} clients; ask for at most "
                f"{num_clients}, or for more clients"
            )
        self.model.check_clients(num_clients)
        if participants == num_clients:  # so that this gives the same config as the default
            object.__setattr__(self, "sharing", replace(self.sharing, clients_per_round=None))
        if self.numerics.precision == "tf32" and self.device == "cpu":
            raise ConfigError(
                "precision is 'tf32', which CPUs do not have; leave it out, or choose bf16 or --device cuda"
            )
        if self.numerics.cuda_graph and self.device == "cpu":
            raise ConfigError("cuda_graph is True, which CPUs do not have; leave it out, or choose --device cuda")

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> CellConfig:
        """The config that `dataclasses.asdict` turned into `settings`; settings that are missing have their defaults.

        Raises:
            ConfigError: a setting that does not exist here, or an invalid value.
        """
        groups = cls._groups()
        try:
            settings = dict(**settings)
            return cls(**{name: groups[name](**value) if name in groups else value for name, value in settings.items()})
        except TypeError as error:
            raise ConfigError(f"not the settings of a cell: {error}; use the version that wrote them") from error

    @classmethod
    def _groups(cls) -> dict[str, type]:
        """The classes of the settings that are groups of settings, by name."""
        return {
            part.name: cast(type, part.default_factory) for part in fields(cls) if part.default_factory is not MISSING
        }

    @property
    def client_versions(self) -> tuple[int, ...]:
        """The version of each client, from 0; see `ModelConfig.version_of`."""
        return tuple(map(self.model.version_of, range(self.partition.num_clients)))

    @property
    def model_names(self) -> tuple[str, ...]:
        """The names of the models that clients have, in the order of their first clients."""
        return tuple(dict.fromkeys(map(self.model_name, range(self.partition.num_clients))))

    def model_name(self, client: int) -> str:
        """The model name of a client."""
        return FAMILIES[self.family][self.model.version_of(client)]

    def version(self, client: int) -> VersionName:
        """The version of a client: `v1` to `v4`."""
        return VERSIONS[self.model.version_of(client)]

    def run_id(self, data_fingerprint: str) -> str:
        """Identify a run by sixteen hexadecimal digits, derived from all that decides its numbers: config and data.

        Settings that are None are left out, so that runs keep their id when such a setting is added. So are recorded
        steps and Winograd's algorithm where they are not used.

        Args:
            data_fingerprint: source and checksum of the data set.

        >>> config = CellConfig(dataset="cifar10", family="vgg", scheme="standalone")
        >>> config.run_id("real") == CellConfig(dataset="cifar10", family="vgg", scheme="standalone").run_id("real")
        True
        """
        config: dict[str, Any] = asdict(self, dict_factory=_without_none)
        if not self.numerics.uses_winograd(self.device):
            del config["numerics"]["winograd"]
        if not self.numerics.cuda_graph:
            del config["numerics"]["cuda_graph"]
        content = json.dumps({"config": config, "data": data_fingerprint}, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def _without_none(items: list[tuple[str, object]]) -> dict[str, object]:
    return {name: value for name, value in items if value is not None}


def _check_versions(config: ModelConfig) -> None:
    """Check the versions, and store the choice of all four as None, so that it gives the same config."""
    chosen = config.versions
    if (
        not isinstance(chosen, tuple | list)
        or list(chosen) != [name for name in VERSIONS if name in chosen]
        or not chosen
    ):
        raise ConfigError(
            f"versions is {chosen!r}; give at least one of {', '.join(VERSIONS)}, each once and in this order"
        )
    object.__setattr__(config, "versions", None if len(chosen) == len(VERSIONS) else tuple(chosen))
