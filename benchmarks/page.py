"""Generate the page about speed from the records of the benchmarks: `python benchmarks/page.py > docs/speed.md`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flower_job import Job

RECORDS = Path(__file__).parents[1] / "records" / "benchmarks"
ROUNDS = {
    "Xeon, AVX512": ("round-xeon", "round-xeon-direct", "round-xeon-bf16"),
    "Xeon (2), AVX512": ("round-xeon-2",),
    "Xeon (3), AVX512": ("round-xeon-3",),
    "EPYC, AVX512": ("round-epyc-avx512", "round-epyc-direct", "round-epyc-bf16"),
    "EPYC, AVX2": ("round-epyc-avx2", "round-epyc-avx2-direct"),
}
"""Records of `round.py`, by processor."""
FLOWER_RUNS = {
    "Xeon (3), AVX512": ("flower-xeon-3", "flower-xeon-3-10"),
    "Xeon (2), AVX512": ("flower-xeon-2-10", "flower-xeon-2-250", "flower-xeon-2"),
    "EPYC, AVX512": ("flower-epyc-2", "flower-epyc"),
}
"""Records of `flower.py`, by processor."""
SIDES = ("flexifed", "defaults", "tutorial", "lean")
Figures = dict[str, Any]

INTRODUCTION = """# Speed

How long a round takes, compared with a plain loop and with Flower. Every figure on this page was printed by a program
in `benchmarks/` and is kept in [`records/benchmarks`](../records/benchmarks/README.md), with the load of the machine at
the time; `python benchmarks/page.py` generates the page from these records. Figures are medians, with the minimum and
the maximum in brackets. Figures that are compared were measured in the same run, in turn. All machines had 2 CPU cores.

**No figure is from a GPU.** What the project does on GPUs (TF32 and bf16, fused optimizer steps, training steps
recorded as CUDA graphs, clients that overlap on streams, fractions of a GPU, tensors that processes leave on the GPU
for each other) is tested on CPUs only, the graphs with a stand-in and the tensors in shared memory. It has never been
run or timed on a GPU.
"""

GPU = """## On a GPU

Settings to try, and to time with `python benchmarks/round.py --device cuda`:

| setting | effect |
| --- | --- |
| default | each client has a process of its own and an eighth of a GPU; if they don't all fit, they take turns |
| `--no-cuda-ipc` | processes on one GPU exchange tensors through the CPU instead of leaving them on the GPU |
| `--streams 8` | eight clients run in one process and overlap on its GPU; layers that only they share stay there |
| `--cuda-graph` | a training step is recorded once and replayed with one launch |
| `--precision tf32`, `bf16` | matrix products on tensor cores; by default, PyTorch uses TF32 for convolutions only |

The number of clients that share a GPU, `--streams` and `--no-cuda-ipc` are placement: they change no result.
`--cuda-graph` and `--precision` can change results, and are part of a run's id. If a GPU runs out of memory, flexifed
first reduces the number of streams, then the number of processes (`--retry-out-of-memory`).
"""

ROUND = """## A round, compared with a sequential loop

`benchmarks/sequential.py` is a plain loop like that of the published program: one client after another, images one by
one through a DataLoader, models built from scratch in every round, all cores for each client. Data, models and steps
are the same. The settings of flexifed are:

- default: float32, with wide 3x3 convolutions by Winograd's algorithm, forward and backward. It needs fewer
  multiplications and rounds differently; [`training/winograd.py`](../flexifed/training/winograd.py) says by how much.
  In an experiment, this changed accuracies as much as another memory format did
  ([record](../records/winograd-cifar10-vgg/README.md)).
- `--no-winograd`: PyTorch's own convolutions.
- `--precision bf16`: products in 16 bits, on processors that support them. Results differ; weights stay float32.
"""

ROUND_COLUMNS = """`overhead` is the share of a round in which the busiest process neither trains nor scores; the
seconds of training and scoring are those of that process. Memory is the peak of the largest client actor. Checkpoints,
which take less than 3 % of a run, are left out.
"""

PEAK = """Share of the machine's peak rate that training in float32 reaches, by model. The peak rate is that of a large
float32 matrix product on all cores, measured in the same run. A convolution counts as all its multiply-adds; a library
may need fewer, as Winograd's algorithm does, so the share can exceed 100 %.
"""

FLOWER = """## Compared with Flower

