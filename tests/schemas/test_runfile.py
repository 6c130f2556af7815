from pathlib import Path

import pytest
import yaml

from schemas.errors import ConfigInvalid
from schemas.runfile import dump_run, load_run

DEMO = Path("jobs/configs/demo.yaml")
GOLDEN = Path("tests/golden/demo_resolved.yaml")


def test_resolved_demo_run_is_the_golden_file() -> None:
    assert dump_run(load_run(DEMO)) == GOLDEN.read_text()


def test_every_shipped_run_file_is_valid() -> None:
    paths = sorted(set(Path("jobs/configs").glob("*.yaml")) - {Path("jobs/configs/accelerators.yaml")})
    assert [load_run(p).name for p in paths] == [p.stem for p in paths]


def test_resolved_run_is_a_run_file(tmp_path: Path) -> None:
    copy = tmp_path / "again.yaml"
    copy.write_text(dump_run(load_run(DEMO)))
    assert load_run(copy) == load_run(DEMO)


def test_override_replaces_one_field() -> None:
    run = load_run(
        DEMO,
        [
            "student.init=matvlm",
            "distill.phases.1.steps=7",
            "cache.taps.layers=[0, 3]",
            "distill.phases.1.decay_steps=0",
        ],
    )
    assert (run.student.init, run.distill.phases[1].steps, run.cache.taps.layers) == ("matvlm", 7, (0, 3))
    assert run.distill.phases[0] == load_run(DEMO).distill.phases[0]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("student.innit=mimic", ["student.innit", "unknown field", "did you mean", "student.init"]),
        ("storre=x", ["storre", "unknown field", "store"]),
        ("distill.phases.0.lr=-1", ["distill.phases.0", "lr", "greater than 0"]),
        ("distill.phases.7.lr=1", ["phases.7.lr", "not an index from 0 to 1"]),
        ("student.layers.ratio=2", ["student.layers.ratio", "less than or equal to 1"]),
        ("name", ["--set name", "a.b=c".replace("c", "value")]),
        ("name.x=1", ["`name` holds the value 'demo'"]),
        ("student.layers={ratio: 0.5, list: [1]}", ["either `ratio` or `list`"]),
        ("distill.phases.1.weights={kl: 0, layer: 1}", ["layer loss alone is an `align` phase"]),
        (
            "distill.phases.0.warmup_steps=400",
            ["phases.0", "warm-up (400 steps) and decay (200) exceed"],
        ),
    ],
)
def test_wrong_setting_is_refused_by_file_and_field(override: str, says: list[str]) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        load_run(DEMO, [override])
    for part in says:
        assert part in str(caught.value)


def test_missing_and_unreadable_run_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match="no such run file"):
        load_run(tmp_path / "none.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [1")
    with pytest.raises(ConfigInvalid, match="cannot be read as YAML"):
        load_run(bad)
    bad.write_text(yaml.safe_dump([1, 2]))
    with pytest.raises(ConfigInvalid, match="expected a mapping"):
        load_run(bad)


@pytest.mark.parametrize(
    ("store", "says"),
    [
        ("{url: runs/demo, endpoint: 'http://host'}", "store: endpoint, region and profile are for s3:// URLs"),
        ("s3://key:planted@bucket/x", "store: a URL with credentials in it; they come from the environment alone"),
        ("{url: 's3://bucket', secret: planted}", "store.secret: unknown field"),
    ],
)
def test_store_that_is_not_as_it_should_be_is_refused_without_its_secrets(store: str, says: str) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        load_run(DEMO, [f"store={store}"])
    assert says in str(caught.value)
    assert "planted" not in str(caught.value)


def test_store_may_be_a_url_or_a_section() -> None:
    short, long = (load_run(DEMO, [f"store={s}"]) for s in ("s3://bucket/x", "{url: s3://bucket/x, region: eu-1}"))
    assert (short.store.url, long.store.url) == ("s3://bucket/x",) * 2
    assert yaml.safe_load(dump_run(short))["store"] == "s3://bucket/x"
    assert yaml.safe_load(dump_run(long))["store"] == {"url": "s3://bucket/x", "region": "eu-1"}
