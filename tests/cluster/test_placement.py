import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import placement
from cluster.placement import GIB, check_fits, check_reach, matches, selector_of, worker_options
from cluster.session import LOCAL
from schemas.errors import ConfigInvalid
from schemas.placement import Placement, WorkerPlacement

HEAD = {"resources": {"CPU": 1.0}, "labels": {}}
TEACHER = {
    "resources": {"CPU": 8.0, "GPU": 4.0, "memory": 64.0 * GIB, "accelerator_type:A100": 1.0, "teacher": 4.0},
    "labels": {"pool": "teacher", "ray.io/market-type": "spot"},
}
STUDENT = {"resources": {"CPU": 8.0, "GPU": 8.0}, "labels": {"pool": "student", "ray.io/market-type": "on-demand"}}


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a stub in Ray's place that knows these nodes."""

    def put(*known: dict[str, Any]) -> None:
        found = [
            {"Alive": True, "NodeManagerAddress": f"10.0.0.{i}", "Resources": n["resources"], "Labels": n["labels"]}
            for i, n in enumerate(known)
        ]
        gone = {**found[0], "Alive": False, "Resources": {"CPU": 999.0, "GPU": 999.0}}
        monkeypatch.setattr(os, "environ", dict(os.environ))
        monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(nodes=lambda: [*found, gone]))

    return put


def placed(**cache: Any) -> Placement:
    return Placement.model_validate({"cache": cache})


def test_a_workers_options_are_what_ray_calls_them(nodes: Callable[..., None]) -> None:
    nodes(HEAD, TEACHER)
    whole = WorkerPlacement(
        cpus_per_worker=2,
        gpus_per_worker=1,
        memory_per_worker=1.5,
        accelerator_type="A100",
        resources={"teacher": 1},
        labels={"pool": "teacher"},
        spot=False,
    )
    assert worker_options(whole) == {
        "num_cpus": 2.0,
        "num_gpus": 1.0,
        "memory": 3 * 2**29,
        "accelerator_type": "A100",
        "resources": {"teacher": 1.0},
        "label_selector": {"pool": "teacher", "ray.io/market-type": "!spot"},
    }
    assert worker_options(WorkerPlacement()) == {"num_cpus": 1.0}
    assert selector_of({"pool": "cpu"}) == {"label_selector": {"pool": "cpu"}}
    assert selector_of({}) == {}


def test_the_one_node_of_a_local_session_is_every_pool(nodes: Callable[..., None]) -> None:
    nodes({"resources": {"CPU": 2.0}, "labels": {LOCAL: "local"}})
    pools: dict[str, Any] = {"labels": {"pool": "teacher"}, "resources": {"teacher": 1}, "spot": False}
    assert worker_options(WorkerPlacement(**pools)) == {"num_cpus": 1.0}
    assert selector_of({"pool": "cpu"}) == {}
    check_fits(placed(workers=2, **pools), "cache")
    with pytest.raises(ConfigInvalid, match="3 workers of 1 CPU do not fit: this cluster has room for 2 of them"):
        check_fits(placed(workers=3, **pools), "cache")


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ({"workers": 5, "gpus_per_worker": 1, "labels": {"pool": "teacher"}}, "room for 4 of them"),
        (
            {"workers": 13, "gpus_per_worker": 1},
            "13 workers of 1 CPU, 1 GPU and 0.25 CPU beside them do not fit: .* room for 12",
        ),
        ({"gpus_per_worker": 9}, "room for 0"),
        ({"accelerator_type": "H100"}, "1 workers of 1 CPU, H100 and"),
        ({"accelerator_type": "A100", "spot": False}, "on nodes with ray.io/market-type: !spot"),
        ({"labels": {"pool": "in(cpu, other)"}}, r"on nodes with pool: in\(cpu, other\)"),
        ({"resources": {"teacher": 5}}, "1 CPU, 5 teacher and"),
        ({"memory_per_worker": 100}, "1 CPU, 100.0 GiB and"),
        ({"workers": 17}, "and 0.25 CPU beside them do not fit: this cluster has room for 17 of them"),
    ],
)
def test_what_the_cluster_can_never_hold_is_refused_with_what_is_asked_and_what_there_is(
    nodes: Callable[..., None], place: dict[str, Any], says: str
) -> None:
    nodes(HEAD, TEACHER, STUDENT)
    with pytest.raises(ConfigInvalid, match=says) as refusal:
        check_fits(placed(**place), "cache", spare_cpus=0.25)
    assert "10.0.0.1: 8 CPU, 4 GPU, 64.0 GiB, 4 teacher, A100; pool: teacher" in str(refusal.value)
    check_fits(placed(**place).model_copy(update={"autoscales": True}), "cache", spare_cpus=0.25)


def test_what_fits_is_not_refused(nodes: Callable[..., None]) -> None:
    nodes(HEAD, TEACHER, STUDENT)
    check_fits(placed(workers=12, gpus_per_worker=1), "cache", spare_cpus=0.25)
    check_fits(placed(workers=4, resources={"teacher": 1}, labels={"pool": "teacher"}), "cache")
    check_fits(placed(workers=8, gpus_per_worker=1, spot=False), "cache")
    # a fraction of a GPU is not divided over two
    check_fits(placed(workers=12, cpus_per_worker=0.5, gpus_per_worker=0.6), "cache")
    with pytest.raises(ConfigInvalid):
        check_fits(placed(workers=9, gpus_per_worker=1, spot=False), "cache")


def test_an_elastic_group_needs_room_for_its_smallest_only(nodes: Callable[..., None]) -> None:
    nodes(HEAD, STUDENT)
    check_fits(Placement.model_validate({"distill": {"workers": 16, "min_workers": 9}}), "distill")
    with pytest.raises(ConfigInvalid, match=r"placement\.distill: 10 workers"):
        check_fits(Placement.model_validate({"distill": {"workers": 16, "min_workers": 10}}), "distill")


def test_a_store_that_is_a_folder_of_one_node_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[str] = []

    def looked_for(wanted: dict[str, str]) -> dict[str, tuple[str, list[str]]]:
        assert placement._missing(wanted) == ["prepare.data"]  # what this node says
        seen.append(wanted["store"])
        return {"store": (str(tmp_path), ["10.0.0.1", "10.0.0.2"]), "prepare.data": ("/nowhere", ["10.0.0.0"])}

    monkeypatch.setattr(placement, "_looked_for", looked_for)
    with pytest.raises(ConfigInvalid) as refusal:
        check_reach(str(tmp_path / "store"), {"prepare.data": "/nowhere", "teacher.path": str(tmp_path)})
    assert f"store: {tmp_path}: not seen by 10.0.0.1, 10.0.0.2" in str(refusal.value)
    assert "prepare.data: /nowhere: not seen by 10.0.0.0" in str(refusal.value)
    assert not Path(seen[0]).exists()
    check_reach(None, {})


@pytest.mark.parametrize(
    ("selector", "labels", "expected"),
    [
        ("a", {"pool": "a"}, True),
        ("a", {"pool": "b"}, False),
        ("a", {}, False),
        ("!a", {"pool": "a"}, False),
        ("!a", {"pool": "b"}, True),
        ("!a", {}, True),
        ("in(a, b)", {"pool": "b"}, True),
        ("in(a,b)", {"pool": "c"}, False),
        ("!in(a, b)", {"pool": "b"}, False),
        ("!in(a, b)", {}, True),
    ],
)
def test_selectors_mean_what_they_mean_to_ray(selector: str, labels: dict[str, str], expected: bool) -> None:
    assert matches(labels, {"pool": selector}) == expected
