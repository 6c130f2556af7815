"""What a stage's workers ask of Ray, and whether the cluster's nodes can ever give it; checked before any work."""

import math
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.session import LOCAL
from schemas.errors import ConfigInvalid
from schemas.placement import Placement, WorkerPlacement

# How Ray names the resource of a kind of accelerator, of which a worker takes next to nothing.
ACCELERATOR = "accelerator_type:"
GIB = 2**30
# Ray counts resources in ten thousandths.
SMALLEST = 1e-4
# Seconds for a node to start a worker with the run's code and look; a busy node takes half a minute.
LOOK = 120.0
Node = dict[str, Any]


def worker_options(place: WorkerPlacement) -> dict[str, Any]:
    """What one worker asks for, by the names that ``ray.remote`` and Ray Data's ``map_batches`` have for it."""
    options: dict[str, Any] = {
        "num_cpus": place.cpus_per_worker,
        "num_gpus": place.gpus_per_worker or None,
        "memory": round(place.memory_per_worker * GIB) if place.memory_per_worker else None,
        "accelerator_type": place.accelerator_type,
        **({} if is_local() else {"resources": place.resources or None, "label_selector": place.selector or None}),
    }
    return {name: value for name, value in options.items() if value is not None}


def selector_of(labels: Mapping[str, str]) -> dict[str, Any]:
    """The option by which a task of Ray Data runs on nodes with such labels; none where there is but one node."""
    return {} if is_local() or not labels else {"label_selector": dict(labels)}


def is_local() -> bool:
    """Whether the session is one of ours on this machine, whose single node is every pool."""
    return any(LOCAL in node.get("Labels", {}) for node in _nodes())


def here() -> Any:
    """The scheduling strategy of an actor that must not outlive, nor be outlived by, this very node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def check_fits(placement: Placement, stage: str, *, spare_cpus: float = 0.0) -> None:
    """Raises ConfigInvalid where the running cluster can never hold the stage's workers.

    ``spare_cpus`` is what the stage needs beside its workers. Of a cluster that adds nodes by itself anything may come.
    """
    place: WorkerPlacement = getattr(placement, stage)
    workers = getattr(place, "min_workers", None) or place.workers
    if not placement.autoscales:
        check_room(place, workers, f"placement.{stage}", spare_cpus)


def check_room(place: WorkerPlacement, workers: int, setting: str, spare_cpus: float = 0.0) -> None:
    """Raises ConfigInvalid where the cluster's nodes can never hold so many workers, which ``setting`` asks for."""
    need, selector = _need(place), {} if is_local() else place.selector
    nodes = [node for node in _nodes() if matches(node.get("Labels", {}), selector)]
    room = sum(_room(node["Resources"], need) for node in nodes)
    cpus = sum(node["Resources"].get("CPU", 0.0) for node in _nodes())
    wanted = workers * place.cpus_per_worker + spare_cpus
    if room < workers or wanted > cpus + SMALLEST:
        beside = f" and {spare_cpus:g} CPU beside them" if spare_cpus else ""
        raise ConfigInvalid(
            f"{setting}: {workers} workers of {_spelt(need)}{_where(selector)}{beside} do not fit: "
            f"this cluster has room for {room} of them. Its nodes:\n  "
            + "\n  ".join(_described(node) for node in _nodes())
            + "\nask for fewer workers or less per worker, or, if the cluster adds nodes when asked, set "
            "placement.autoscales: true"
        )


def matches(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Whether a node's labels are such as Ray's label selector asks for; a missing label is unlike any value."""
    for name, text in selector.items():
        wanted, values = not text.startswith("!"), text.removeprefix("!")
        if values.startswith("in("):
            values = values.removeprefix("in(").removesuffix(")")
        if (labels.get(name) in [value.strip() for value in values.split(",")]) != wanted:
            return False
    return True


def check_reach(store: str | None, paths: Mapping[str, str]) -> None:
    """Raises ConfigInvalid where a node does not see the folder of the store, or a path; both by their settings.

    Without it every node would write to a disk of its own.
    """
    wanted, marker = dict(paths), None
    if store is not None:
        marker = Path(store) / f".tmp-{uuid.uuid4().hex}"
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
        wanted["store"] = str(marker)
    try:
        blind = _looked_for(wanted) if wanted else {}
    finally:
        if marker:
            marker.unlink()
    if blind:
        lines = [f"{setting}: {shown}: not seen by {', '.join(who)}" for setting, (shown, who) in blind.items()]
        raise ConfigInvalid(
            "these are not on every node of the cluster; use URLs, or a folder that all nodes share:\n  "
            + "\n  ".join(lines)
        )


def _looked_for(wanted: Mapping[str, str]) -> dict[str, tuple[str, list[str]]]:
    """Settings whose path some nodes do not see: the path, and the nodes' addresses."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look = ray.remote(num_cpus=0)(_missing)
    asked = {
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            wanted
        ): node
        for node in _nodes()
    }
    found: dict[str, tuple[str, list[str]]] = {}
    for answer, node in asked.items():
        for setting in ray.get(answer, timeout=LOOK):
            shown = str(Path(wanted[setting]).parent) if setting == "store" else wanted[setting]
            found.setdefault(setting, (shown, []))[1].append(node["NodeManagerAddress"])
    return found


def _missing(wanted: Mapping[str, str]) -> list[str]:
    """Task: the settings whose path is not on this node."""
    return [setting for setting, path in wanted.items() if not Path(path).exists()]


def _need(place: WorkerPlacement) -> dict[str, float]:
    need = {"CPU": place.cpus_per_worker, "GPU": place.gpus_per_worker}
    if place.memory_per_worker:
        need["memory"] = place.memory_per_worker * GIB
    if place.accelerator_type:
        need[f"{ACCELERATOR}{place.accelerator_type}"] = SMALLEST
    return {name: amount for name, amount in {**need, **({} if is_local() else place.resources)}.items() if amount}


def _room(has: Mapping[str, float], need: Mapping[str, float]) -> int:
    """How many workers a node holds when nothing else runs on it."""
    return min(math.floor(has.get(name, 0.0) / amount + SMALLEST) for name, amount in need.items())


def _nodes() -> list[Node]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def _where(selector: Mapping[str, str]) -> str:
    return " on nodes with " + ", ".join(f"{k}: {v}" for k, v in selector.items()) if selector else ""


def _spelt(amounts: Mapping[str, float]) -> str:
    kinds = [name.removeprefix(ACCELERATOR) for name in amounts if name.startswith(ACCELERATOR)]
    shown = [f"{a / GIB:.1f} GiB" if n == "memory" else f"{a:g} {n}" for n, a in amounts.items() if ":" not in n]
    return ", ".join([*shown, *kinds])


def _described(node: Node) -> str:
    amounts = {n: a for n, a in node["Resources"].items() if n != "object_store_memory" and not n.startswith("node:")}
    own = {n: v for n, v in node.get("Labels", {}).items() if n not in ("ray.io/node-id", LOCAL)}
    labels = "; " + ", ".join(f"{n}: {v}" for n, v in sorted(own.items())) if own else ""
    return f"{node['NodeManagerAddress']}: {_spelt(amounts)}{labels}"
