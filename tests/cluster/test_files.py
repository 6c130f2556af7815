"""The cluster files are what Ray, KubeRay and the shipped run file need them to be; nothing here starts any of them."""

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import ray
from jsonschema import ValidationError, validate
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.cluster.manifests import (
    AWS,
    DOCKERFILE,
    KUBERAY,
    MANIFESTS,
    RUN,
    amount,
    cluster_of,
    load,
    pinned,
    pods,
    secrets_in,
    validator,
    walk,
)

DOCS = Path("docs/cluster-files.md")
PLACEHOLDER = re.compile(r"YOUR-[A-Z]+(?:-[A-Z]+)*")
SCHEMA = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
STAGES = ("prepare", "cache", "distill", "evaluate")
GIB = 2**30
# What the decoders of ``cache`` ask for.
DECODER = {"CPU": 0.25}


def changed(document: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with the value at a path set; None takes the key away."""
    copy = deepcopy(document)
    *before, last = [int(key) if key.isdigit() else key for key in path.split("/")]
    inner: Any = copy
    for key in before:
        inner = inner[key]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return copy


def check_aws(document: dict[str, Any]) -> dict[str, Any]:
    validate(document, json.loads(SCHEMA.read_text()))
    prepared: dict[str, Any] = prepare_config(deepcopy(document))
    validate_config(prepared)
    return prepared


def node_types(path: Path) -> dict[str, dict[str, Any]]:
    """The kinds of nodes in Ray's own words: labels, resources and how many there may be."""
    if path == AWS:
        found: dict[str, Any] = check_aws(load(AWS))
    else:
        cluster = {"metadata": {"name": "decant", "namespace": "default"}, "spec": cluster_of(load(path))}
        found = _derive_autoscaling_config_from_ray_cr(cluster)
    types: dict[str, dict[str, Any]] = found["available_node_types"]
    return types


def test_ray_up_takes_the_aws_file() -> None:
    assert check_aws(load(AWS))["setup_commands"] == []  # those of Ray's defaults would install another Ray


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("max_worker", 3),
        ("cluster_name", None),
        ("max_workers", -1),
        ("auth/ssh_usr", "ubuntu"),
        ("docker/images", "x"),
        ("head_node_type", "heads"),
        ("available_node_types/teacher/max_worker", 3),
        ("available_node_types/teacher/node_config", None),
        ("available_node_types/teacher/labels/pool", 1),
        ("available_node_types/teacher/resources/teacher", 0.5),
        ("available_node_types/student/min_workers", 99),
        ("docker/container_name", ""),
    ],
)
def test_ray_up_refuses_a_slip_in_the_aws_file(path: str, value: Any) -> None:
    with pytest.raises((ValidationError, ValueError, AssertionError)):
        check_aws(changed(load(AWS), path, value))


@pytest.mark.parametrize("kind", KUBERAY)
def test_kuberay_knows_every_field_of_its_manifest(kind: str) -> None:
    assert load(KUBERAY[kind])["kind"] == kind
    errors = [f"{e.json_path}: {e.message}" for e in validator(kind).iter_errors(load(KUBERAY[kind]))]
    assert not errors


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("RayCluster", "spec/enableInTreeAutoscalling", True),
        ("RayCluster", "spec/autoscalerOptions/version", "v3"),
        ("RayCluster", "spec/authOptions/mode", "tokens"),
        ("RayCluster", "spec/gcsFaultToleranceOptions/redisPassword", "in the clear"),
        ("RayCluster", "spec/headGroupSpec/rayStartParams/num-cpus", 0),
        ("RayCluster", "spec/headGroupSpec/template", None),
        ("RayCluster", "spec/workerGroupSpecs/1/maxReplica", 3),
        ("RayCluster", "spec/workerGroupSpecs/1/resources/teacher", 1),
        ("RayCluster", "spec/workerGroupSpecs/1/template/spec/toleration", []),
        ("RayCluster", "spec/workerGroupSpecs/1/template/spec/containers/0/resources/limit", {}),
        ("RayCluster", "spec/workerGroupSpecs/1/template/spec/volumes/0/emptyDir/sizelimit", "1Gi"),
        ("RayCluster", "spec/workerGroupSpecs/1/template/spec/volumes/0/emptyDir/sizeLimit", "1 GiB"),
        ("RayJob", "spec/entryPoint", "decant"),
        ("RayJob", "spec/backoffLimit", "2"),
        ("RayJob", "spec/submitterConfig/backofLimit", 2),
        ("RayJob", "spec/rayClusterSpec/workerGroupSpecs/2/groupName", None),
    ],
)
def test_kuberay_refuses_a_slip_in_its_manifest(kind: str, path: str, value: Any) -> None:
    assert not validator(kind).is_valid(changed(load(KUBERAY[kind]), path, value))


