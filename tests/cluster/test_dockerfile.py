"""What can be said of the image without building it."""

import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.manifests import DOCKERFILE, KUBERAY, load, pinned, pods

PYPROJECT: dict[str, Any] = tomllib.loads(Path("pyproject.toml").read_text())


def instructions() -> list[tuple[str, str]]:
    """The file's instructions in order, each a word and its text; comments and line breaks left out."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(word, text.strip()) for word, _, text in (line.partition(" ") for line in joined.splitlines())]


def scripts() -> Iterator[str]:
    for word, text in instructions():
        if word == "RUN":
            yield re.sub(r"--mount=\S+\s*", "", text)


def sources() -> Iterator[str]:
    """What is copied from the repository."""
    for word, text in instructions():
        if word == "COPY" and not text.startswith("--from="):
            yield from text.split()[:-1]


def test_every_instruction_is_one_of_dockers() -> None:
    known = {"ARG", "FROM", "RUN", "WORKDIR", "ENV", "COPY", "USER"}
    assert {word for word, _ in instructions()} == known


@pytest.mark.parametrize("script", [*scripts()])
def test_every_script_is_one_that_a_shell_reads(script: str) -> None:
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_what_is_copied_exists_and_is_not_ignored() -> None:
    rules = Path(".dockerignore").read_text().split("\n")
    assert "*" in rules, "what is not named stays outside"
    assert list(sources())
    for source in sources():
        assert Path(source).exists()
        assert f"!{source}" in rules


def test_image_has_every_package_of_the_project() -> None:
    packages = {pattern.removesuffix("*") for pattern in PYPROJECT["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert packages <= set(sources())
    assert Path(PYPROJECT["project"]["readme"]).name in set(sources())


def test_later_stages_take_from_earlier_ones() -> None:
    stages: list[str] = []
    for word, text in instructions():
        used = re.findall(r"(?:--from=|,from=)(\w+)", text) if word in ("COPY", "RUN") else []
        assert set(used) <= set(stages)
        if word == "FROM":
            stages += re.findall(r" AS (\w+)", text)


def test_everything_is_installed_at_the_pinned_versions() -> None:
    environment = next(text for word, text in instructions() if word == "ENV")
    assert "UV_CONSTRAINT=/src/constraints.txt" in environment
    for script in scripts():
        if "pip install" in script:
            assert "-c constraints.txt" in script or "uv pip install" in script
    for extra in ("aws", "gpu"):
        for requirement in PYPROJECT["project"]["optional-dependencies"][extra]:
            assert pinned(re.split("[<>=]", requirement)[0])


def test_the_extras_that_the_file_names_are_the_projects() -> None:
    named = re.findall(r"EXTRAS=(\w+)", DOCKERFILE.read_text())
    assert set(named) == {"aws", "gpu"}
    assert set(named) <= PYPROJECT["project"]["optional-dependencies"].keys()


def test_image_and_manifests_agree_on_who_runs() -> None:
    (user,) = (text for word, text in instructions() if word == "USER")
    created = re.search(r"useradd .*--uid (\d+)", DOCKERFILE.read_text())
    assert created
    assert user == f"{created[1]}:{created[1]}"
    for kind in KUBERAY:
        for name, pod in pods(load(KUBERAY[kind])):
            context = pod["securityContext"]
            assert f"{context['runAsUser']}:{context['runAsGroup']}" == user, name
