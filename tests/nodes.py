"""A Ray cluster of several nodes on this machine, started as a person starts one: each node can be killed or drained.

Every node is a ``ray start`` with an address, a temporary folder, an object store and resources of its own. They share
loopback (``Loopback``), or nothing but a bridge between network namespaces (``Namespaces``, which needs root). The
cluster's token and the environment given to the nodes are in their processes' environment and nowhere else.
"""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.servers import free_port

# Three nodes come up in a quarter of a minute here; several times that on a busy machine.
PATIENCE = 180.0
# The least that Ray takes for an object store, in bytes.
OBJECT_STORE = 80_000_000
# A dead node is known as such after three seconds; by default after some fifteen.
QUICK_DEATH = {
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
# Ray ends idle processes where there are more than CPUs, actors counted; tasks would then import torch again and again.
SMALL_NODE = {"RAY_num_workers_soft_limit": "6"}


class Loopback:
    """All nodes on loopback, each with an address of its own; the dashboard and servers on 127.0.0.1."""

    here = "127.0.0.1"
    dashboard = "127.0.0.1"

    def host(self, number: int) -> str:
        """The address of a node; Ray would replace 127.0.0.1 with that of an interface."""
        return f"127.0.0.{number + 2}"

    def inside(self, number: int, command: list[str]) -> list[str]:
        """The command as it is run on a node."""
        return command


class Namespaces:
    """Every node in a network namespace of its own, which reaches the others and this machine over a bridge alone."""

    def __init__(self) -> None:
        self.name, self.subnet = f"dc{secrets.token_hex(3)}", f"10.{secrets.randbelow(100) + 100}.0"
        self.here, self.dashboard = f"{self.subnet}.1", self.host(0)

    def host(self, number: int) -> str:
        """The address of a node on the bridge."""
        return f"{self.subnet}.{number + 2}"

    def inside(self, number: int, command: list[str]) -> list[str]:
        """The command as it is run on a node, whose namespace is made where it is not there."""
        space, link = f"{self.name}-{number}", f"{self.name}-{number}"
        if not Path("/run/netns", space).exists():
            _ip("netns", "add", space)
            _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("link", "set", link, "master", self.name, "up")
            _ip("-n", space, "address", "add", f"{self.host(number)}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")
            _ip("-n", space, "link", "set", "lo", "up")
        return ["ip", "netns", "exec", space, *command]

    def __enter__(self) -> "Namespaces":
        _ip("link", "add", self.name, "type", "bridge")
        _ip("address", "add", f"{self.here}/24", "dev", self.name)
        _ip("link", "set", self.name, "up")
        return self

    def __exit__(self, *_: object) -> None:
        for space in Path("/run/netns").glob(f"{self.name}-*"):
            _ip("netns", "delete", space.name)
        _ip("link", "delete", self.name)


def missing_namespaces() -> str | None:
    """Why there can be no network namespaces here, None where there can."""
    if shutil.which("ip") is None:
        return "needs `ip` (Debian's iproute2)"
    done = subprocess.run(["unshare", "--net", "true"], capture_output=True, text=True)
    return f"needs network namespaces: {done.stderr.strip()}" if done.returncode else None


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


@dataclass
class Node:
    """One node: what it was started with, and its processes."""

    number: int
    host: str
    options: list[str]
    environment: dict[str, str]
    process: subprocess.Popen[bytes]

    def processes(self) -> list[psutil.Process]:
        """All processes of the node, jobs and workers too; none once it is gone."""
        try:
            started = psutil.Process(self.process.pid)
            return [started, *started.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def kill(self) -> None:
        """SIGKILLs every process of the node at once."""
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def memory(self) -> int:
        """Bytes of memory that the node's processes have, what they share counted by each."""
        return sum(process.memory_info().rss for process in self.processes())


@dataclass
class Cluster:
    """A head without CPUs, and the nodes that were added. ``access`` is what a client needs in its environment."""

    folder: Path
    network: Loopback | Namespaces
    environment: dict[str, str]
    nodes: dict[str, Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.port, self.dashboard_port, self.client_port = free_port(), free_port(), free_port()
        self.url = f"http://{self.network.dashboard}:{self.dashboard_port}"
        self.address = f"{self.network.host(0)}:{self.port}"

    def start(self) -> None:
        """Starts the head."""
        head = [
            "--head",
            f"--port={self.port}",
            f"--dashboard-host={self.network.dashboard}",
            f"--dashboard-port={self.dashboard_port}",
            f"--ray-client-server-port={self.client_port}",
            "--num-cpus=0",
        ]
        self.nodes["head"] = self._node(0, head, {})
        self._wait("the head", lambda: self._alive("head"))

    def add(self, *names: str, cpus: float = 1, resource: float = 1, **environment: str) -> None:
        """Starts nodes of these names, ``POOL`` or ``POOL-ANYTHING``, and waits until they have joined.

        Each has its pool as a label (``pool: POOL``) and as a custom resource (``POOL``).
        """
        for name in names:
            pool = name.partition("-")[0]
            options = [
                f"--address={self.address}",
                f"--num-cpus={cpus:g}",
                f"--labels=pool={pool}",
                f"--resources={json.dumps({pool: resource})}",
            ]
            self.nodes[name] = self._node(max(n.number for n in self.nodes.values()) + 1, options, environment)
        self._wait(f"the nodes {', '.join(names)}", lambda: self._alive(*names))

    def kill(self, name: str) -> None:
        """Takes the node away without a word, with all that runs on it."""
        self.nodes[name].kill()

    def drain(self, name: str, seconds: float) -> None:
        """Tells the cluster that the node will be taken away so soon, as a cloud does of a spot machine."""
        command = ["ray", "drain-node", f"--address={self.address}", f"--node-id={self.id(name)}"]
        reason = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot"]
        deadline = f"--deadline-remaining-seconds={seconds:.0f}"
        done = subprocess.run(
            self.network.inside(0, [*command, *reason, deadline]),
            env=self.nodes["head"].environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def restart(self) -> None:
        """Takes the whole cluster away and starts the same one again, which knows nothing of the first."""
        others = {name: node for name, node in self.nodes.items() if name != "head"}
        self.stop()
        self.start()
        for name, node in others.items():
            self.nodes[name] = self._node(node.number, node.options, node.environment)
        self._wait("the nodes", lambda: self._alive(*self.nodes))

    def stop(self) -> None:
        """Ends every node."""
        for node in self.nodes.values():
            node.kill()

    def get(self, path: str) -> Any:
        """What the dashboard answers."""
        request = urllib.request.Request(
            f"{self.url}{path}", headers={"Authorization": f"Bearer {self.access['RAY_AUTH_TOKEN']}"}
        )
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return json.load(answer)

    def state(self, kind: str) -> list[dict[str, Any]]:
        """What Ray knows of all its ``nodes``, ``actors`` or ``tasks``, of the dead ones too."""
        answer = self.get(f"/api/v0/{kind}?detail=1&limit=10000")
        found: list[dict[str, Any]] = answer["data"]["result"]["result"]
        return found

    def id(self, name: str) -> str:
        """Ray's id of the node."""
        (found,) = (n["node_id"] for n in self.state("nodes") if n["node_ip"] == self.nodes[name].host)
        return str(found)

    def pools(self) -> dict[str, str]:
        """The pool of every node by Ray's id; the head's is ``head``."""
        return {n["node_id"]: n["labels"].get("pool", "head") for n in self.state("nodes")}

    def placed(self) -> set[tuple[str, str]]:
        """The classes of all actors so far with the pools of the nodes that they were placed on."""
        pools = self.pools()
        return {(a["class_name"], pools[a["node_id"]]) for a in self.state("actors") if a["node_id"]}

    def _alive(self, *names: str) -> bool:
        try:
            alive = {node["node_ip"] for node in self.state("nodes") if node["state"] == "ALIVE"}
        except OSError:
            return False
        return alive >= {self.nodes[name].host for name in names}

    def _wait(self, what: str, true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not true():
            gone = [name for name, node in self.nodes.items() if node.process.poll() not in (None, -9)]
            assert not gone, f"{gone} ended: {self.said(gone[0])}"
            assert time.monotonic() < deadline, f"waited in vain for {what}"
            time.sleep(0.1)

    def said(self, name: str) -> str:
        """What the node's ``ray start`` printed."""
        return (self.folder / f"{self.nodes[name].number}.txt").read_text()

    def _node(self, number: int, options: list[str], environment: dict[str, str]) -> Node:
        own = [
            # nodes that start at once in one folder give their sockets the same names
            f"--temp-dir={self.folder / str(number)}",
            f"--node-ip-address={self.network.host(number)}",
            # every agent listens on 127.0.0.1 too, and one whose port is taken there takes no jobs
            f"--dashboard-agent-listen-port={free_port()}",
            f"--object-store-memory={OBJECT_STORE}",
        ]
        command = ["ray", "start", "--block", *own, *options]
        known = {
            **surroundings(),
            "RAY_USAGE_STATS_ENABLED": "0",
            **SMALL_NODE,
            **QUICK_DEATH,
            **self.access,
            **self.environment,
            **environment,
        }
        with (self.folder / f"{number}.txt").open("ab") as output:
            process = subprocess.Popen(
                self.network.inside(number, command), env=known, stdout=output, stderr=subprocess.STDOUT
            )
        return Node(number, self.network.host(number), options, known, process)


def surroundings() -> dict[str, str]:
    """This process's environment, with this Python's programs first, and nothing of Ray's, S3's or the sources'."""
    foreign = ("RAY_", "AWS_", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return {**kept, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"}


@contextmanager
def cluster(
    *names: str, environment: dict[str, str], network: Loopback | Namespaces | None = None, cpus: float = 1
) -> Iterator[Cluster]:
    """A head and the named nodes (see ``Cluster.add``) with such an environment; nothing of them is left afterwards."""
    # the paths of Ray's sockets must be short
    with tempfile.TemporaryDirectory(prefix="nodes-", dir="/tmp") as folder:
        made = Cluster(Path(folder), network or Loopback(), environment)
        try:
            made.start()
            made.add(*names, cpus=cpus)
            yield made
        finally:
            made.stop()
