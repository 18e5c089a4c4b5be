"""The benchmarks of speed, at sizes so small that only the scripts themselves are tested."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.autograd import DeviceType

from flexifed import aggregate, build_model, sharing_plan
from flexifed.config import FAMILIES, CellConfig, ModelConfig, PartitionConfig, TrainingConfig
from flexifed.core.signature import signature
from flexifed.data import find_dataset
from flexifed.federation.client import ClientRound
from flexifed.federation.rounds import RoundResult
from flexifed.models.cost import model_multiply_adds

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def aggregate_benchmark() -> Iterator[Any]:
    """benchmarks/aggregate.py as a module, with its folder on the path for the modules that it imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        import aggregate

        yield aggregate


@pytest.fixture(scope="module")
def round_benchmark() -> Iterator[Any]:
    """benchmarks/round.py as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        import round

        yield round  # with its folder still on the path, as processes that a test starts import it too


@pytest.fixture(scope="module")
def profiled(round_benchmark: Any) -> Any:
    """benchmarks/profiled.py as a module."""
    return sys.modules["profiled"]


def run(script: str, *arguments: str, status: int = 0) -> dict[str, Any]:
    """Run a benchmark; returns the JSON that it prints."""
    command = [sys.executable, str(FOLDER / script), *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == status, finished.stderr
    return json.loads(finished.stdout)


LAYERS = [nn.Conv1d(2, 2, 1), nn.Conv1d(2, 2, 3), nn.Linear(2, 2)]
MODELS = st.lists(st.sampled_from(LAYERS), min_size=1, max_size=4)


@given(st.lists(MODELS, min_size=1, max_size=8))
def test_pairwise_matching_finds_the_groups_of_the_plan(
    aggregate_benchmark: Any, models: list[list[nn.Module]]
) -> None:
    signatures = [signature(nn.Sequential(*map(copy.deepcopy, model))) for model in models]
    plan = sharing_plan(signatures, "max_common")
    assert aggregate_benchmark.pairwise_groups(signatures) == {
        (layer, frozenset(plan.members(plan.groups[group])))
        for groups in plan.group_of
        for layer, group in enumerate(groups)
        if group is not None
    }


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_law_is_its_power(aggregate_benchmark: Any, power: float) -> None:
    counts = [8, 100, 5000]
    assert aggregate_benchmark.exponent(counts, [3.0 * count**power for count in counts]) == pytest.approx(power)


def test_overlapping_work_counts_once(round_benchmark: Any) -> None:
    def client(index: int, started: float, train_s: float, eval_s: float) -> ClientRound:
        return ClientRound(
            client=index,
            accuracy=0.5,
            loss=1.0,
            train_loss=1.0,
            bytes_down=0,
            eval_s=eval_s,
            train_s=train_s,
            train_started=started,
        )

    clients = (client(0, 0.0, 1.0, 0.5), client(1, 0.0, 3.0, 0.25), client(2, 1.5, 2.0, 0.5))
    result = RoundResult(0, clients, host_of=(0, 1, 0), round_s=4.0, aggregate_s=0.0)
    work = sys.modules["busy"].Work
    assert round_benchmark.work_of(result) == {0: work(3.0, 1.0, 4.0), 1: work(3.0, 0.25, 3.25)}
    overlapping = replace(result, clients=(clients[0], clients[1], client(2, 0.25, 2.0, 0.5)))
    assert round_benchmark.work_of(overlapping)[0] == work(2.25, 0.75, 2.75)


def test_the_share_of_the_peak_is_relative_to_the_time_in_which_any_client_trains(round_benchmark: Any) -> None:
    """Two clients of one process overlap for their whole 2 s; a client of another process takes 1 s."""
    config = CellConfig(
        dataset="cifar10",
        family="vgg",
        scheme="standalone",
        model=ModelConfig(width=0.1),
        training=TrainingConfig(local_epochs=3),
    )
    clients = tuple(
        ClientRound(
            client=index,
            accuracy=0.5,
            loss=1.0,
            train_loss=1.0,
            bytes_down=0,
            eval_s=0.1,
            train_s=seconds,
            train_started=0.0,
        )
        for index, seconds in ((0, 2.0), (1, 2.0), (2, 1.0))
    )
    result = RoundResult(0, clients, host_of=(0, 0, 1), round_s=2.5, aggregate_s=0.0)
    flops = [3 * 6 * model_multiply_adds(config.model_name(index), num_classes=10, width=0.1) for index in range(3)]
    shares = round_benchmark.share_of_peak(config, 10, [10, 10, 10], [result, result], rate=1e9, sharing=3)
    assert shares["all"] == pytest.approx(10 * ((flops[0] + flops[1]) / 2 + flops[2]) / 1e9, abs=1e-3)
    assert shares["vgg16_bn"] == pytest.approx(10 * flops[2] * 3 / 1e9, abs=1e-3)
    overlapping = round_benchmark.share_of_peak(config, 10, [10, 10, 10], [result], rate=1e9, sharing=None)
    assert overlapping == {"all": shares["all"]}


def test_the_peak_is_the_fastest_product_on_the_given_cores(
    round_benchmark: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, threads, seconds = [0.0], [], iter([4.0, 0.5, 3.0])

    def product(left: torch.Tensor, _: torch.Tensor) -> None:
        assert left.shape == (4096, 4096)
        threads.append(torch.get_num_threads())
        clock[0] += next(seconds)

    before = torch.get_num_threads()
    monkeypatch.setattr(sys.modules["peak"].torch, "mm", product)
    monkeypatch.setattr(sys.modules["peak"].time, "perf_counter", lambda: clock[0])
    rate = round_benchmark.peak_rate(torch.device("cpu"), before + 1, repeat=3)
    assert rate == 2 * 4096**3 / 0.5
    assert threads == [before + 1] * 3
    assert torch.get_num_threads() == before


def test_only_operations_of_the_device_within_the_period_make_it_busy(
    round_benchmark: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The profiler also reports operations of the CPU, and operations that reach beyond the period."""
    spans = (
        (DeviceType.CPU, 1_000, 2_000),
        (DeviceType.CUDA, 500, 900),
        (DeviceType.CUDA, 900, 1_200),
        (DeviceType.CUDA, 1_100, 1_400),
        (DeviceType.CUDA, 1_900, 2_500),
    )
    events = [
        SimpleNamespace(device_type=lambda kind=kind: kind, start_ns=lambda at=start: at, end_ns=lambda at=end: at)
        for kind, start, end in spans
    ]
    results = SimpleNamespace(events=lambda: events)
    busy, clock, ones = sys.modules["busy"], iter([1_000, 2_000]), torch.ones

    class Profiler(nullcontext[None]):
        profiler = SimpleNamespace(kineto_results=results)

    monkeypatch.setattr(busy, "profile", lambda **_: Profiler())
    monkeypatch.setattr(busy.time, "time_ns", lambda: next(clock))
    monkeypatch.setattr(torch, "ones", lambda *size, device: ones(*size))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    assert busy.device_use(torch.device("cuda"), lambda: None) == busy.DeviceUse(
        share=0.5, operations=3, seen_until=1.0
    )


