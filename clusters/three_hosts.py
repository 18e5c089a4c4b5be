"""Run all of docs/clusters.md, from `ray up` to `ray down`, on three hosts and a laptop simulated on this machine.

    sudo python3 clusters/three_hosts.py [--uv-cache DIR] [--log FILE] [-- ARGUMENTS OF experiments/table1.py]

Each host is a set of Linux namespaces: its own network with an address and an sshd, its own processes, and its own
mounts, with a private home, /tmp and /etc over this machine's Debian, which it can read but not change. The hosts share
one folder, like machines that mount the same NFS export, and one uv cache, like machines behind a mirror of the package
index, but nothing else: each starts bare, and everything on it in the end came by SSH.

Needs root, Debian or Ubuntu with Python 3.11 or later, Linux with overlay, veth and nftables, and about 6 GB of
memory. Installs openssh-server, iproute2, rsync and nftables by apt. Removes everything else that it makes afterwards.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
INIT = REPOSITORY / "clusters" / "three_hosts_init.sh"
PACKAGES = ("openssh-server", "iproute2", "rsync", "nftables")
BRIDGE, NETWORK, GATEWAY = "flexifed0", "10.77.0", "10.77.0.1"
HOSTS = {"laptop": "10.77.0.10", "head": "10.77.0.11", "worker-1": "10.77.0.12", "worker-2": "10.77.0.13"}
PLAIN = "--log-style pretty --log-color false"
ON_ALL_THREE = "--min-nodes 3 --clients-per-actor 1"
SMOKE = ("--profile", "smoke", "--data", "synthetic")
UNSHARE = ("unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--uts", "--ipc")
OPTIONS = ("-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR")
RAY_GONE_S = 180
SSHD_S = 30


class Log:
    """Commands and their output, on the screen and in a file."""

    def __init__(self, path: Path | None) -> None:
        self._file = path.open("w") if path else None
        self._started = time.monotonic()

    def write(self, text: str) -> None:
        """Write one line or more."""
        for line in text.rstrip("\n").split("\n"):
            line = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line.rsplit("\r", 1)[-1])
            print(line, flush=True)
            if self._file:
                print(line, file=self._file, flush=True)

    def step(self, text: str) -> None:
        """Write a step's heading, with the seconds since the start."""
        self.write(f"\n### {text} ({time.monotonic() - self._started:.0f} s)")