def test_the_jobs_cluster_is_the_one_that_stays() -> None:
    stays, job = load(KUBERAY["RayCluster"])["spec"], load(KUBERAY["RayJob"])["spec"]["rayClusterSpec"]
    del stays["gcsFaultToleranceOptions"]
    head = job["headGroupSpec"]["template"]["spec"]
    for things in (head["volumes"], head["containers"][0]["volumeMounts"]):
        assert things.pop()["name"] == "run"
    assert stays == job


def test_the_job_runs_stages_from_the_mounted_run_file() -> None:
    spec = load(KUBERAY["RayJob"])["spec"]
    head = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    mount = next(m["mountPath"] for m in head["containers"][0]["volumeMounts"] if m["name"] == "run")
    run_file = re.fullmatch(r"decant run (\S+)/run.yaml --stages ([\w,]+) --on auto", spec["entrypoint"])
    assert run_file
    assert run_file.groups() == (mount, ",".join(STAGES))
    assert spec["shutdownAfterJobFinishes"] is True  # without it `ttlSecondsAfterFinished` is refused


@pytest.mark.parametrize("path", MANIFESTS, ids=str)
def test_rays_version_is_the_pinned_one(path: Path) -> None:
    text, version = path.read_text(), pinned("ray")
    assert version == ray.__version__
    tags = re.findall(r"decant:ray([\d.]+)-(\w+)", text)
    assert {tag for tag, _ in tags} == {version}
    assert {role for _, role in tags} == {"cpu", "gpu"}
    assert all(value == version for keys, value in walk(load(path)) if keys and keys[-1] == "rayVersion")


def asked() -> list[tuple[str, int, dict[str, float], dict[str, str]]]:
    """What the run file asks for: of whom, how many, resources of each, labels of its nodes."""
    placement, wanted = load(RUN)["placement"], []
    for stage in STAGES:
        place = placement[stage]
        need = {
            "CPU": place.get("cpus_per_worker", 1),
            "GPU": place.get("gpus_per_worker", 0),
            "memory": place["memory_per_worker"] * GIB,
            **place.get("resources", {}),
        }
        wanted.append((stage, place.get("workers", 1), need, place["labels"]))
    cache = placement["cache"]
    return [*wanted, ("cache's decoders", cache["decoders"], DECODER, cache["decoder_labels"])]