def test_a_profiler_that_sees_nothing_is_an_error_and_not_an_idle_device(profiled: Any) -> None:
    with pytest.raises(RuntimeError, match="saw nothing on cpu"):
        profiled.device_use(torch.device("cpu"), lambda: None)


def fails() -> dict[str, object]:
    raise torch.OutOfMemoryError("CUDA out of memory")


def dies() -> dict[str, object]:
    os._exit(7)


def hangs() -> dict[str, object]:
    threading.Event().wait()
    return {}


@pytest.mark.parametrize(
    ("function", "timeout_s", "error"),
    [
        (fails, 100.0, "CUDA out of memory"),
        (dies, 100.0, "the process ended with status 7"),
        (hangs, 0.1, "no answer within 0.1 s"),
    ],
)
def test_a_failure_after_minutes_of_measuring_does_not_lose_the_measurements(
    profiled: Any, function: Callable[[], dict[str, object]], timeout_s: float, error: str
) -> None:
    assert profiled.in_new_process(function, timeout_s=timeout_s) == {"error": error}
    assert not multiprocessing.active_children()


def test_a_new_process_returns_the_result_of_its_function(profiled: Any) -> None:
    assert profiled.in_new_process(dict, [("a", 1)], timeout_s=100.0) == {"a": 1}


@pytest.mark.parametrize(("operations", "is_error"), [(50 * 16 - 1, True), (50 * 16, False)])
def test_a_profiler_that_misses_operations_gives_no_share(
    profiled: Any, monkeypatch: pytest.MonkeyPatch, operations: int, is_error: bool
) -> None:
    """Two clients train for two epochs on 25 samples in batches of 8."""
    config = CellConfig(
        dataset="cifar10",
        family="vgg",
        scheme="standalone",
        model=ModelConfig(width=0.03),
        partition=PartitionConfig(num_clients=2, num_shards=400, windows_per_shard=5),
        training=TrainingConfig(local_epochs=2, batch_size=8),
    )
    info = find_dataset("cifar10", data="synthetic", data_dir=Path("nowhere"))
    use = sys.modules["busy"].DeviceUse(0.5, operations, 0.9)
    monkeypatch.setattr(profiled, "device_use", lambda *_: use)
    result = profiled.profile_round(config, info, streams=1, warm_up=0)
    assert result.pop("device_memory_mib") == 0
    if is_error:
        assert f"saw {operations} operations in a round of 16 training steps" in result["error"]
    else:
        assert result == {"device_busy": 0.5, "operations": operations, "seen_until": 0.9}


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a fake nvidia-smi on the path, which prints the given lines and then runs until it is terminated."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="0123"))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    os.mkfifo(tmp_path / "arguments")

    def install(lines: str) -> None:
        command = tmp_path / "nvidia-smi"
        command.write_text(f"#!/bin/sh\nprintf '{lines}'\necho \"$@\" > {tmp_path}/arguments\nexec tail -f /dev/null\n")
        command.chmod(0o755)

    return install


