from typing import Any

import pytest
from pydantic import ValidationError

from schemas.placement import CachePlacement, WorkerPlacement


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ({"resources": {"GPU": 1}}, "GPU is not a custom resource; use cpus_per_worker"),
        ({"resources": {"teacher": 1.5}}, "teacher: 1.5 is not an amount"),
        ({"resources": {"teacher": 0}}, "teacher: 0 is not an amount"),
        ({"labels": {"pool": "in()"}}, r"pool: 'in\(\)' selects nothing"),
        ({"labels": {"pool": "!!a"}}, "selects nothing"),
        ({"labels": {"pool": "a b"}}, "selects nothing"),
        ({"decoder_labels": {"pool": "-a"}}, "selects nothing"),
        ({"labels": {"ray.io/market-type": "on-demand"}, "spot": False}, "say the same; give one of them"),
        ({"memory_per_worker": 0}, "greater than 0"),
    ],
)
def test_places_that_no_cluster_has_are_refused(place: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        CachePlacement.model_validate(place)


def test_spot_is_kept_off_by_a_label_of_rays() -> None:
    assert WorkerPlacement(labels={"pool": "a"}).selector == {"pool": "a"}
    assert WorkerPlacement(labels={"pool": "a"}, spot=False).selector == {"pool": "a", "ray.io/market-type": "!spot"}
