"""The cluster files, their common set-up script, and the comparison of runs. Nothing is contacted or installed."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from numpy.typing import NDArray
from ray.autoscaler._private.util import prepare_config, validate_config

from flexifed.results.rounds_file import read_metadata
from flexifed.results.store import ResultsFolder
from flexifed.results.tables import write_table

REPOSITORY = Path(__file__).resolve().parents[1]
SETUP = REPOSITORY / "clusters" / "setup.sh"
FILES = ("cluster.yaml", "clusters/local.yaml")
SETUP_COMMAND = re.compile(r"((?:[A-Z_]+=\S* )+)(bash ~/flexifed/clusters/setup\.sh)")


def read(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((REPOSITORY / name).read_text()))


def settings(name: str) -> dict[str, str]:
    """The settings in front of setup.sh."""
    (command,) = read(name)["setup_commands"]
    match = SETUP_COMMAND.fullmatch(command)
    assert match
    return dict(setting.split("=", 1) for setting in match[1].split())


# ---------------------------------------------------------------------------------------------------- the two files


@pytest.mark.parametrize("name", FILES)
def test_ray_accepts_the_file(name: str) -> None:
    config = prepare_config(read(name))
    validate_config(config)
    assert config["head_setup_commands"] == config["worker_setup_commands"] == read(name)["setup_commands"]


def test_both_set_machines_up_and_start_ray_in_the_same_way() -> None:
    aws, own = (read(name) for name in FILES)
    own["head_start_ray_commands"] = [
        line.replace("RAY_enable_autoscaler_v2=0 ", "") for line in own["head_start_ray_commands"]
    ]
    shared = {"file_mounts", "rsync_exclude", "head_start_ray_commands", "worker_start_ray_commands"}
    assert {key: aws[key] for key in shared} == {key: own[key] for key in shared}
    assert aws.keys() & own.keys() == {"cluster_name", "provider", "auth", "setup_commands", *shared}
    known = set(re.findall(r"^#   (FLEXIFED_\w+) ", SETUP.read_text(), flags=re.MULTILINE))
    assert settings(FILES[0]).keys() == settings(FILES[1]).keys() == known


@pytest.mark.parametrize("name", FILES)
def test_only_ssh_is_open_and_ray_requires_a_token(name: str) -> None:
    config = read(name)
    (head,) = [line for line in config["head_start_ray_commands"] if "ray start" in line]
    assert "--dashboard-host=127.0.0.1" in head
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "security_group" not in config["provider"], "Ray's own lets in SSH alone"
    assert "export RAY_AUTH_MODE=token\n" in SETUP.read_text()


def test_a_stopped_job_has_time_to_finish_its_round_and_write_a_checkpoint() -> None:
    (seconds,) = re.findall(r"^export RAY_JOB_STOP_WAIT_TIME_S=(\d+)$", SETUP.read_text(), flags=re.MULTILINE)
    assert int(seconds) >= 300, "Ray's own is 3"


def test_everything_that_an_installation_needs_is_sent_and_nothing_large() -> None:
    mounted = {local: remote for remote, local in read(FILES[0])["file_mounts"].items() if not local.startswith("~")}
    assert mounted == {local: f"~/flexifed/{local}" for local in mounted}
    assert all((REPOSITORY / local).exists() for local in mounted)
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    needed = {
        "pyproject.toml",
        project["project"]["readme"],
        *project["project"]["license-files"],
        *project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"],
    }
    assert mounted.keys() == needed | {"clusters"}


def test_rented_gpu_machines_have_bounds_and_the_head_holds_no_client() -> None:
    config = prepare_config(read("cluster.yaml"))
    head, gpu = (config["available_node_types"][name] for name in ("head", "gpu"))
    assert head["resources"] == {"CPU": 0}
    assert 0 < gpu["min_workers"] <= gpu["max_workers"] <= config["max_workers"]
    assert config["idle_timeout_minutes"] > 0
    assert config["provider"]["cache_stopped_nodes"] is False
    assert head["node_config"]["ImageId"] == gpu["node_config"]["ImageId"]


# -------------------------------------------------------------------------------------------------- the set-up text

STUB = '#!/usr/bin/env bash\necho "$(basename "$0") $*" >>"$CALLS"\n'
STUBS = {
    "sudo": STUB + '[ "$1" = tee ] && cat >>"$CALLS" || true\n',
    "uv": STUB + '[ "$1 $2" = "pip freeze" ] && echo torch==2.11.0 || true\n',
    "mountpoint": STUB + "exit 1\n",
}


@dataclass(frozen=True)
class Machine:
    """Runs setup.sh in a private home, with stub programs that only record how they were called."""

    folder: Path
    shared: Path

    def add_program(self, name: str, text: str) -> None:
        path = self.folder / "bin" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def set_up(self, python: str = "exit 0", **environ: str) -> subprocess.CompletedProcess[str]:
        home, programs = self.folder / "home", self.folder / "bin"
        for path in (home / "flexifed", programs):
            path.mkdir(parents=True, exist_ok=True)
        (home / "flexifed" / "pyproject.toml").write_text("[project]\n")
        installed = home / ".venvs" / "flexifed" / "bin"
        installed.mkdir(parents=True, exist_ok=True)
        in_venv = {installed / "flexifed": STUB, installed / "python": f"#!/bin/sh\n{python}\n"}
        for path, text in {**in_venv, **{programs / name: text for name, text in STUBS.items()}}.items():
            path.write_text(text)
            path.chmod(0o755)
        (home / ".venvs" / "flexifed" / "pyvenv.cfg").write_text("implementation = CPython\nversion_info = 3.12.3\n")
        (self.folder / "calls").write_text("")
        return subprocess.run(
            ["bash", str(SETUP)],
            env={
                "HOME": str(home),
                "PATH": f"{programs}:{os.environ['PATH']}",
                "CALLS": str(self.folder / "calls"),
                "FLEXIFED_SHARED": str(self.shared),
                **environ,
            },
            capture_output=True,
            text=True,
            check=False,
        )

    def calls(self, program: str) -> list[str]:
        lines = (self.folder / "calls").read_text().splitlines()
        return [line for line in lines if line.startswith(f"{program} ")]


@pytest.fixture
def machine(tmp_path: Path) -> Callable[[str], Machine]:
    (tmp_path / "shared").mkdir()
    return lambda name: Machine(tmp_path / name, tmp_path / "shared")


def test_all_machines_get_the_versions_of_the_first(machine: Callable[[str], Machine]) -> None:
    head, worker = machine("head"), machine("worker")
    assert head.set_up().returncode == 0
    (versions,) = (head.shared / "versions").iterdir()
    assert versions.read_text() == "# python 3.12.3\ntorch==2.11.0\n"
    assert any(call.startswith("uv venv") and "--python >=3.11 " in call for call in head.calls("uv"))
    assert not any("--constraint" in call for call in head.calls("uv"))
    assert worker.set_up(RAY_HEAD_IP="10.0.0.1").returncode == 0
    (installed,) = [call for call in worker.calls("uv") if "pip install" in call]
    assert f"--constraint {versions}" in installed
    assert any(call.startswith("uv venv") and "--python 3.12.3 " in call for call in worker.calls("uv"))
    assert not any("freeze" in call for call in worker.calls("uv"))


def test_a_login_finds_the_project_its_folders_and_the_token_mode(machine: Callable[[str], Machine]) -> None:
    head = machine("head")
    for _ in range(2):
        assert head.set_up().returncode == 0
    home = head.folder / "home"
    assert (home / ".bashrc").read_text() == '. "$HOME/.flexifed.sh"\n', "once, however often it is set up"
    names = ["RAY_AUTH_MODE", "FLEXIFED_DATA_DIR", "FLEXIFED_RESULTS_DIR"]
    show = f'. "$HOME/.bashrc"; command -v flexifed; printf "%s\\n" {" ".join(f"${name}" for name in names)}'
    environ = {"HOME": str(home), "PATH": "/usr/bin:/bin"}
    output = subprocess.run(
        ["bash", "-c", show], env=environ, capture_output=True, text=True, check=True
    ).stdout.split()
    assert output == [
        f"{home}/.venvs/flexifed/bin/flexifed",
        "token",
        f"{home}/flexifed-data",
        f"{head.shared}/results",
    ]


def test_data_are_downloaded_only_on_request(machine: Callable[[str], Machine]) -> None:
    head = machine("head")
    assert head.set_up(FLEXIFED_DOWNLOAD="no").returncode == 0
    assert head.calls("flexifed") == []
    assert head.set_up(FLEXIFED_DOWNLOAD="yes").returncode == 0
    fetch = f"flexifed data --data-dir {head.folder}/home/flexifed-data --download"
    assert head.calls("flexifed") == [fetch]
    assert head.set_up(FLEXIFED_DOWNLOAD="cifar10 agnews").returncode == 0
    assert head.calls("flexifed") == [f"{fetch} --only cifar10 agnews"]


@pytest.mark.parametrize(
    ("nfs", "head_ip", "expected"),
    [
        ("", "", []),
        ("", "10.0.0.1", []),
        ("head", "", ["exportfs -ra"]),
        ("head", "10.0.0.1", ["mount -t nfs4 -o nfsvers=4.1,hard,noresvport 10.0.0.1:{shared} {shared}"]),
        ("fs-1.efs:/", "", ["mount -t nfs4 -o nfsvers=4.1,hard,noresvport fs-1.efs:/ {shared}"]),
        ("fs-1.efs:/", "10.0.0.1", ["mount -t nfs4 -o nfsvers=4.1,hard,noresvport fs-1.efs:/ {shared}"]),
    ],
)
def test_the_shared_folder_exists_or_is_exported_by_the_head_or_is_mounted(
    machine: Callable[[str], Machine], nfs: str, head_ip: str, expected: Sequence[str]
) -> None:
    host = machine("host")
    environ = {"FLEXIFED_NFS": nfs} | ({"RAY_HEAD_IP": head_ip} if head_ip else {})
    assert host.set_up(**environ).returncode == 0
    called = [call.removeprefix("sudo ") for call in host.calls("sudo")]
    mounts = [call for call in called if call.startswith(("exportfs", "mount"))]
    assert mounts == [line.format(shared=host.shared) for line in expected]
    exported = f"{host.shared} *(rw,sync,no_subtree_check,insecure)"  # noresvport mounts from ports above 1023
    assert (exported in (host.folder / "calls").read_text().splitlines()) == ("exportfs -ra" in expected)


def test_a_shared_folder_that_cannot_be_written_stops_the_set_up(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    host = Machine(tmp_path / "host", tmp_path / "file" / "shared")
    done = host.set_up()
    assert done.returncode == 1
    assert f"can't write to {host.shared}; mount it there, or name another FLEXIFED_SHARED" in done.stderr
    assert host.calls("uv") == []


# ----------------------------------------------------------------------------------------------- comparing two runs

Compare = Callable[[Sequence[str]], int]
RECORD = REPOSITORY / "records" / "thin-cifar10-vgg" / "rounds"


@pytest.fixture(scope="module")
def compare() -> Compare:
    main: Compare = runpy.run_path(str(REPOSITORY / "clusters" / "compare_runs.py"))["main"]
    return main


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders with a recorded cell; in the second the rows are reordered and come from another process."""
    source = min(RECORD.glob("*-max_common-seed0-*.parquet"))
    table = pq.read_table(source, partitioning=None)
    moved = replaced(table.take([*range(len(table))][::-1]), "actor", np.full(len(table), 7, np.int32))
    for name, rows in (("here", table), ("there", moved)):
        write_table(file_in(tmp_path / name), rows)
    return tmp_path / "here", tmp_path / "there"


