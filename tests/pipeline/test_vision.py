"""Vision features in the cache: the tower's own, and as good as pixels to whoever trains from them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration, PhiConfig, PreTrainedModel

from jobs import cache
from jobs.audit import audit_cache
from jobs.inspect import verify_run
from jobs.stages import open_store
from pipeline.data.collate import image_features
from pipeline.data.processors import Processor, load_processor
from pipeline.data.samples import images_of
from pipeline.models import body, connector, load_model
from pipeline.shards import Row, column_bytes, read_manifest, read_shard, rows_of
from pipeline.vision import features_of, feed_features, recorded_features, vision_inputs
from schemas.config import RunConfig
from schemas.errors import ConfigInvalid
from schemas.tables import SAMPLES, VISION, targets_table
from tests.decoders import CLIP, IMAGE_TOKEN, MULTI_HEAD, build, hybrid, image_prompt, randomise, tokens
from tests.pipeline.test_training import make_cache
from tests.pipeline.test_verify import QUIET
from tests.tolerances import BFLOAT16_RELATIVE, FLOAT32_LOGITS

RunOf = Callable[..., RunConfig]
CPU = torch.device("cpu")


def cached(run: RunConfig) -> list[tuple[Row, Row]]:
    """Every sample's row with its row of targets."""
    store, pairs = open_store(run), []
    for ref, table in ((run.ref("prepare"), SAMPLES), (run.ref("cache"), targets_table(run.cache, (0,)))):
        manifest = read_manifest(store, ref)
        pairs.append([row for info in manifest.shards for row in rows_of(read_shard(store, ref, table, info))])
    return list(zip(*pairs, strict=True))


def some_without_images(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The first two parts (of four) of the data, the first without any image and the second with some."""
    records = json.loads(Path(settings["prepare"]["data"]).read_text())[:8]
    for record in [*records[:4], records[5]]:
        del record["image"]
        for turn in record["conversations"]:
            turn["value"] = turn["value"].replace("<image>", "").strip()
    data = tmp_path / "mixed.json"
    data.write_text(json.dumps(records))
    return {**settings["prepare"], "data": str(data)}


def features_now(model: PreTrainedModel, pixels: Tensor) -> Tensor:
    """What the model's tower hands to its connector, without the code that captures it."""
    config: Any = model.config
    states = body(model).vision_tower(pixels, output_hidden_states=True).hidden_states
    chosen: Tensor = states[config.vision_feature_layer]
    return chosen[:, 1:] if config.vision_feature_select_strategy == "default" else chosen


def pixels_of(processor: Processor, sample: Any) -> torch.Tensor:
    return torch.from_numpy(image_features(processor, images_of(sample))["pixel_values"])


@torch.no_grad()
def test_cached_features_are_the_towers_output_and_rows_without_image_have_none(
    run_of: RunOf, settings: dict[str, Any], tmp_path: Path
) -> None:
    run = run_of(cache={"vision": "bfloat16"}, prepare=some_without_images(settings, tmp_path))
    make_cache(run)
    model, processor = load_model(run.teacher, torch.float32, CPU), load_processor(run.teacher)
    seen = []
    for sample, target in cached(run):
        if not sample["images"]:
            assert (target["patches"], target[VISION], features_of(target)) == (0, None, None)
            continue
        seen.append(target)
        pixels = pixels_of(processor, sample)
        found, expected = features_of(target), features_now(model, pixels)[0]
        assert found is not None
        assert found.dtype == torch.bfloat16
        assert found.shape == expected.shape == (64, 32)
        torch.testing.assert_close(found.float(), expected, rtol=BFLOAT16_RELATIVE, atol=FLOAT32_LOGITS)
    assert len(seen) == 3
    stacked = vision_inputs([target for _, target in cached(run)], 64)["pixel_values"]
    assert all(torch.equal(one, features_of(row)) for one, row in zip(stacked, seen, strict=True))
    assert vision_inputs([target for _, target in cached(run)][:4], 64) == {}


def test_cache_without_features_is_what_it_was(run_of: RunOf, tmp_path: Path) -> None:
    plain, more = (
        run_of(),
        run_of(store=str(tmp_path / "more"), cache={"taps": {"fraction": 0.5}, "vision": "bfloat16"}),
    )
    assert "vision" not in cache.stage(plain).settings
    assert cache.stage(more).settings["vision"] == "bfloat16"
    assert cache.stage(plain).settings | {"vision": "bfloat16"} == cache.stage(more).settings
    sizes, rows = [], []
    for run in (plain, more):
        store = make_cache(run)
        sizes.append(column_bytes(store, run.ref("cache"), read_manifest(store, run.ref("cache"))))
        rows.append([{k: target[k] for k in sizes[0]} for _, target in cached(run)])
    assert sizes[1].keys() - sizes[0].keys() == {"patches", VISION}
    assert rows[0] == rows[1]


def a_llava(strategy: str, layer: int) -> PreTrainedModel:
    """CLIP and Phi; CLIP puts a class token before the patches."""
    config = LlavaConfig(
        vision_config=CLIP,
        text_config=PhiConfig(**MULTI_HEAD),
        image_token_id=IMAGE_TOKEN,
        vision_feature_select_strategy=strategy,
        vision_feature_layer=layer,
    )
    model = LlavaForConditionalGeneration(config)
    randomise(model, 0)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("strategy", "layer"), [("default", -2), ("default", 1), ("full", -1)])
