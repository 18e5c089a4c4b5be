"""The command behind Table 1, as users call it: what it refuses before anything starts, and one small complete run."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import pandas as pd
import pytest
import ray

from flexifed.grid import parse_options
from flexifed.orchestra.placement import Resources
from flexifed.profiles import PROFILES

SCRIPT = Path(__file__).parents[2] / "experiments" / "table1.py"
SMALL = [
    "--profile",
    "smoke",
    "--data",
    "synthetic",
    "--only",
    "cifar10/vgg/max_common",
    "--only",
    "cifar10/vgg/standalone",
]
Main = Callable[[Sequence[str]], int]


@pytest.fixture(scope="module")
def main() -> Main:
    return runpy.run_path(str(SCRIPT))["main"]


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("Ray was reached")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", refuse)


def status(main: Main, line: Sequence[str]) -> int:
    """The exit status of a command line, whether it is returned or raised."""
    try:
        return main(line)
    except SystemExit as end:
        return int(end.code or 0)


def refused(main: Main, line: Sequence[str], results: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Check that a command line is refused with status 2 and leaves nothing behind; returns its message in one line."""
    assert status(main, ["--results-dir", str(results), *line]) == 2
    assert not results.exists() or not [*results.rglob("*.parquet")]
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return " ".join(message.replace("│", " ").split())


