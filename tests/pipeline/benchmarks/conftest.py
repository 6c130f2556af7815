"""lmms-eval's own code, where it is installed."""

import importlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

Importer = Callable[[str], Any]


@pytest.fixture
def theirs() -> Iterator[Importer]:
    """Imports a module of theirs; their warnings are not ours."""
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: pip install decant[lmms]")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield lambda name: importlib.import_module(f"lmms_eval.{name}")