@pytest.mark.parametrize("path", MANIFESTS, ids=str)
@pytest.mark.parametrize("wanted", asked(), ids=lambda wanted: wanted[0])
def test_a_pool_has_room_for_what_the_run_file_places_there(path: Path, wanted: Any) -> None:
    _, workers, need, labels = wanted
    (pool,) = [t for t in node_types(path).values() if labels.items() <= t.get("labels", {}).items()]
    of_one_node = min(int(pool["resources"].get(name, 0) // much) for name, much in need.items() if much)
    assert of_one_node * pool["max_workers"] >= workers
    assert pool["min_workers"] == 0, "nothing is paid for while nothing runs"


@pytest.mark.parametrize("path", MANIFESTS, ids=str)
def test_teachers_and_students_share_no_node_and_students_keep_theirs(path: Path) -> None:
    types, place = node_types(path), load(RUN)["placement"]
    pools = {name: t["labels"]["pool"] for name, t in types.items() if t.get("labels")}
    assert sorted(pools.values()) == ["cpu", "student", "teacher"]
    for name, pool in pools.items():
        own = {n: a for n, a in types[name]["resources"].items() if n not in ("CPU", "GPU", "memory")}
        assert own == ({} if pool == "cpu" else {pool: types[name]["resources"]["GPU"]})
    spot = {types[name]["labels"]["pool"] for name in pools if types[name]["labels"]["ray.io/market-type"] == "spot"}
    assert spot == {"teacher"}
    assert place["distill"]["spot"] is False
    assert [t["resources"]["CPU"] for n, t in types.items() if n not in pools] == [0], "the head runs no task"


def test_aws_pools_are_of_the_markets_that_their_labels_say() -> None:
    aws = load(AWS)
    pools = [t for t in aws["available_node_types"].values() if "labels" in t]
    for pool in pools:
        bought = pool["node_config"].get("InstanceMarketOptions", {}).get("MarketType", "on-demand")
        assert pool["labels"]["ray.io/market-type"] == bought
    assert aws["max_workers"] == sum(pool["max_workers"] for pool in pools)


@pytest.mark.parametrize("kind", KUBERAY)
def test_memory_of_a_pod_holds_its_object_store_and_its_workers(kind: str) -> None:
    spec = cluster_of(load(KUBERAY[kind]))
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
        (shm,) = [v["emptyDir"] for v in pod["volumes"] if v["name"] == mounts["/dev/shm"]]
        assert shm["medium"] == "Memory"
        store, limits = int(group["rayStartParams"]["object-store-memory"]), container["resources"]["limits"]
        workers = amount(group.get("resources", {}).get("memory", "0"))
        assert store < amount(shm["sizeLimit"])
        assert amount(shm["sizeLimit"]) + workers < amount(limits["memory"])
        assert container["resources"]["requests"] == limits, "what a pod was promised is not taken back"


@pytest.mark.parametrize("kind", KUBERAY)
def test_pods_run_without_privileges(kind: str) -> None:
    for name, pod in pods(load(KUBERAY[kind])):
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        # the head's autoscaler alone talks to Kubernetes
        assert name == "head" or pod["automountServiceAccountToken"] is False, name
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False, name
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, name


@pytest.mark.parametrize("path", [*MANIFESTS, RUN], ids=str)
def test_no_file_holds_a_secret(path: Path) -> None:
    assert not secrets_in(load(path))


@pytest.mark.parametrize(
    "planted",
    [
        {"redisPassword": {"value": "x"}},
        {"redisPassword": {"valueFrom": {"secretKeyRef": {"name": "a", "key": "b", "value": "x"}}}},
        {"env": [{"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}]},
        {"rayStartParams": {"redis-password": "x"}},
        {"run_options": ["--env RAY_AUTH_TOKEN=x"]},
        {"store": {"profile": "AKIA0123456789ABCDEF"}},
    ],
)
def test_a_planted_secret_would_be_found(planted: dict[str, Any]) -> None:
    assert secrets_in(planted)


@pytest.mark.parametrize("kind", KUBERAY)
def test_kuberay_authenticates_and_opens_nothing_to_the_outside(kind: str) -> None:
    document = load(KUBERAY[kind])
    spec = cluster_of(document)
    assert spec["authOptions"]["mode"] == "token"
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert spec["headGroupSpec"]["enableIngress"] is False
    opens = {"hostPort", "hostNetwork", "ingressOptions", "headService", "nodePort", "loadBalancerIP"}
    assert not [keys for keys, _ in walk(document) if keys and keys[-1] in opens]


def test_aws_authenticates_and_opens_nothing_to_the_outside() -> None:
    aws = check_aws(load(AWS))
    assert "--env RAY_AUTH_MODE=token" in aws["docker"]["run_options"]
    assert "~/.ray/auth_token" in aws["file_mounts"]
    start = " ".join(aws["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start
    assert "0.0.0.0" not in start
    assert aws["provider"]["use_internal_ips"] is True
    assert "security_group" not in aws["provider"], "Ray would open ssh to the world"
    for node in aws["available_node_types"].values():
        assert {"SecurityGroupIds", "SubnetIds"} <= node["node_config"].keys()
        assert node["node_config"]["IamInstanceProfile"].keys() == {"Name"}
        assert node["node_config"]["MetadataOptions"]["HttpTokens"] == "required"


def test_every_name_to_fill_in_is_in_the_docs() -> None:
    files = [*MANIFESTS, RUN, DOCKERFILE]
    used = set(PLACEHOLDER.findall("\n".join(path.read_text() for path in files)))
    assert used == set(re.findall(rf"^\| `({PLACEHOLDER.pattern})` \|", DOCS.read_text(), re.MULTILINE))


@pytest.mark.parametrize("kind", KUBERAY)
def test_every_object_that_a_manifest_refers_to_is_in_the_docs(kind: str) -> None:
    keys = {"secretRef": "name", "secretKeyRef": "name", "configMap": "name", "persistentVolumeClaim": "claimName"}
    found = [value[keys[k[-1]]] for k, value in walk(load(KUBERAY[kind])) if k and k[-1] in keys]
    assert len(found) > 3
    assert all(f"`{name}`" in DOCS.read_text() for name in {*found, "decant-ray-token"})