BAD_SETTINGS = [
    (["--rounds", "0"], "rounds is 0; it must be a whole number of at least 1"),
    (["--local-epochs", "-1"], "local_epochs is -1; it must be a whole number of at least 1"),
    (["--num-clients", "0"], "num_clients is 0; it must be a whole number of at least 1"),
    (["--windows-per-shard", "0"], "windows_per_shard is 0; it must be a whole number of at least 1"),
    (["--clients-per-actor", "0"], "clients_per_actor is 0; it must be a whole number of at least 1"),
    (["--min-nodes", "5"], "min_nodes is 5, but Ray is started on this machine alone; name a cluster by --address"),
    (["--min-nodes", "0"], "min_nodes is 0; it must be a whole number of at least 1"),
    (["--max-concurrent", "-2"], "max_concurrent is -2; it must be a whole number of at least 1"),
    (["--learning-rate", "0"], "learning_rate is 0.0; it must be a finite number above 0"),
    (["--momentum", "1"], "momentum is 1.0; it must be a finite number at least 0 and below 1"),
    (
        ["--num-shards", "3"],
        "num_shards is 3, fewer than the 8 clients that need one each; ask for at least 8 shards or for fewer clients",
    ),
    (["--seeds", "1", "1"], "seeds is [1, 1]; give at least one, all different, from 0 to 2**63 - 1"),
    (["--seeds", "0", "-1"], "seeds is [0, -1]; give at least one, all different, from 0 to 2**63 - 1"),
    (["--profile", "tiny"], f"profile is 'tiny'; choose one of: {', '.join(PROFILES)}"),
    (
        ["--only", "cifar10/vgg/max"],
        "--only 'cifar10/vgg/max' matches no cell; write DATASET/FAMILY/SCHEME with dataset cifar10, cinic10, agnews, "
        "speech_commands; family vgg, resnet, charcnn, vdcnn; "
        "scheme standalone, clustered_fl, basic_common, clustered_common, max_common; or * for any",
    ),
    (["--only", "mnist/*/*"], "--only 'mnist/*/*' matches no cell"),
    (["--only", "*/*/max_common", "--only", "*/lstm/*"], "--only '*/lstm/*' matches no cell"),
]


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(
    ("line", "message"), BAD_SETTINGS, ids=lambda value: " ".join(value) if isinstance(value, list) else "refused"
)
def test_an_invalid_setting_is_refused_with_value_choices_and_remedy(
    main: Main, line: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(main, ["--data", "synthetic", *line], tmp_path / "results", capsys)
    assert not (tmp_path / "results").exists()


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["--scheme", "max_common"], ["--scheme"]),
        (["--data", "imaginary"], ["imaginary", "auto", "real", "synthetic"]),
        (["--device", "tpu"], ["tpu", "auto", "cpu", "cuda"]),
        (["--rounds", "many"], ["--rounds", "many"]),
        (["--weighting", "loss"], ["loss", "uniform", "samples"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "refused",
)
def test_a_line_that_cannot_be_parsed_is_refused_with_the_choices(
    main: Main, line: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(main, line, tmp_path / "results", capsys)
    assert [word for word in words if word not in message] == []


@pytest.mark.usefixtures("no_ray")
def test_missing_real_data_are_refused_with_the_remedy(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(main, ["--data", "real", "--data-dir", str(tmp_path)], tmp_path / "results", capsys)
    assert message.startswith(f"error: cifar10: no real data in {tmp_path}")
    assert "--download" in message


@pytest.mark.usefixtures("no_ray")
def test_a_results_folder_that_cannot_be_written_is_refused(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    message = refused(main, ["--data", "synthetic"], tmp_path / "file" / "results", capsys)
    assert message.startswith(f"error: can't write results to {tmp_path / 'file' / 'results' / 'table1'}: ")
    assert message.endswith("; choose another --results-dir")


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--num-shards", "10001"], "num_shards is 10001, but there are only 10000 test samples"),
        (["--num-shards", "5000", "--windows-per-shard", "11"], "windows_per_shard is 11, but a shard has only 10"),
        (
            ["--reduce-block", "4", "--clients-per-actor", "3"],
            "clients_per_actor is 3, not a multiple of reduce_block (4)",
        ),
        (["--gpus-per-client", "-1"], "gpus_per_client is -1.0; it must be a finite number at least 0"),
        (
            ["--device", "cpu", "--gpus-per-client", "0.5"],
            "gpus_per_client is 0.5, but device is 'cpu', which uses none",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "refused",
)
def test_settings_that_do_not_fit_each_other_or_the_data_are_refused_before_ray_starts(
    main: Main, line: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(main, ["--data", "synthetic", *line], tmp_path / "results", capsys)
    assert not (tmp_path / "results").exists()


@pytest.mark.usefixtures("no_ray")
def test_a_dry_run_prints_cells_resources_and_time_and_starts_nothing(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, "--seeds", "0", "1", "--dry-run", "--results-dir", str(tmp_path / "results")]) == 0
    output = capsys.readouterr().out
    assert output.count("to run, 2 rounds") == 4
    assert "cifar10/vgg/max_common seed 1" in output
    assert "clustered_fl" not in output
    assert "nothing was started" in " ".join(output.split())
    disk = re.search(
        r"disk: ([\d.]+) MB of final states stay .*; while cells run, up to ([\d.]+) MB of checkpoints beside them",
        output,
    )
    assert disk
    kept, meanwhile = map(float, disk.groups())
    assert 0 < meanwhile <= kept < 2 * meanwhile, "three of one cell at a time, and one of each of four cells"
    assert not ray.is_initialized()
    assert not (tmp_path / "results").exists()


@pytest.mark.usefixtures("no_ray")
def test_a_dry_run_counts_whole_models_of_clients_that_have_not_trained(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def disk(*line: str) -> tuple[str, str]:
        cell = ["--profile", "smoke", "--data", "synthetic", "--only", "cifar10/vgg/max_common"]
        assert main([*cell, "--dry-run", "--results-dir", str(tmp_path / "results"), *line]) == 0
        found = re.search(r"disk: (.*) of final states .* up to (.*) of checkpoints", capsys.readouterr().out)
        assert found
        return found[1], found[2]

    everyone, some, all_trained = (
        disk(),
        disk("--clients-per-round", "2"),
        disk("--clients-per-round", "2", "--rounds", "99"),
    )
    assert float(some[1].split()[0]) > float(everyone[1].split()[0]), "after the first round"
    assert all_trained == (everyone[0], some[1]), "after the last, as if all had taken part in every round"


@pytest.mark.usefixtures("no_ray")
def test_a_dry_run_from_a_head_without_a_gpu_estimates_no_gpu_time(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexifed.orchestra.cluster.connected", lambda address: nullcontext())

    def wait_for_nodes(min_nodes: int, say: object, *, ask: bool) -> list[Resources]:
        assert not ask, "a dry run must not ask the cluster for more nodes"
        return [{"CPU": 0}, {"CPU": 8, "GPU": 1}]

    monkeypatch.setattr("flexifed.orchestra.cluster.wait_for_nodes", wait_for_nodes)
    monkeypatch.setattr("flexifed.orchestra.estimate.this_machine", lambda: {"CPU": 2.0, "GPU": 0.0})
    line = [*SMALL, "--address", "10.0.0.1:6379", "--dry-run", "--results-dir", str(tmp_path / "results")]
    assert main(line) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "a cell is 8 actors of 1 client, each 1 CPU and 0.125 GPU, on cuda" in output
    assert "of checkpoints beside them" in output, "which needs no GPU"
    assert output.endswith("time: not estimated, because steps are timed in this process and it sees no GPU")


def test_environment_variables_set_folders_and_cluster_and_the_command_line_overrides_them() -> None:
    environ = {"FLEXIFED_DATA_DIR": "/data", "FLEXIFED_RESULTS_DIR": "/shared/results", "RAY_ADDRESS": "10.0.0.1:6379"}

    def options(line: Sequence[str], environ: Mapping[str, str]) -> tuple[str, str, str | None]:
        parsed = parse_options(line, prog="table1.py", description="", environ=environ)
        return str(parsed.data_dir), str(parsed.results_dir), parsed.address

    assert options([], {}) == ("data", "results", None)
    assert options([], environ) == ("/data", "/shared/results", "10.0.0.1:6379")
    line = ["--data-dir", "a", "--results-dir", "b", "--address", "auto"]
    assert options(line, environ) == ("a", "b", "auto")


def test_winograd_can_be_switched_off() -> None:
    def winograd(line: Sequence[str]) -> bool:
        return parse_options(line, prog="table1.py", description="", environ={}).numerics.winograd

    assert winograd([])
    assert winograd(["--winograd"])
    assert not winograd(["--no-winograd"])


def test_help_imports_neither_torch_nor_ray_nor_pandas() -> None:
    code = (
        "import runpy, sys\n"
        "try:\n"
        f"    runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "finally:\n"
        "    print('heavy:', sorted({'torch', 'ray', 'pandas', 'numpy', 'pyarrow'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--help"], cwd=SCRIPT.parents[1], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "--results-dir" in done.stdout
    assert done.stdout.endswith("heavy: []\n")


@pytest.mark.ray
def test_a_small_run_leaves_a_row_for_each_round_and_client_and_is_not_run_again(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    line = [*SMALL, "--results-dir", str(tmp_path)]
    assert main(line) == 0
    first = capsys.readouterr()
    rows = pd.read_parquet(tmp_path / "table1" / "rounds")
    counts = rows[["scheme", "round", "client"]].value_counts()
    expected = {
        (scheme, index, client) for scheme in ("max_common", "standalone") for index in range(3) for client in range(8)
    }
    assert set(counts.index) == expected
    assert set(counts) == {1}
    assert set(rows["data_source"]) == {"synthetic"}
    assert set(rows["profile"]) == {"smoke"}
    assert rows.groupby("scheme")["run_id"].nunique().to_dict() == {"max_common": 1, "standalone": 1}
    assert "SYNTHETIC" in table_in(first.out)
    assert "standalone" in table_in(first.out)

    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    monkeypatch.setattr("flexifed.orchestra.sweep.run_grid", lambda *_, **__: pytest.fail("a finished cell was run"))
    assert main(line) == 0
    second = capsys.readouterr()
    assert "2 of 2 cells finished already" in second.out
    assert table_in(second.out) == table_in(first.out)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")} == written
    assert not ray.is_initialized()


def table_in(output: str) -> str:
    """The output from the title of the first table to the end."""
    return output[output.index("cifar10 / vgg") :]