def test_an_unreadable_file_is_an_error_and_not_a_difference(
    compare: Compare, runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file_in(runs[1]).write_bytes(b"no Parquet")
    assert compare([str(root) for root in runs]) == 2
    assert f"error: can't read {file_in(runs[1])}" in capsys.readouterr().err


def file_in(root: Path) -> Path:
    return ResultsFolder(root).rounds_file("cell")


def replaced(table: pa.Table, column: str, values: NDArray[Any]) -> pa.Table:
    index = table.schema.get_field_index(column)
    return table.set_column(index, table.schema.field(column), pa.array(values))


def test_runs_that_differ_in_time_and_process_alone_are_the_same(
    compare: Compare, runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare([str(root) for root in runs]) == 0
    rows = pq.read_metadata(file_in(runs[0])).num_rows
    assert f"cell: the same {rows} rows, the same 8 final states\n" in capsys.readouterr().out


@pytest.mark.parametrize("column", ["accuracy", "loss"])
def test_one_value_that_differs_in_its_last_bit_is_found(
    compare: Compare, runs: tuple[Path, Path], column: str, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pq.read_table(file_in(runs[1]), partitioning=None)
    values = table[column].to_numpy().copy()
    values[3] = np.nextafter(values[3], 2)
    write_table(file_in(runs[1]), replaced(table, column, values))
    assert compare([str(root) for root in runs]) == 1
    assert f"cell: DIFFERENT: column {column}\n" in capsys.readouterr().out


def test_states_rows_and_cells_that_differ_are_found(
    compare: Compare, runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    here, there = runs
    table = pq.read_table(file_in(there), partitioning=None)
    metadata = {**read_metadata(file_in(there)), "state_sha256": ["0" * 64]}
    write_table(file_in(there), table.replace_schema_metadata({b"flexifed": json.dumps(metadata)}))
    assert compare([str(here), str(there)]) == 1
    assert "DIFFERENT: state_sha256\n" in capsys.readouterr().out
    write_table(file_in(there), table.slice(8))
    assert compare([str(here), str(there)]) == 1
    assert f"DIFFERENT: {len(table)} rows and {len(table) - 8} rows\n" in capsys.readouterr().out
    file_in(there).unlink()
    assert compare([str(here), str(there)]) == 1
    assert f"DIFFERENT: missing: {file_in(there)}\n" in capsys.readouterr().out
    assert compare([str(there), str(there)]) == 2
    assert "no results in" in capsys.readouterr().err


NVIDIA_SMI = """#!/bin/sh
case $1 in
  --list-gpus) echo 'GPU 0: NVIDIA A10G' ;;
  *) echo 535.54.03 ;;
esac
"""


def test_a_gpu_that_pytorch_cannot_use_stops_the_set_up(machine: Callable[[str], Machine]) -> None:
    host = machine("host")
    assert host.set_up(python="exit 1").returncode == 0, "no GPU, so none has to be usable"
    host.add_program("nvidia-smi", NVIDIA_SMI)
    assert host.set_up(python="exit 0").returncode == 0
    done = host.set_up(python="exit 1")
    assert done.returncode == 1
    assert "needs an NVIDIA driver of release 580 or later, here is 535.54.03" in done.stderr