@torch.no_grad()
def test_student_fed_with_features_gives_the_logits_that_pixels_give(
    strategy: str, layer: int, dtype: torch.dtype
) -> None:
    student = hybrid(a_llava(strategy, layer).to(dtype), (1,), "matvlm")
    inputs = image_prompt("llava", tokens(6)[0])
    extra = 0 if strategy == "default" else 1
    ids = torch.cat([torch.full((1, extra), IMAGE_TOKEN), inputs["input_ids"]], 1)
    pixels = inputs["pixel_values"].to(dtype)
    with recorded_features(connector(student)) as found:
        expected = student(input_ids=ids, pixel_values=pixels).logits
    (features,) = found
    assert features.shape == (1, 4 + extra, 16)
    assert torch.equal(features, features_now(student, pixels))
    text = student(input_ids=tokens(5)[0][None]).logits
    feed_features(student)
    assert torch.equal(student(input_ids=ids, pixel_values=features).logits, expected)
    rounded = student(input_ids=ids, pixel_values=features.bfloat16()).logits
    if dtype == torch.bfloat16:
        assert torch.equal(rounded, expected)
    # what half a unit of eight bits in the features leaves of logits of up to 5, four random layers later
    torch.testing.assert_close(rounded, expected, rtol=4 * BFLOAT16_RELATIVE, atol=4 * BFLOAT16_RELATIVE)
    assert torch.equal(student(input_ids=tokens(5)[0][None]).logits, text)
    other = student(input_ids=ids, pixel_values=-features).logits
    assert not torch.allclose(other, expected, atol=0.1), "the features count"


@torch.no_grad()
def test_cached_features_of_a_bfloat16_teacher_are_exact(run_of: RunOf) -> None:
    run = run_of(
        cache={"vision": "bfloat16", "dtype": "bfloat16"}, placement={"prepare": {"workers": 0}, "cache": {"batch": 1}}
    )
    make_cache(run)
    model, processor = load_model(run.teacher, torch.bfloat16, CPU), load_processor(run.teacher)
    for sample, target in cached(run)[:5]:
        pixels = pixels_of(processor, sample)
        # the numbers; their strides differ, so that a product with them may add up in another order
        assert torch.equal(vision_inputs([target], 64)["pixel_values"], features_now(model, pixels.bfloat16()))


def test_gradients_reach_the_connector_as_from_pixels() -> None:
    gradients = []
    for fed in (False, True):
        student = hybrid(a_llava("default", -2), (1,), "matvlm")
        inputs = image_prompt("llava", tokens(6)[0])
        projector: Any = connector(student).requires_grad_(True)
        if fed:
            inputs["pixel_values"] = features_now(student, inputs["pixel_values"])
            feed_features(student)
        student(**inputs).logits.square().sum().backward()
        gradients.append([p.grad for p in projector.parameters()])
    assert all(bool(g.any()) for g in gradients[0])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("family", ["llava-next", "llava-onevision", "qwen2-vl", "qwen2.5-vl", "phi"])
def test_models_without_cacheable_features_are_refused_before_work(run_of: RunOf, family: str, tmp_path: Path) -> None:
    model = build(family)
    kind = model.config.model_type
    model.save_pretrained(tmp_path / "other")
    run = run_of(teacher={"path": str(tmp_path / "other")}, cache={"vision": "bfloat16"})
    with pytest.raises(
        ConfigInvalid, match=rf"cache\.vision: .*other: is a {kind}; .*one layer's features.*use `none`"
    ):
        cache.stage(run)
    with pytest.raises(ConfigInvalid, match=f"cannot be fed with vision features: it is a {kind}"):
        feed_features(model)


def test_features_of_several_layers_are_refused(run_of: RunOf, tiny_teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "several"
    folder.mkdir()
    for file in tiny_teacher.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | {"vision_feature_layer": [-2, -1]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigInvalid, match=r"takes features of the layers \[-2, -1\]"):
        cache.stage(run_of(teacher={"path": str(folder)}, cache={"vision": "bfloat16"}))


def test_cache_with_features_is_verified_and_audited(run_of: RunOf, settings: dict[str, Any], tmp_path: Path) -> None:
    run = run_of(cache={"vision": "bfloat16"}, prepare=some_without_images(settings, tmp_path))
    make_cache(run)
    verify_run(run, QUIET, repair=False)
    audit_cache(run, QUIET, 1.0, repair=False, dry_run=False)
