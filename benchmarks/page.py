"""The page about speed, from what the benchmarks printed: `python benchmarks/page.py > docs/speed.md`."""

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
"""What `round.py` printed, by processor."""
FLOWER_RUNS = {
    "Xeon (3), AVX512": ("flower-xeon-3", "flower-xeon-3-10"),
    "Xeon (2), AVX512": ("flower-xeon-2-10", "flower-xeon-2-250", "flower-xeon-2"),
    "EPYC, AVX512": ("flower-epyc-2", "flower-epyc"),
}
"""What `flower.py` printed, by processor."""
SIDES = ("flexifed", "defaults", "tutorial", "lean")
Figures = dict[str, Any]

INTRODUCTION = """# Speed

What a round takes, and against what. Every figure on this page was printed by a program in `benchmarks/` and is kept in
[`records/benchmarks`](../records/benchmarks/README.md), with the machine's load while it was measured;
`python benchmarks/page.py` makes the page of them. Figures are medians, with the smallest and the largest in brackets;
what is compared was measured in the same run, in turn. All machines had 2 CPU cores.

**None of them is from a GPU**: what the project does on one (TF32 and bf16, fused optimizer steps, steps recorded as
CUDA graphs, clients that overlap on streams, fractions of a GPU, tensors that processes leave there for each other) is
tested on CPUs, the graphs against a stand-in and the tensors in shared memory, and has been neither seen nor timed.
"""

GPU = """## On a GPU

What there is to try, and to time with `python benchmarks/round.py --device cuda`:

| setting | what it does |
| --- | --- |
| default | each client has a process of its own and an eighth of a GPU; where there is no room, they take turns |
| `--no-cuda-ipc` | processes on one GPU send tensors through the CPU all the same, instead of leaving them there |
| `--streams 8` | eight clients live in one process and overlap on its GPU; what only they share stays there |
| `--cuda-graph` | a training step is recorded once and replayed in one launch |
| `--precision tf32`, `bf16` | products on tensor cores; PyTorch's own default is TF32 for convolutions alone |

How clients share a GPU, `--streams` and `--no-cuda-ipc` are placement: they change no number. `--cuda-graph` and
`--precision` can, and are part of a run's id. A GPU that is too full gives way to fewer streams first, then to fewer
processes (`--retry-out-of-memory`).
"""

ROUND = """## A round, against one client after another

`benchmarks/sequential.py` is a plain loop as the published program has it: images one by one through a DataLoader, one
client after another, models built anew in every round, all cores for each. The same data, models and steps. Ours is

- by default float32, with wide 3x3 convolutions by Winograd's algorithm, forward and backward: fewer multiplications,
  and other rounding ([`training/winograd.py`](../flexifed/training/winograd.py) says by how much). In an experiment
  that changed accuracies as much as another order in memory did ([record](../records/winograd-cifar10-vgg/README.md)).
- `--no-winograd`: PyTorch's own convolutions.
- `--precision bf16`: products in 16 bits, where the processor can: other numbers, weights stay float32.
"""

ROUND_COLUMNS = """`overhead` is the part of a round in which the busiest process neither trains nor scores; training
and scoring are of that process. Memory is the most that any process had. Checkpoints, under 3 % of a run's time, are
left out.
"""

PEAK = """Part of the machine's peak rate that training in float32 reaches, by model. The peak is that of a large
float32 matrix product on all cores in the same run. A convolution counts as its multiply-adds, though a library may
need fewer, and Winograd's algorithm does: so it can be more than all.
"""

FLOWER = """## Against Flower

The same cell in [Flower](https://flower.ai)'s simulation engine: same models, data, shards, seeds, local steps and
scores, FedAvg within each architecture. Models are VGGs of an eighth of the width, so that the engine shows; the fewer
images a client trains on in a round, the more it does. `authors` is the cell that `round.py` plays above: the published
protocol with one local epoch, images varied by crop and flip. In `thin` they are not varied. Flower's side is one of
three programs:

- `defaults`: as Flower's tutorials are written, with its own default of two CPUs a client: here one client at a time.
- `tutorial`: the same with one CPU a client, so as many at a time as flexifed has.
- `lean`: that, and Flower's clients have flexifed's own training functions, so that the engines alone differ. Every
  client's scores are then equal to flexifed's, to the last bit.
"""