class Hosts:
    """The simulated hosts.

    Args:
        base: an empty folder for the shared folder and the keys.
        uv_cache: the uv cache that the hosts share.
    """

    def __init__(self, base: Path, uv_cache: Path) -> None:
        self._base = base
        self._uv_cache = uv_cache
        self._key = base / "key"
        self._processes: list[subprocess.Popen[bytes]] = []
        self._forwarding = Path("/proc/sys/net/ipv4/ip_forward")
        self._forwarded = self._forwarding.read_text()

    def start(self) -> None:
        """Make the network, start the hosts, and wait for their sshds."""
        (self._base / "shared").mkdir()
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self._key))
        _run("ip", "link", "add", BRIDGE, "type", "bridge")
        _run("ip", "addr", "add", f"{GATEWAY}/24", "dev", BRIDGE)
        _run("ip", "link", "set", BRIDGE, "up")
        self._forwarding.write_text("1")
        nat = f"ip saddr {NETWORK}.0/24 ip daddr != {NETWORK}.0/24 masquerade"
        rules = f"table ip {BRIDGE} {{ chain out {{ type nat hook postrouting priority 100; {nat}; }}; }}"
        subprocess.run(["nft", "-f", "-"], input=rules.encode(), check=True)
        for index, (name, address) in enumerate(HOSTS.items()):
            space, outside, inside = f"{BRIDGE}-{name}", f"{BRIDGE}p{index}", f"{BRIDGE}q{index}"
            _run("ip", "netns", "add", space)
            _run("ip", "link", "add", outside, "type", "veth", "peer", "name", inside)
            _run("ip", "link", "set", inside, "netns", space, "name", "eth0")
            _run("ip", "link", "set", outside, "master", BRIDGE, "up")
            for line in (f"addr add {address}/24 dev eth0", "link set eth0 up", "link set lo up"):
                _run("ip", "-n", space, *line.split())
            _run("ip", "-n", space, "route", "add", "default", "via", GATEWAY)
            (self._base / name).mkdir()
            init = ["bash", str(INIT), name, str(self._base), str(self._uv_cache)]
            with open(self._base / f"{name}.log", "wb") as log:
                command = ["ip", "netns", "exec", space, *UNSHARE, *init]
                self._processes.append(
                    subprocess.Popen(command, env={"PATH": os.environ["PATH"]}, stdout=log, stderr=log)
                )
        for name in HOSTS:
            self._wait_for_sshd(name)

    def _wait_for_sshd(self, name: str) -> None:
        for _ in range(SSHD_S):
            if self.ssh(name, "true").returncode == 0:
                return
            time.sleep(1)
        raise SystemExit(f"{name} does not answer: {(self._base / f'{name}.log').read_text()}")

    def ssh(self, name: str, command: str) -> subprocess.CompletedProcess[str]:
        """Run a command on a host, and capture its output."""
        line = ["ssh", *OPTIONS, "-i", str(self._key), f"root@{HOSTS[name]}", command]
        return subprocess.run(line, capture_output=True, text=True)

    def say(self, name: str, command: str, log: Log, *, may_fail: bool = False) -> int:
        """Run a command on a host, and log it with its output as it comes; returns its exit status."""
        log.write(f"{name}$ {command}")
        line = ["ssh", *OPTIONS, "-i", str(self._key), f"root@{HOSTS[name]}", command]
        process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        assert process.stdout
        for output in process.stdout:
            log.write(output)
        status = process.wait()
        if status and not may_fail:
            raise SystemExit(f"{name}: exit status {status} from: {command}")
        return status

    def copy_checkout(self, name: str) -> None:
        """Copy this checkout's tracked and untracked files, without ignored ones, to ~/flexifed-checkout."""
        listed = ["git", "-C", str(REPOSITORY), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        files = subprocess.run(listed, capture_output=True, check=True)
        shell = shlex.join(["ssh", *OPTIONS, "-i", str(self._key)])
        target = f"root@{HOSTS[name]}:flexifed-checkout/"
        rsync = ["rsync", "-a", "--from0", "--files-from=-", "--ignore-missing-args", "-e", shell]
        subprocess.run([*rsync, f"{REPOSITORY}/", target], input=files.stdout, check=True)

    def stop(self) -> None:
        """End the hosts with all their processes, and remove the network."""
        for process in self._processes:
            process.kill()
            process.wait()
        for name in HOSTS:
            subprocess.run(["ip", "netns", "del", f"{BRIDGE}-{name}"], capture_output=True)
        subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True)
        subprocess.run(["nft", "delete", "table", "ip", BRIDGE], capture_output=True)
        self._forwarding.write_text(self._forwarded)


def follow_guide(hosts: Hosts, log: Log, arguments: list[str]) -> None:
    """Set up bare hosts, run the grid there, compare its rows with those of one machine, and take all down."""
    grid = shlex.join(["python", "experiments/table1.py", *arguments])
    cluster = "clusters/local.yaml"

    def laptop(command: str) -> None:
        hosts.say("laptop", f"cd ~/flexifed-checkout && {command}", log)

    log.step("each host at the start: no processes but its own, no Ray, no uv, an empty home")
    for name in HOSTS:
        hosts.say(name, "hostname; hostname -I; ps -eo pid,args; command -v ray uv; ls -A ~ /tmp", log, may_fail=True)
        check_isolated(hosts, name)

    log.step("the laptop: a checkout, uv, a key that the hosts accept, a token")
    hosts.copy_checkout("laptop")
    give_key(hosts)
    laptop("python3 -m pip install --quiet --user --break-system-packages --root-user-action=ignore uv")
    laptop("""sed -i '1i export PATH="$HOME/.local/bin:$PATH" PYTHONUNBUFFERED=1' ~/.bashrc""")
    laptop("uv run --quiet ray get-auth-token --generate >/dev/null")
    laptop(
        f"sed -i -e 's/head_ip: [0-9.]*/head_ip: {HOSTS['head']}/' "
        f"-e 's/worker_ips: .*\\]/worker_ips: [{HOSTS['worker-1']}, {HOSTS['worker-2']}]/' "
        f"-e 's/ssh_user: [a-z]*/ssh_user: root/' -e 's/FLEXIFED_DOWNLOAD=yes/FLEXIFED_DOWNLOAD=no/' {cluster}"
    )
    laptop(f"head -16 {cluster}")

    log.step("the grid on one machine, the laptop")
    laptop(f"uv run --quiet {grid} --results-dir ~/one-node")

    log.step("ray up")
    laptop(f"uv run --quiet ray up --yes {PLAIN} {cluster}")

    log.step("the grid as a job on the cluster")
    laptop(f"(uv run --quiet ray dashboard {cluster} >~/tunnel.log 2>&1 &) ; sleep 5; head -1 ~/tunnel.log")
    job = "export RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265 RAY_AUTH_MODE=token; uv run --quiet ray job"
    laptop(f"{job} submit --no-wait --submission-id table1 --working-dir . -- {grid} {ON_ALL_THREE}")
    laptop(f"{job} logs -f table1")
    laptop(f"{job} status table1")
    laptop(f"uv run --quiet ray exec {PLAIN} {cluster} 'ray status'")
    workers_ready = "grep -h 'is ready' /tmp/ray/session_latest/logs/monitor.out || true"
    laptop(f"uv run --quiet ray exec {PLAIN} {cluster} {shlex.quote(workers_ready)}")

    log.step("fetch the results, and compare them with those of one machine")
    laptop(f"mkdir -p ~/three-nodes && uv run --quiet ray rsync-down {PLAIN} {cluster} /shared/results/ ~/three-nodes/")
    laptop("uv run --quiet python clusters/compare_runs.py ~/one-node/table1 ~/three-nodes/table1 | tee ~/compared")
    laptop("! grep -e DIFFERENT -e error ~/compared")
    for name in ("head", "worker-1", "worker-2"):
        laptop(f"grep -c 'in {name}' ~/compared")

    log.step("ray down")
    laptop(f"uv run --quiet ray down --yes {PLAIN} {cluster}")
    seconds = wait_until_ray_is_gone(hosts)
    log.write(f"no process of Ray is left on any host {seconds:.0f} s after `ray down` returned")


