"""A Ray cluster that was started separately: who may connect to it, and a run that is submitted to it as a job."""

from __future__ import annotations

import http.client
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import psutil
import pytest

from flexifed.orchestra import cluster

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]

WITHOUT_A_TOKEN = """
import sys
from ray._raylet import GcsClient
try:
    GcsClient(address=sys.argv[1]).internal_kv_keys(b"", None, 10)
except Exception as error:
    sys.exit(str(error))
"""


@dataclass(frozen=True)
class Head:
    """A running head node: its process, which ends with it, and the ports on which it listens."""

    process: subprocess.Popen[bytes]
    gcs_port: int
    dashboard_port: int
    agent_port: int
    environment: Mapping[str, str]

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}"

    def job(self, *arguments: str) -> str:
        """Run `ray job ...`; returns its output."""
        command = [str(Path(sys.executable).parent / "ray"), "job", arguments[0]]
        command += ["--address", self.dashboard, *arguments[1:]]
        finished = subprocess.run(
            command, env=dict(self.environment), capture_output=True, text=True, timeout=600, check=False
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr
        return finished.stdout + finished.stderr


def free_ports(count: int) -> list[int]:
    opened = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [connection.getsockname()[1] for connection in opened]
    for connection in opened:
        connection.close()
    return ports


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """Started as the documentation says, but in a folder of its own and on free ports; ended through its process."""
    with tempfile.TemporaryDirectory(prefix="ffhead") as folder:  # sockets in it need a short path
        gcs, dashboard, agent, client = free_ports(4)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment |= {
            "HOME": folder,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "PYTHONPATH": str(ROOT),
        }
        command = [
            str(Path(sys.executable).parent / "ray"),
            "start",
            "--head",
            "--block",
            "--temp-dir",
            f"{folder}/ray",
        ]
        command += ["--node-ip-address", "127.0.0.1", "--dashboard-host", "127.0.0.1", "--num-cpus", "2"]
        command += ["--port", str(gcs), "--dashboard-port", str(dashboard), "--dashboard-agent-listen-port", str(agent)]
        command += ["--ray-client-server-port", str(client), "--disable-usage-stats"]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            started = Head(process, gcs, dashboard, agent, environment)
            wait_for(started)
            yield started
        finally:
            children = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            process.wait(timeout=60)
            _, alive = psutil.wait_procs(children, timeout=60)
            for child in alive:
                child.kill()


def wait_for(head: Head) -> None:
    """Wait until the job interface and the agent answer; fail if the head ends before."""
    urls = f"{head.dashboard}/api/version", f"http://127.0.0.1:{head.agent_port}/api/healthz"
    while head.process.poll() is None:
        if None not in [answer(url, head.environment["RAY_AUTH_TOKEN"]) for url in urls]:
            return
        try:
            head.process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            continue
    pytest.fail(f"the head ended with status {head.process.returncode}")


def answer(url: str, token: str | None = None, body: bytes | None = None) -> int | None:
    """The HTTP status of a request; None without an answer in HTTP."""
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, http.client.HTTPException):  # nothing listens, or it does not speak HTTP
        return None


def listening(parent: int) -> dict[str, set[tuple[str, int]]]:
    """The addresses and ports on which the descendants of a process listen, by kind of process."""
    listeners: dict[str, set[tuple[str, int]]] = {}
    for process in psutil.Process(parent).children(recursive=True):
        try:
            arguments = process.cmdline()
            connections = process.net_connections(kind="tcp")
        except psutil.NoSuchProcess:
            continue
        kind = next(
            (Path(argument).name for argument in arguments[:4] if "ray/" in argument or argument.startswith("ray::")),
            arguments[:1],
        )
        addresses = {connection.laddr for connection in connections if connection.status == psutil.CONN_LISTEN}
        listeners.setdefault(str(kind), set()).update((address.ip, address.port) for address in addresses)
    return listeners


def refused_without_a_token(gcs_address: str) -> str:
    """The error of a process that queries the control store without a token."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "disabled", "HOME": "/nonexistent"}
    command = [sys.executable, "-c", WITHOUT_A_TOKEN, gcs_address]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 1, finished.stdout + finished.stderr
    return finished.stderr


def test_the_ray_of_the_command_has_no_dashboard_and_asks_for_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """No HTTP server on any port of its processes accepts a job without a token."""
    import ray

    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    with cluster.connected(None, num_cpus=1, num_gpus=0):
        listeners = listening(os.getpid())
        print(listeners)  # what the documentation lists
        assert any(listeners.values())
        job = b'{"entrypoint": "true"}'
        for _, port in set().union(*listeners.values()):
            for path in ("api/jobs/", "api/job_agent/jobs/"):
                status = answer(f"http://127.0.0.1:{port}/{path}", None, job)
                assert status is None or status >= 400, (port, path, status, listeners)
        assert "token" in refused_without_a_token(ray.get_runtime_context().gcs_address).lower()


def test_dashboard_and_job_interface_listen_on_loopback_and_ask_for_a_token(head: Head) -> None:
    listening_on = set().union(*listening(head.process.pid).values())
    assert {address for address, port in listening_on if port == head.dashboard_port} == {"127.0.0.1"}
    token = head.environment["RAY_AUTH_TOKEN"]
    jobs, job = f"{head.dashboard}/api/jobs/", b'{"entrypoint": "true"}'
    assert answer(jobs, token) == 200
    for url in (jobs, f"{head.dashboard}/nodes?view=summary", f"{head.dashboard}/api/v0/actors"):
        assert answer(url) == 401
        assert answer(url, "0" * 64) == 403
    assert answer(jobs, None, job) == 401
    assert answer(jobs, "0" * 64, job) == 403
    agent = f"http://127.0.0.1:{head.agent_port}/api/job_agent/jobs/"
    assert answer(agent, None, job) == 401
    assert answer(agent, "0" * 64, job) == 403
    assert "token" in refused_without_a_token(f"127.0.0.1:{head.gcs_port}").lower()


def test_a_run_outlives_the_terminal_from_which_it_was_submitted(head: Head, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "experiments" / "table1.py"), "--profile", "smoke", "--data", "synthetic"]
    command += ["--only", "cifar10/vgg/max_common", "--device", "cpu", "--results-dir", str(tmp_path)]
    head.job("submit", "--no-wait", "--submission-id", "table1", "--", *command)
    output = head.job("logs", "--follow", "table1")
    assert "running 1 cell of 2 rounds" in output
    assert "'table1' succeeded" in head.job("status", "table1")
    rows = pd.read_parquet(tmp_path / "table1" / "rounds")
    assert sorted(rows[["round", "client"]].itertuples(index=False, name=None)) == [
        (index, client) for index in range(3) for client in range(8)
    ]