AGGREGATE = """## Plan and aggregation, against the number of clients

Thin VGGs in turn, Max-Common. `in pairs` finds the plan's groups by comparing each client with each other.
"""

SCALE = """## Many clients on one machine

Thin VGGs under Max-Common; ten images a client, so that what a client costs beside its training shows. Memory is what
processes share with no other (USS).
"""


def load(name: str) -> Figures:
    """What a benchmark printed."""
    return dict(json.loads((RECORDS / f"{name}.json").read_text()))


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    digits = 0
    while abs(value) < 100 / 10**digits and digits < 6:
        digits += 1
    return f"{value:.{digits}f}" if value else "0"


def median(figures: Figures) -> str:
    """A median, with the smallest and the largest."""
    return f"{number(figures['median'])} ({number(figures['min'])} to {number(figures['max'])})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def commands(*lines: str) -> str:
    """How figures were made; what made several stands there once."""
    told = "\n".join(f"uv run --extra test python benchmarks/{line}" for line in dict.fromkeys(lines))
    return f"```bash\n{told}\n```\n"


def setting_of(cell: Figures) -> str:
    """What `round.py` was told of its numbers; nothing for the default."""
    if cell["precision"]:
        return f"--precision {cell['precision']}"
    return "" if cell.get("winograd") else "--no-winograd"


def in_short() -> str:
    """The figures that most readers come for."""
    by_default = [
        made["ratio"]["median"]
        for names in ROUNDS.values()
        for made in map(load, names)
        if not setting_of(made["cell"])
    ]
    runs = [made for names in FLOWER_RUNS.values() for made in map(load, names)]
    flower = [
        made["ratio"] for made in runs if made["job"].get("profile") == "authors" and not made["job"]["max_train"]
    ]

    def range_of(side: str) -> str:
        medians = [ratio[side]["median"] for ratio in flower]
        return f"{number(min(medians))} to {number(max(medians))}"

    scale = load("scale")
    clients, most = max(scale["clients"].items(), key=lambda one: int(one[0]))
    return "\n".join(
        [
            "In short, by medians:\n",
            "- a round of the published protocol, with one local epoch, is "
            f"{number(min(by_default))} to {number(max(by_default))} times as fast as the plain loop, by processor;",
            f"- with thin models it is {range_of('defaults')} times as fast as Flower as it comes, and "
            f"{range_of('tutorial')} times\n  where Flower is told to train as many clients at a time, by processor;",
            f"- {int(clients):,} clients take {number(most['round_s']['median'])} s a round and "
            f"{number(most['clients_mib'] / 1024)} GiB; the driver's memory is {scale['driver_growth']:+.1%} of that\n"
            "  for the fewest.\n",
        ]
    )


def round_section() -> str:
    """Of `round.py`, on several processors."""
    lines, rows, shares = [], [], []
    for processor, names in ROUNDS.items():
        for made in map(load, names):
            cell = made["cell"]
            setting = setting_of(cell)
            options = f"--local-epochs {cell['local_epochs']} --repeat {made['round_s']['n']} {setting}".rstrip()
            lines.append(f"round.py {options}")
            head = [processor, f"`{setting}`" if setting else "default"]
            figures = ("round_s", "baseline_s", "ratio", "train_s", "eval_s", "overhead")
            largest = max(mib for process, mib in made["peak_memory_mib"].items() if process.startswith("client actor"))
            rows.append([*head, *(median(made[figure]) for figure in figures), number(largest)])
            if not cell["precision"]:
                reached = (f"{share:.1%}" for share in made["share_of_peak"].values())
                shares.append([*head, number(made["peak_rate"] / 1e9), *reached])
    head = ["processor", "ours"]
    seconds = ["a round, s", "the loop, s", "speed-up", "training, s", "scoring, s", "overhead", "memory, MiB"]
    return "\n".join(
        [
            ROUND,
            commands(*lines),
            f"{cell['data']} data; {cell['placement']}.",
            ROUND_COLUMNS,
            table([*head, *seconds], rows),
            PEAK,
            table([*head, "peak, GFLOP/s", *made["share_of_peak"]], shares),
        ]
    )


