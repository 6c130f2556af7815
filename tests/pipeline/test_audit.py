"""What rounding explains is within tolerance; what it does not is beyond, and named."""

from typing import Any

import numpy as np
import pytest
from torch import Generator, Tensor, from_numpy, randn, zeros

from pipeline.activations import encode_activation, pack
from pipeline.audit import Difference, chosen_rows, compare
from pipeline.targets import encode, encode_draws, extract, logprobs, uniforms
from schemas.config import CacheConfig

VOCABULARY, POSITIONS, DRAWS = 1000, 20, 50
SAMPLED = CacheConfig()
TOP = CacheConfig.model_validate({"targets": {"kind": "top_k", "k": 12}})


def logits(seed: int = 0) -> Tensor:
    return randn(POSITIONS, VOCABULARY, generator=Generator().manual_seed(seed)) * 4


def row(logits_PV: Tensor, config: CacheConfig = SAMPLED, seed: int = 0) -> dict[str, Any]:
    """A row of targets of the logits, as a teacher would leave it."""
    lse = logits_PV.logsumexp(-1)
    chance = from_numpy(uniforms("sample", seed, POSITIONS, DRAWS))
    kept = extract(config.targets, logprobs(logits_PV, 1.0), zeros(POSITIONS, 1), chance)
    return {
        "positions": POSITIONS,
        **encode(config.targets, kept, VOCABULARY),
        "lse": lse.numpy().tobytes(),
        "gold_logprob": (logits_PV[:, 0] - lse).numpy().astype("<f2").tobytes(),
        "entropy": zeros(POSITIONS).numpy().astype("<f2").tobytes(),
    }


def beyond(config: CacheConfig, cached: dict[str, Any], fresh: dict[str, Any]) -> dict[str, Difference]:
    return {d.field: d for d in compare(config, POSITIONS, cached, fresh) if d.beyond}


@pytest.mark.parametrize("config", [SAMPLED, TOP], ids=["sampled", "top_k"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rounding_is_within_and_another_teacher_beyond(config: CacheConfig, dtype: str) -> None:
    config = config.model_copy(update={"dtype": dtype})
    size = {"float32": 1e-5, "bfloat16": 2.0**-8}[dtype]
    noise = 1 + size * randn(POSITIONS, VOCABULARY, generator=Generator().manual_seed(1))
    assert beyond(config, row(logits() * noise, config), row(logits(), config)) == {}
    found = beyond(config, row(logits(2), config), row(logits(), config))
    assert "ids, counts" in found or "ids, logprobs" in found
    assert {"lse", "gold_logprob"} <= found.keys()


def test_draws_of_another_seed_are_beyond_though_the_teacher_is_the_same() -> None:
    found = beyond(SAMPLED, row(logits(), seed=1), row(logits()))
    assert list(found) == ["ids, counts"]
    assert found["ids, counts"].equal < 0.1


def draws_of(*positions: dict[int, int]) -> dict[str, Any]:
    ids = np.array([[i for i, n in p.items() for _ in range(n)] for p in positions])
    zero = np.zeros(len(positions), "<f4")
    half = zero.astype("<f2").tobytes()
    return {
        "positions": len(positions),
        **encode_draws(ids, VOCABULARY),
        "lse": zero.tobytes(),
        "gold_logprob": half,
        "entropy": half,
    }


def test_a_draw_that_crosses_to_a_neighbour_counts_once_and_is_shown() -> None:
    config = CacheConfig.model_validate({"targets": {"kind": "sampled", "draws": 4}})
    fresh = draws_of({1: 4}, {1: 2, 5: 2}, {2: 1, 3: 1, 9: 2})
    moved = draws_of({1: 4}, {1: 1, 5: 3}, {2: 1, 3: 1, 9: 2})
    difference = compare(config, 3, moved, fresh)[-1]
    assert (difference.error, difference.equal) == (1 / 12, pytest.approx(2 / 3))
    assert not difference.beyond, "one draw of a row may have been on the border"
    assert difference.expected == "1 ×2, 5 ×2 at position 1"
    assert difference.got == "5 ×3, 1 ×1"
    far = compare(config, 3, draws_of({8: 4}, {1: 2, 5: 2}, {2: 1, 3: 1, 9: 2}), fresh)[-1]
    assert far.error == pytest.approx(4 / 12)
    assert far.beyond


def test_an_id_on_the_border_of_the_kept_ones_may_be_another() -> None:
    near = logits()
    last = near.topk(13).values[:, 11:]
    middle = last.mean(-1, keepdim=True)
    # the twelfth and the thirteenth are a millionth apart, and change places
    places = near.topk(13).indices[:, 11:]
    one = near.scatter(1, places, middle + from_numpy(np.array([[1e-6, -1e-6]], np.float32)))
    two = near.scatter(1, places, middle + from_numpy(np.array([[-1e-6, 1e-6]], np.float32)))
    found = compare(TOP, POSITIONS, row(one, TOP), row(two, TOP))[-1]
    assert not found.beyond
    assert found.equal < 1
    other = row(one, TOP)
    other["ids"] = np.roll(np.frombuffer(other["ids"], "<u2").reshape(POSITIONS, -1), 1, 1).tobytes()
    assert "ids, logprobs" in beyond(TOP, other, row(two, TOP))


def test_what_is_no_number_is_beyond() -> None:
    cached = row(logits())
    cached["lse"] = np.full(POSITIONS, np.nan, "<f4").tobytes()
    assert list(beyond(SAMPLED, cached, row(logits()))) == ["lse"]


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("sample_id", "another", "another"),
        ("positions", 3, "3"),
        ("entropy", b"1234", "4 bytes"),
        ("ids", b"12", "2 bytes"),
        ("ids_dtype", "uint32", "uint32"),
        ("tap_0_input", None, "empty"),
        ("patches", 3, "3"),
        ("vision", None, "empty"),
    ],
)
def test_fields_of_another_shape_are_named(field: str, value: Any, says: str) -> None:
    fresh = row(logits()) | {"sample_id": "sample", "tap_0_input": b"00", "patches": 1, "vision": b"00"}
    found = beyond(SAMPLED, {**fresh, field: value}, fresh)
    assert found[field].got == says


def test_features_of_another_image_are_beyond_and_rounded_ones_within() -> None:
    first, second = (randn(4, 32, generator=Generator().manual_seed(seed)) for seed in (0, 1))

    def with_features(value: Tensor) -> dict[str, Any]:
        return row(logits()) | {"patches": 4, **encode_activation("vision", pack(value, "bfloat16"))}

    assert beyond(SAMPLED, with_features(first * (1 + 1e-5)), with_features(first)) == {}
    assert list(beyond(SAMPLED, with_features(second), with_features(first))) == ["vision"]


def test_rows_are_chosen_by_their_sample_alone() -> None:
    names = [f"sample {i}" for i in range(1000)]
    few, more = chosen_rows(names, 0.05, 0), chosen_rows(names, 0.1, 0)
    assert set(few) < set(more)
    # five standard deviations of a binomial of 1,000 at a tenth
    assert abs(len(more) - 100) < 5 * 9.5
    assert {names[i] for i in few} == {names[::-1][i] for i in chosen_rows(names[::-1], 0.05, 0)}
    assert chosen_rows(names, 0.05, 1) != few
    assert chosen_rows(names, 1.0, 0) == list(range(1000))
    assert len(chosen_rows(names, 0.0, 0)) == 1
