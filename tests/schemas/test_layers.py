import pytest

from schemas.errors import ConfigInvalid
from schemas.layers import LayersConfig, plan_layers


@pytest.mark.parametrize(
    ("ratio", "replaced"),
    [
        (0.125, (0, 6, 12, 18)),
        (0.25, (0, 4, 8, 12, 16, 20, 24, 28)),
        (0.5, tuple(range(0, 32, 2))),
    ],
)
def test_even_plans_are_matvlms_lists_for_32_layers(ratio: float, replaced: tuple[int, ...]) -> None:
    assert plan_layers(LayersConfig(ratio=ratio), 32).replaced == replaced


@pytest.mark.parametrize(
    ("placement", "replaced"), [("start", (0, 1)), ("middle", (3, 4)), ("end", (6, 7)), ("even", (0, 4))]
)
def test_placements_of_two_in_eight_layers(placement: str, replaced: tuple[int, ...]) -> None:
    plan = plan_layers(LayersConfig.model_validate({"ratio": 0.25, "placement": placement}), 8)
    assert plan.replaced == replaced
    assert sorted(plan.kept + plan.replaced) == list(range(8))


def test_explicit_list_is_sorted_and_may_name_every_layer() -> None:
    assert plan_layers(LayersConfig(list=(3, 0, 2, 1)), 4).replaced == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (LayersConfig(ratio=0.05), "replaces no layer; the smallest ratio that replaces one is 0.125"),
        (LayersConfig(list=()), "replaces no layer"),
        (LayersConfig(list=(1, 8)), "from 0 to 7"),
        (LayersConfig(list=(1, 1)), "distinct"),
    ],
)
def test_plan_without_a_replaceable_layer_is_refused(config: LayersConfig, says: str) -> None:
    with pytest.raises(ConfigInvalid, match=says):
        plan_layers(config, 8)
