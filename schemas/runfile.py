"""Reads YAML that users write, above all the run file with ``--set`` overrides; errors name file, field and remedy."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from schemas.config import RunConfig
from schemas.errors import ConfigInvalid

M = TypeVar("M", bound=BaseModel)


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The validated run of a YAML file with ``a.b=value`` overrides applied.

    Raises:
        ConfigInvalid: the file is missing or not a mapping, or a field is unknown, missing or out of range.
    """
    data = read_mapping(path, "run file")
    for override in overrides:
        put(data, *parse_override(override), f"--set {override}")
    return validated(RunConfig, data, path)


def read_mapping(path: str | Path, what: str) -> dict[str, Any]:
    """The mapping in a YAML file; ``what`` names the kind of file in errors.

    Raises:
        ConfigInvalid: the file is missing or not a mapping.
    """
    try:
        data = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise ConfigInvalid(f"{path}: no such {what}; `jobs/configs/` has examples") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigInvalid(f"{path}: cannot be read as YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigInvalid(f"{path}: expected a mapping of settings, got {type(data).__name__}")
    return data


def validated(model: type[M], data: dict[str, Any], path: str | Path) -> M:
    """The mapping of a file as a value of the model.

    Raises:
        ConfigInvalid: a field is unknown, missing or out of range; names all of them.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ConfigInvalid(f"{path}: " + _explain(error, model)) from None


def dump_run(run: RunConfig) -> str:
    """The run as YAML, every default written out."""
    return yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False)


def parse_override(override: str) -> tuple[str, Any]:
    """The dotted key and the value of ``a.b=value``.

    Raises:
        ConfigInvalid: it is not of that form, or the value is not YAML.
    """
    key, separator, text = override.partition("=")
    if not separator:
        raise ConfigInvalid(f"--set {override}: expected a.b=value")
    try:
        return key, yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigInvalid(f"--set {override}: the value is not YAML: {error}") from None


def put(data: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Sets the field at a dotted key, in which numbers are places in lists; ``where`` names it in errors.

    Raises:
        ConfigInvalid: the key leads into a value that has no fields, or past a list's end.
    """
    parts = key.split(".")
    if not all(parts):
        raise ConfigInvalid(f"{where}: a part of the key is empty; expected names joined by dots")
    node: Any = data
    for part in parts[:-1]:
        node = _child(node, part, where)
    if isinstance(node, list):
        node[_index(node, parts[-1], where)] = value
    else:
        node[parts[-1]] = value


def _child(node: Any, part: str, where: str) -> Any:
    if isinstance(node, list):
        child = node[_index(node, part, where)]
    else:
        child = node.setdefault(part, {})
        if child is None:
            child = node[part] = {}
    if not isinstance(child, (dict, list)):
        raise ConfigInvalid(f"{where}: `{part}` holds the value {child!r}, which has no fields")
    return child


def _index(node: list[Any], part: str, where: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise ConfigInvalid(f"{where}: `{part}` is not an index from 0 to {len(node) - 1}")
    return int(part)


def _explain(error: ValidationError, model: type[BaseModel]) -> str:
    lines = []
    for item in error.errors():
        path = ".".join(str(p) for p in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = "unknown field" + _suggestion(item["loc"], model)
        elif item["type"] == "missing":
            message = "is required"
        elif item["type"] != "value_error":  # ours are complete, and what was given may hold a secret
            message += f" (got {item['input']!r})"
        lines.append(f"{path}: {message}")
    return "; ".join(lines)


def _suggestion(location: tuple[int | str, ...], model: type[BaseModel]) -> str:
    """The nearest known name of any section, since a misplaced field is as common as a misspelt one."""
    known = dict.fromkeys(model.model_fields, "")
    for section, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            known |= dict.fromkeys(field.annotation.model_fields, section + ".")
    close = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.7)
    return f"; did you mean `{known[close[0]]}{close[0]}`?" if close else ""
