"""The cluster files as data, and the KubeRay operator's schemas made strict."""

import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

AWS = Path("cluster/aws.yaml")
DOCKERFILE = Path("cluster/Dockerfile")
KUBERAY = {"RayCluster": Path("cluster/kuberay/raycluster.yaml"), "RayJob": Path("cluster/kuberay/rayjob.yaml")}
RUN = Path("jobs/configs/cluster.yaml")
MANIFESTS = [AWS, *KUBERAY.values()]
# The files of KubeRay's release with its custom resource definitions.
CRDS = Path(os.environ.get("KUBERAY_CRDS", "../shared/reference/kuberay"))
# What sounds like a secret; keys that do and are none; what a reference to one consists of; an AWS key or account.
SECRET = re.compile(r"password|token|secret|access_?key|credential", re.IGNORECASE)
NO_SECRETS = ("secretName", "automountServiceAccountToken", "HttpTokens", "~/.ray/auth_token")
REFERENCE = ("name", "key", "optional")
KEY = re.compile(r"AKIA[0-9A-Z]{16}|\b\d{12}\b|(?:PASSWORD|TOKEN|SECRET\w*|ACCESS_KEY\w*)=", re.IGNORECASE)
UNITS = {"": 1, "m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def load(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text())
    return found


def pinned(package: str) -> str:
    """The version of a package in the constraints file."""
    found = re.search(rf"^{package}==(.+)$", Path("constraints.txt").read_text(), re.MULTILINE)
    assert found
    return found[1]


def amount(quantity: str) -> float:
    """A Kubernetes quantity (``500m``, ``12Gi``) as a number."""
    found = re.fullmatch(r"([\d.]+)(\D*)", quantity)
    assert found
    return float(found[1]) * UNITS[found[2]]


def walk(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Every value of a document with the keys that lead to it."""
    yield path, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from walk(inner, (*path, key))


@cache
def validator(kind: str) -> Draft202012Validator:
    """Refuses what the API server would, and the unknown fields that it would drop without a word."""
    path = CRDS / f"ray.io_{kind.lower()}s.yaml"
    if not path.exists():
        pytest.skip(f"{path}: KubeRay's definitions are not here; KUBERAY_CRDS names their folder")
    versions = yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]["versions"]
    schema = next(v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == "v1")
    # of an object's metadata the API server has its own schema
    names = {name: {} for name in ("name", "namespace", "labels")}
    schema["properties"]["metadata"] = {"type": "object", "properties": names}
    return Draft202012Validator(strict(schema))


def strict(schema: Any) -> Any:
    """OpenAPI's subset of Kubernetes as a JSON Schema in which fields that are not declared are refused."""
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"], **({"pattern": p} if (p := schema.get("pattern")) else {})}
    made = {key: strict(value) for key, value in schema.items() if key not in ("properties", "required")}
    if "required" in schema:
        made["required"] = schema["required"]
    if "properties" in schema:
        made["properties"] = {name: strict(inner) for name, inner in schema["properties"].items()}
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if schema.get("type") == "object" and not open_ended:
        made["additionalProperties"] = False
    return made


def secrets_in(document: Any) -> list[tuple[str | int, ...]]:
    """Where a document has a secret itself rather than the name of what holds it."""
    found = []
    for keys, value in walk(document):
        if isinstance(value, dict) and "value" in value and SECRET.search(str(value.get("name"))):
            found.append(keys)
        named = keys and isinstance(keys[-1], str) and SECRET.search(keys[-1]) and keys[-1] not in NO_SECRETS
        if named and any(
            k and k[-1] not in REFERENCE for k, v in walk(value, keys[-1:]) if not isinstance(v, dict | list)
        ):
            found.append(keys)
        if isinstance(value, str) and KEY.search(value):
            found.append(keys)
    return found


def cluster_of(document: dict[str, Any]) -> dict[str, Any]:
    """The cluster's ``spec`` in a RayCluster or RayJob."""
    spec: dict[str, Any] = document["spec"]
    return spec.get("rayClusterSpec", spec)


def pods(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod's name and ``spec`` in a RayCluster or RayJob."""
    cluster = cluster_of(document)
    if cluster is not document["spec"]:
        yield "submitter", document["spec"]["submitterPodTemplate"]["spec"]
    yield "head", cluster["headGroupSpec"]["template"]["spec"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group["template"]["spec"]
