"""A Ray that runs by itself: who may talk to it, and a run that is given to it as a job."""

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
    """A running head: its process, which lives as long as it, and where it listens."""

    process: subprocess.Popen[bytes]
    gcs_port: int
    dashboard_port: int
    agent_port: int
    environment: Mapping[str, str]

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}"

    def job(self, *words: str) -> str:
        """Say `ray job ...`; returns what it printed."""
        command = [str(Path(sys.executable).parent / "ray"), "job", words[0], "--address", self.dashboard, *words[1:]]
        done = subprocess.run(
            command, env=dict(self.environment), capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr


def free_ports(count: int) -> list[int]:
    opened = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [connection.getsockname()[1] for connection in opened]
    for connection in opened:
        connection.close()
    return ports


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """Started as the documentation says, but in a folder of its own and on free ports; ended by its own process."""
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
    """Until the job interface and the agent answer, or the head has ended."""
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
    """The HTTP status of a call; None where nobody answers in HTTP."""
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, http.client.HTTPException):  # nobody, or somebody who speaks no HTTP
        return None


def listening(parent: int) -> dict[str, set[tuple[str, int]]]:
    """For each kind of process below one: the addresses and ports on which it listens."""
    listeners: dict[str, set[tuple[str, int]]] = {}
    for process in psutil.Process(parent).children(recursive=True):
        try:
            words = process.cmdline()
            connections = process.net_connections(kind="tcp")
        except psutil.NoSuchProcess:
            continue
        kind = next((Path(word).name for word in words[:4] if "ray/" in word or word.startswith("ray::")), words[:1])
        addresses = {connection.laddr for connection in connections if connection.status == psutil.CONN_LISTEN}
        listeners.setdefault(str(kind), set()).update((address.ip, address.port) for address in addresses)
    return listeners


def refused_without_a_token(gcs_address: str) -> str:
    """What a process hears that asks the control store for something and has no token."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "disabled", "HOME": "/nonexistent"}
    command = [sys.executable, "-c", WITHOUT_A_TOKEN, gcs_address]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stderr


def test_the_ray_of_the_command_has_no_dashboard_and_asks_for_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that answers to HTTP on any port of its processes: none runs a job for a stranger."""
    import ray

    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    with cluster.connected(None, num_cpus=1, num_gpus=0):
        listeners = listening(os.getpid())
        print(listeners)  # what the documentation lists
        assert any(listeners.values())
        run = b'{"entrypoint": "true"}'
        for _, port in set().union(*listeners.values()):
            for path in ("api/jobs/", "api/job_agent/jobs/"):
                status = answer(f"http://127.0.0.1:{port}/{path}", None, run)
                assert status is None or status >= 400, (port, path, status, listeners)
        assert "token" in refused_without_a_token(ray.get_runtime_context().gcs_address).lower()


def test_dashboard_and_job_interface_listen_on_loopback_and_ask_for_a_token(head: Head) -> None:
    everywhere = set().union(*listening(head.process.pid).values())
    assert {address for address, port in everywhere if port == head.dashboard_port} == {"127.0.0.1"}
    token = head.environment["RAY_AUTH_TOKEN"]
    jobs, run = f"{head.dashboard}/api/jobs/", b'{"entrypoint": "true"}'
    assert answer(jobs, token) == 200
    for url in (jobs, f"{head.dashboard}/nodes?view=summary", f"{head.dashboard}/api/v0/actors"):
        assert answer(url) == 401
        assert answer(url, "0" * 64) == 403
    assert answer(jobs, None, run) == 401
    assert answer(jobs, "0" * 64, run) == 403
    agent = f"http://127.0.0.1:{head.agent_port}/api/job_agent/jobs/"
    assert answer(agent, None, run) == 401
    assert answer(agent, "0" * 64, run) == 403
    assert "token" in refused_without_a_token(f"127.0.0.1:{head.gcs_port}").lower()


def test_a_run_outlives_the_terminal_that_it_was_given_from(head: Head, tmp_path: Path) -> None:
    line = [sys.executable, str(ROOT / "experiments" / "table1.py"), "--profile", "smoke", "--data", "synthetic"]
    line += ["--only", "cifar10/vgg/max_common", "--device", "cpu", "--results-dir", str(tmp_path)]
    head.job("submit", "--no-wait", "--submission-id", "table1", "--", *line)
    output = head.job("logs", "--follow", "table1")
    assert "running 1 cell of 2 rounds" in output
    assert "'table1' succeeded" in head.job("status", "table1")
    rows = pd.read_parquet(tmp_path / "table1" / "rounds")
    assert sorted(rows[["round", "client"]].itertuples(index=False, name=None)) == [
        (index, client) for index in range(3) for client in range(8)
    ]