def check_isolated(hosts: Hosts, name: str) -> None:
    """Check that a host sees only its own processes, because `ray stop` ends every Ray process that it sees.

    Raises:
        SystemExit: it sees others. Nothing has been started yet.
    """
    seen = hosts.ssh(name, "ps -eo args=").stdout.splitlines()
    own = ("/usr/sbin/sshd", "sshd:", "bash", "ps -eo args=")
    if not seen or (others := [line for line in seen if not line.startswith(own)]):
        raise SystemExit(f"{name} sees processes that are not its own: {others if seen else '`ps` lists none'}")


def give_key(hosts: Hosts) -> None:
    """Make a key on the laptop, and authorise it on the three hosts."""
    hosts.ssh("laptop", "ssh-keygen -q -t ed25519 -N '' -f ~/.ssh/id_ed25519")
    key = hosts.ssh("laptop", "cat ~/.ssh/id_ed25519.pub").stdout.strip()
    for name in ("head", "worker-1", "worker-2"):
        hosts.ssh(name, f"echo {shlex.quote(key)} >>~/.ssh/authorized_keys")


def wait_until_ray_is_gone(hosts: Hosts) -> float:
    """Wait until no host has a Ray process; returns the seconds that it took.

    Raises:
        SystemExit: some host still has one after three minutes.
    """
    started = time.monotonic()
    while True:
        left = {name: hosts.ssh(name, "pgrep -a 'raylet|gcs_server'").stdout for name in HOSTS}
        if not any(left.values()):
            return time.monotonic() - started
        if time.monotonic() - started > RAY_GONE_S:
            raise SystemExit(f"Ray is still running: {left}")
        time.sleep(2)


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


def main() -> None:
    """Install what is needed, start the hosts, follow the guide, and clean up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--uv-cache", type=Path, default=Path("/var/cache/uv"), help="default: %(default)s")
    parser.add_argument("--log", type=Path, help="also write commands and their output to this file")
    parser.add_argument("grid", nargs="*", default=list(SMOKE), help=f"default: {shlex.join(SMOKE)}")
    options = parser.parse_args()
    if os.geteuid():
        raise SystemExit("three_hosts.py creates network namespaces and a bridge: run it as root")
    os.environ["DEBIAN_FRONTEND"] = "noninteractive"
    _run("apt-get", "update", "-qq")
    _run("apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES)
    options.uv_cache.mkdir(parents=True, exist_ok=True)
    base = Path(tempfile.mkdtemp(prefix="flexifed-hosts-", dir="/var/tmp"))
    log = Log(options.log)
    hosts = Hosts(base, options.uv_cache.resolve())
    try:
        hosts.start()
        follow_guide(hosts, log, options.grid)
        log.step("done")
    finally:
        hosts.stop()
        shutil.rmtree(base, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