def images_in_a_round(job: Figures) -> int:
    """That each client trains on. The first jobs that were kept did not name their profile: it was `thin`."""
    told = {"profile": "thin"} | {name: value for name, value in job.items() if name != "data_source"}
    cell = Job(**told)
    partition, num_train = cell.config().partition, cell.info().num_train
    shard = num_train // partition.num_shards
    return min(shard, partition.max_train or shard) // partition.windows_per_shard


def flower_section() -> str:
    """Of `flower.py`: how much an engine matters depends on how much a client trains."""
    rows, lines = [], []
    for processor, names in FLOWER_RUNS.items():
        for made in map(load, names):
            job, repeat = made["job"], made["ratio"]["lean"]["n"]
            if not made["same_numbers"]["equal"]:
                raise ValueError(f"the scores of flexifed and lean differ in {made['same_numbers']}")
            profile = job.get("profile", "thin")
            options = [f"--profile {profile}"] if profile != "authors" else []
            options += [f"--{name.replace('_', '-')} {job[name]}" for name in ("max_train", "max_test") if job[name]]
            played = [side for side in SIDES[1:] if side in made]
            if len(played) < len(SIDES[1:]):
                options += [f"--program {side}" for side in played]
            lines.append(" ".join([f"flower.py --rounds {job['rounds']} --repeat {repeat}", *options]))
            rows.append(
                [
                    processor,
                    profile,
                    f"{images_in_a_round(job):,}",
                    *(median(made[side]["rounds_per_minute"]) if side in made else "" for side in SIDES),
                    *(median(made["ratio"][side]) if side in made else "" for side in SIDES[1:]),
                ]
            )
    head = ["processor", "profile", "images a client", *SIDES, *(f"over {side}" for side in SIDES[1:])]
    told = "Rounds a minute of each, and the speed-up of flexifed over each program of Flower's:\n"
    return "\n".join([FLOWER, commands(*lines), told, table(head, rows)])


def aggregate_section() -> str:
    """Of `aggregate.py`."""
    made = load("aggregate")
    rows = [
        [
            f"{int(clients):,}",
            f"{number(1000 * one['plan_s']['median'])} ms",
            f"{number(1000 * one['pairwise_plan_s']['median'])} ms" if "pairwise_plan_s" in one else "",
            f"{number(one['aggregate_s']['median'])} s",
        ]
        for clients, one in made["clients"].items()
    ]
    powers = made["exponent"]
    return "\n".join(
        [
            AGGREGATE,
            commands("aggregate.py"),
            table(["clients", "plan", "in pairs", "aggregation"], rows),
            "Seconds grow with the number of clients to the power of "
            f"{powers['plan_s']} (plan) and {powers['aggregate_s']} (aggregation).\n",
        ]
    )


def scale_section() -> str:
    """Of `scale.py`."""
    made = load("scale")
    rows = [
        [
            f"{int(clients):,}",
            median(one["round_s"]),
            f"{number(1000 * one['s_per_client']['median'])} ms",
            f"{number(one['mib_per_client'])} MiB",
            f"{number(one['clients_mib'])} MiB",
            f"{number(one['driver_mib'])} MiB",
            f"{number(one['store_mib'])} MiB",
        ]
        for clients, one in made["clients"].items()
    ]
    head = ["clients", "seconds of a round", "a client", "memory a client", "all clients", "driver", "shared memory"]
    return "\n".join(
        [
            SCALE,
            commands("scale.py"),
            table(head, rows),
            f"From the fewest clients to the most, the driver's memory changes by {made['driver_growth']:+.1%}.\n",
        ]
    )


def page() -> str:
    """The whole page."""
    return "\n".join(
        [INTRODUCTION, in_short(), round_section(), flower_section(), aggregate_section(), scale_section(), GPU]
    )


if __name__ == "__main__":
    print(page(), end="")