def test_utilization_is_the_median_of_the_drivers_samples(
    round_benchmark: Any, nvidia_smi: Callable[[str], None], tmp_path: Path
) -> None:
    nvidia_smi("80, 1000\\n91, 3000\\n95, 2000\\n9")
    with sys.modules["busy"].utilization(torch.device("cuda")) as result:
        arguments = (tmp_path / "arguments").read_text()  # blocks until the command has written them
    assert result == {"samples": 3, "utilization": 91, "least_utilization": 80, "memory_mib": 3000}
    assert "--id=GPU-0123" in arguments


def test_a_driver_that_does_not_answer_is_reported_as_an_error(
    round_benchmark: Any, nvidia_smi: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi("No devices were found\\n")
    with sys.modules["busy"].utilization(torch.device("cuda")) as result:
        (tmp_path / "arguments").read_text()
    assert result == {"error": "No devices were found"}
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with sys.modules["busy"].utilization(torch.device("cuda")) as result:
        pass
    assert "nvidia-smi" in result["error"]


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 9)), max_size=8))
def test_overlapping_spans_count_once(round_benchmark: Any, spans: list[tuple[int, int]]) -> None:
    moments = {moment for start, length in spans for moment in range(start, start + length)}
    assert sys.modules["busy"].covered((start, start + length) for start, length in spans) == len(moments)


def test_the_share_in_which_a_device_works_is_measured(profiled: Any) -> None:
    matrix = torch.rand(400, 400)
    busy = profiled.device_use(torch.device("cpu"), lambda: [matrix @ matrix for _ in range(20)])
    half_idle = profiled.device_use(
        torch.device("cpu"), lambda: [(matrix @ matrix, threading.Event().wait(0.05)) for _ in range(4)]
    )
    assert 0 < half_idle.share < 0.5 < busy.share <= 1
    assert busy.operations == 5 * half_idle.operations


def test_the_baseline_averages_as_the_plan_does(round_benchmark: Any) -> None:
    models = [build_model(name, num_classes=10, width=0.03) for name in FAMILIES["vgg"] * 2]
    plan = sharing_plan(models, "max_common")
    states = [model.state_dict() for model in models]
    for mean, expected in zip(
        sys.modules["sequential"].average_groups(plan, states), aggregate(plan, states), strict=True
    ):
        torch.testing.assert_close(mean, expected)


def test_aggregation_is_timed_for_each_number_of_clients() -> None:
    arguments = ["--clients", "8", "16", "--fit-from", "8", "--repeat", "1", "--limit", "9", "--pairwise", "8"]
    measured = run("aggregate.py", *arguments)
    assert set(measured["clients"]) == {"8", "16"}
    assert "speedup" in measured["clients"]["8"]
    assert "speedup" not in measured["clients"]["16"]
    assert set(measured["exponent"]) == {"plan_s", "aggregate_s"}
    assert run("aggregate.py", *arguments, "--limit", "-9", status=1)["exponent"]


@pytest.mark.slow
@pytest.mark.ray
def test_a_round_is_timed_against_the_loop() -> None:
    measured = run("round.py", "--local-epochs", "1", "--repeat", "2", "--width", "0.03", "--num-shards", "500")
    assert {measured[key]["n"] for key in ("round_s", "baseline_s", "ratio", "overhead")} == {2}
    assert set(measured["share_of_peak"]) == {*FAMILIES["vgg"], "all"}
    assert 0 < measured["overhead"]["median"] < 1
    assert "this process" in measured["peak_memory_mib"]
    assert len(measured["peak_memory_mib"]) > 1


@pytest.mark.slow
@pytest.mark.ray
def test_scale_finds_every_kind_of_process() -> None:
    sizes = ["--clients", "4", "12", "--rounds", "2", "--width", "0.03", "--images", "2"]
    measured = run("scale.py", *sizes, "--limit", "9")
    assert set(measured["clients"]) == {"4", "12"}
    for size in measured["clients"].values():
        assert min(size["clients_mib"], size["driver_mib"], size["command_mib"]) > 50
    growth = measured["clients"]["12"]["driver_mib"] / measured["clients"]["4"]["driver_mib"] - 1
    assert measured["driver_growth"] == pytest.approx(growth, abs=0.01)


def test_the_page_about_speed_is_up_to_date() -> None:
    page = subprocess.run([sys.executable, str(FOLDER / "page.py")], capture_output=True, text=True, check=True).stdout
    assert page == (FOLDER.parent / "docs" / "speed.md").read_text(), "python benchmarks/page.py > docs/speed.md"