The same job in [Flower](https://flower.ai)'s simulation engine: same models, data, shards, seeds, local steps and
scores, and FedAvg within each architecture. The models are VGGs of an eighth of the width, so that the cost of the
engine is visible; the fewer images a client trains on in a round, the more the engine matters. `authors` is the cell
that `round.py` plays above, except for the width and the scheme: the published protocol with one local epoch, with
images augmented by crop and flip. `thin` has no augmentation. Flower's side is one of three programs:

- `defaults`: written like Flower's tutorials, with its own default of two CPUs a client: here one client at a time.
- `tutorial`: the same with one CPU a client, so that as many clients run at a time as in flexifed.
- `lean`: like `tutorial`, but its clients use flexifed's own training functions, so that the two sides differ in the
  engine alone. Every client's scores are then equal to flexifed's, bit for bit.
"""

AGGREGATE = """## Plan and aggregation, by number of clients

Clients have the four thin VGGs in turn, under Max-Common. `pairwise` finds the groups of the plan by comparing every
client with every other.
"""

SCALE = """## Many clients on one machine

Thin VGGs under Max-Common. A client has ten images, so that what it costs beyond its training is visible. Memory is the
memory that processes share with no other process (USS).
"""


def load(name: str) -> Figures:
    """Load the record of a benchmark: the JSON that it printed."""
    return dict(json.loads((RECORDS / f"{name}.json").read_text()))


def number(value: float) -> str:
    """Format a number with three significant digits and no exponent."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    digits = 0
    while abs(value) < 100 / 10**digits and digits < 6:
        digits += 1
    return f"{value:.{digits}f}" if value else "0"


def median(figures: Figures) -> str:
    """Format a median, with the minimum and the maximum in brackets."""
    return f"{number(figures['median'])} ({number(figures['min'])} to {number(figures['max'])})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def commands(*lines: str) -> str:
    """Format the commands that printed the figures, without duplicates, as a code block."""
    code = "\n".join(f"uv run --extra test python benchmarks/{line}" for line in dict.fromkeys(lines))
    return f"```bash\n{code}\n```\n"


def setting_of(cell: Figures) -> str:
    """The options of `round.py` that change numbers; empty for the default."""
    if cell["precision"]:
        return f"--precision {cell['precision']}"
    if not cell.get("channels_last", True):
        return "--no-channels-last"
    return "" if cell.get("winograd") else "--no-winograd"


def summary_section() -> str:
    """The main figures, in short."""
    by_default = [
        record["ratio"]["median"]
        for names in ROUNDS.values()
        for record in map(load, names)
        if not setting_of(record["cell"])
    ]
    records = [record for names in FLOWER_RUNS.values() for record in map(load, names)]
    flower = [
        record["ratio"]
        for record in records
        if record["job"].get("profile") == "authors" and not record["job"]["max_train"]
    ]

    def range_of(side: str) -> str:
        medians = [ratio[side]["median"] for ratio in flower]
        return f"{number(min(medians))} to {number(max(medians))}"

    scale = load("scale")
    clients, most = max(scale["clients"].items(), key=lambda size: int(size[0]))
    return "\n".join(
        [
            "In short, by medians:\n",
            "- a round of the published protocol, with one local epoch, is "
            f"{number(min(by_default))} to {number(max(by_default))} times as fast as the plain loop, by processor;",
            f"- with thin models it is {range_of('defaults')} times as fast as Flower with its defaults, and "
            f"{range_of('tutorial')} times\n  as fast as Flower with as many clients at a time, by processor;",
            f"- {int(clients):,} clients take {number(most['round_s']['median'])} s a round and "
            f"{number(most['clients_mib'] / 1024)} GiB of memory; the driver's memory changes by\n"
            f"  {scale['driver_growth']:+.1%} compared with {min(map(int, scale['clients']))} clients.\n",
        ]
    )


def round_section() -> str:
    """The figures of `round.py`, on several processors."""
    lines, rows, shares = [], [], []
    for processor, names in ROUNDS.items():
        for record in map(load, names):
            cell = record["cell"]
            setting = setting_of(cell)
            options = f"--local-epochs {cell['local_epochs']} --repeat {record['round_s']['n']} {setting}".rstrip()
            lines.append(f"round.py {options}")
            head = [processor, f"`{setting}`" if setting else "default"]
            figures = ("round_s", "baseline_s", "ratio", "train_s", "eval_s", "overhead")
            largest = max(
                mib for process, mib in record["peak_memory_mib"].items() if process.startswith("client actor")
            )
            rows.append([*head, *(median(record[figure]) for figure in figures), number(largest)])
            if not cell["precision"]:
                reached = (f"{share:.1%}" for share in record["share_of_peak"].values())
                shares.append([*head, number(record["peak_rate"] / 1e9), *reached])
    head = ["processor", "setting"]
    seconds = ["flexifed, s", "loop, s", "speed-up", "training, s", "scoring, s", "overhead", "memory, MiB"]
    return "\n".join(
        [
            ROUND,
            commands(*lines),
            f"{cell['data']} data; {cell['placement']}.",
            ROUND_COLUMNS,
            table([*head, *seconds], rows),
            PEAK,
            table([*head, "peak, GFLOP/s", *record["share_of_peak"]], shares),
        ]
    )


def images_in_a_round(job: Figures) -> int:
    """The number of images that a client trains on in a round. The first records name no profile: theirs is `thin`."""
    settings = {"profile": "thin"} | {name: value for name, value in job.items() if name != "data_source"}
    cell = Job(**settings)
    partition, num_train = cell.config().partition, cell.info().num_train
    shard = num_train // partition.num_shards
    return min(shard, partition.max_train or shard) // partition.windows_per_shard


def flower_section() -> str:
    """The figures of `flower.py`, for several numbers of images a client."""
    rows, lines = [], []
    for processor, names in FLOWER_RUNS.items():
        for record in map(load, names):
            job, repeat = record["job"], record["ratio"]["lean"]["n"]
            if not record["same_numbers"]["equal"]:
                raise ValueError(f"the scores of flexifed and lean differ: {record['same_numbers']}")
            profile = job.get("profile", "thin")
            options = [f"--profile {profile}"] if profile != "authors" else []
            options += [f"--{name.replace('_', '-')} {job[name]}" for name in ("max_train", "max_test") if job[name]]
            played = [side for side in SIDES[1:] if side in record]
            if len(played) < len(SIDES[1:]):
                options += [f"--program {side}" for side in played]
            lines.append(" ".join([f"flower.py --rounds {job['rounds']} --repeat {repeat}", *options]))
            rows.append(
                [
                    processor,
                    profile,
                    f"{images_in_a_round(job):,}",
                    *(median(record[side]["rounds_per_minute"]) if side in record else "" for side in SIDES),
                    *(median(record["ratio"][side]) if side in record else "" for side in SIDES[1:]),
                ]
            )
    head = ["processor", "profile", "images per client", *SIDES, *(f"vs {side}" for side in SIDES[1:])]
    caption = "Rounds per minute, and the speed-up of flexifed over each program of Flower:\n"
    return "\n".join([FLOWER, commands(*lines), caption, table(head, rows)])


def aggregate_section() -> str:
    """The figures of `aggregate.py`."""
    record = load("aggregate")
    rows = [
        [
            f"{int(clients):,}",
            f"{number(1000 * size['plan_s']['median'])} ms",
            f"{number(1000 * size['pairwise_plan_s']['median'])} ms" if "pairwise_plan_s" in size else "",
            f"{number(size['aggregate_s']['median'])} s",
        ]
        for clients, size in record["clients"].items()
    ]
    exponents = record["exponent"]
    return "\n".join(
        [
            AGGREGATE,
            commands("aggregate.py"),
            table(["clients", "plan", "pairwise", "aggregation"], rows),
            "Seconds grow with the number of clients to the power of "
            f"{exponents['plan_s']} (plan) and {exponents['aggregate_s']} (aggregation).\n",
        ]
    )


def scale_section() -> str:
    """The figures of `scale.py`."""
    record = load("scale")
    rows = [
        [
            f"{int(clients):,}",
            median(size["round_s"]),
            f"{number(1000 * size['s_per_client']['median'])} ms",
            f"{number(size['mib_per_client'])} MiB",
            f"{number(size['clients_mib'])} MiB",
            f"{number(size['driver_mib'])} MiB",
            f"{number(size['store_mib'])} MiB",
        ]
        for clients, size in record["clients"].items()
    ]
    head = ["clients", "round, s", "per client", "memory per client", "all clients", "driver", "shared memory"]
    return "\n".join(
        [
            SCALE,
            commands("scale.py"),
            table(head, rows),
            f"From the fewest clients to the most, the driver's memory changes by {record['driver_growth']:+.1%}.\n",
        ]
    )


def page() -> str:
    """Generate the whole page."""
    return "\n".join(
        [INTRODUCTION, summary_section(), round_section(), flower_section(), aggregate_section(), scale_section(), GPU]
    )


if __name__ == "__main__":
    print(page(), end="")
