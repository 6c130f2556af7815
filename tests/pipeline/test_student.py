"""Folders, trained checkpoints and MaTVLM's own: exactly what belongs, or an error."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM

from pipeline.matvlm import load_matvlm
from pipeline.models import add_head_bias, head
from pipeline.ops.opset import TORCH
from pipeline.student import (
    build_student,
    load_hybrid,
    load_trained,
    record_of,
    save_hybrid,
    trained_bytes,
)
from pipeline.surgery import mixers, trainable_names
from schemas.errors import ConfigInvalid
from schemas.layers import LayerPlan
from tests.decoders import COMMON, IMAGE_TOKEN, build, hybrid, image_prompt, randomise, tokens

PARTS = ("mixers", "connector")


def saved(tmp_path: Path, family: str = "llava") -> Path:
    save_hybrid(hybrid(build(family), (1, 3)), tmp_path / "student")
    return tmp_path / "student"


def edit(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Sets or removes tensors of a saved folder."""
    weights = load_file(folder / "model.safetensors")
    for name, value in tensors.items():
        if value is None:
            del weights[name]
        else:
            weights[name] = value
    save_file(weights, folder / "model.safetensors")


def test_folder_says_plan_mixers_backend_and_teacher(tmp_path: Path) -> None:
    said = json.loads((saved(tmp_path) / "config.json").read_text())["decant"]
    assert said == {
        "format": 1,
        "base": "llava",
        "layers": 4,
        "mixers": {
            str(i): {
                "hidden": 32,
                "heads": 4,
                "kv_heads": 4,
                "head_dim": 8,
                "bias": True,
                "qk_norm": False,
                "eps": 1e-05,
            }
            for i in (1, 3)
        },
        "backend": "torch",
        "teacher": {"weights": "0" * 32, "config.json": "0" * 32},
        "head_bias": False,
        "trained": [],
    }


def test_stock_transformers_refuses_the_folder_instead_of_leaving_the_mixers_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="decant_hybrid"):
        AutoModelForImageTextToText.from_pretrained(saved(tmp_path))


@torch.no_grad()
def test_loaded_hybrid_goes_on_generating_and_saves_again(tmp_path: Path) -> None:
    model = hybrid(build("llava"), (1, 3), "matvlm")
    save_hybrid(model, tmp_path / "one")
    load_hybrid(tmp_path / "one").save_pretrained(tmp_path / "two")
    again = load_hybrid(tmp_path / "two")
    assert record_of(again) == record_of(model)
    inputs = image_prompt("llava", tokens(5)[0])
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [IMAGE_TOKEN]}
    assert torch.equal(again.generate(**inputs, **settings), model.generate(**inputs, **settings))


@torch.no_grad()
def test_tied_weights_are_written_once_and_tied_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = hybrid(LlamaForCausalLM(LlamaConfig(**COMMON, tie_word_embeddings=True)).eval(), (0,))
    save_hybrid(model, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    again = load_hybrid(tmp_path)
    assert head(again).weight.data_ptr() == again.get_input_embeddings().weight.data_ptr()
    (ids,) = tokens(7)
    assert torch.equal(again(input_ids=ids[None]).logits, model(input_ids=ids[None]).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.language_model.layers.1.self_attn.A_log": None}, r"missing: .*layers\.1\.self_attn\.A_log"),
        ({"model.stray": torch.zeros(1)}, r"unexpected: model\.stray"),
        ({"lm_head.weight": torch.zeros(3, 3)}, r"of another shape: lm_head\.weight"),
    ],
)
def test_folder_whose_tensors_are_not_exactly_the_models_is_refused(
    tmp_path: Path, change: dict[str, torch.Tensor | None], message: str
) -> None:
    folder = saved(tmp_path)
    edit(folder, **change)
    with pytest.raises(ConfigInvalid, match=message):
        load_hybrid(folder)


def test_folder_that_is_no_hybrid_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match=r"no config\.json"):
        load_hybrid(tmp_path)
    build("llama").save_pretrained(tmp_path)
    with pytest.raises(ConfigInvalid, match="model_type is not decant_hybrid"):
        load_hybrid(tmp_path)


def test_record_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    settings = json.loads((folder / "config.json").read_text())
    for change, message in [
        ({"format": 2}, "less than or equal to 1"),
        ({"layers": 5}, "made for 5 layers; the decoder has 4"),
        ({"mixers": {"1": {**settings["decant"]["mixers"]["1"], "heads": 3, "kv_heads": 1}}}, "mixer of layer 1"),
        ({"mixers": {"1": {**settings["decant"]["mixers"]["1"], "heads": 3}}}, "3 heads cannot share 4"),
    ]:
        (folder / "config.json").write_text(json.dumps({**settings, "decant": {**settings["decant"], **change}}))
        with pytest.raises(ConfigInvalid, match=message):
            load_hybrid(folder)


@torch.no_grad()
def test_precision_is_the_callers_and_decays_stay_float32(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    whole, half = load_hybrid(folder), load_hybrid(folder, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    for name in ("A_log", "D", "dt_bias"):
        assert torch.equal(getattr(mixers(half)[1], name), getattr(mixers(whole)[1], name))


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    build("llava").save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


@torch.no_grad()
def trained_file(teacher: Path, path: Path) -> tuple[torch.nn.Module, Path]:
    """A student of the teacher with its trained parameters moved, and the checkpoint of them."""
    student = build_student(str(teacher), LayerPlan(4, (0, 2)), "mimic", 0, torch.float32, torch.device("cpu"), TORCH)
    for name in trainable_names(student):
        student.get_parameter(name).add_(0.1)
    tensors = {name: student.get_parameter(name) for name in trainable_names(student)}
    path.write_bytes(trained_bytes(tensors, record_of(student), PARTS))
    return student, path


@torch.no_grad()
def test_trained_checkpoint_and_teacher_make_the_student(teacher: Path, tmp_path: Path) -> None:
    student, path = trained_file(teacher, tmp_path / "trained.safetensors")
    again = load_trained(path, str(teacher))
    inputs = image_prompt("llava", tokens(5)[0])
    assert torch.equal(again(**inputs).logits, student(**inputs).logits)


def test_trained_checkpoint_refuses_another_teacher(teacher: Path, tmp_path: Path) -> None:
    _, path = trained_file(teacher, tmp_path / "trained.safetensors")
    build("llava", seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigInvalid, match=r"was trained from another teacher: weights [0-9a-f]{32}"):
        load_trained(path, str(tmp_path / "other"))


def test_trained_checkpoint_with_a_tensor_too_few_is_refused(teacher: Path, tmp_path: Path) -> None:
    student, path = trained_file(teacher, tmp_path / "trained.safetensors")
    tensors = load_file(path)
    del tensors["model.multi_modal_projector.linear_2.bias"]
    path.write_bytes(trained_bytes(tensors, record_of(student), PARTS))  # type: ignore[arg-type]
    with pytest.raises(
        ConfigInvalid, match=r"not this student's; missing: model\.multi_modal_projector\.linear_2\.bias"
    ):
        load_trained(path, str(teacher))


def test_files_that_are_no_trained_checkpoints_are_refused(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a checkpoint at all")
    with pytest.raises(ConfigInvalid, match="is no safetensors file"):
        load_trained(tmp_path / "text", str(teacher))
    with pytest.raises(ConfigInvalid, match="does not say what the hybrid is"):
        load_trained(teacher / "model.safetensors", str(teacher))


@torch.no_grad()
def matvlm_folder(folder: Path, replaced: tuple[int, ...], **settings: Any) -> torch.nn.Module:
    """A checkpoint as MaTVLM writes it: TinyLLaVA's names, two shards, `mamba` for the mixers, a biased head."""
    model = hybrid(build("llava"), replaced, "matvlm")
    add_head_bias(model)
    randomise(head(model), 5)
    renamed = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in (
            ("model.language_model.", "language_model.model."),
            ("lm_head.", "language_model.lm_head."),
            ("model.vision_tower.vision_model.", "vision_tower._vision_tower.vision_model."),
            ("model.vision_tower.", "vision_tower._vision_tower.vision_model."),
            ("model.multi_modal_projector.linear_1.", "connector._connector.0."),
            ("model.multi_modal_projector.linear_2.", "connector._connector.2."),
        ):
            if name.startswith(ours):
                name = theirs + name.removeprefix(ours)
                break
        for i in replaced:
            name = name.replace(f"layers.{i}.self_attn.", f"layers.{i}.mamba.")
        renamed[name] = tensor.clone()
    folder.mkdir()
    names = sorted(renamed)
    for part, chosen in enumerate((names[::2], names[1::2]), 1):
        save_file({n: renamed[n] for n in chosen}, folder / f"model-0000{part}-of-00002.safetensors")
    said = {
        "d_model": 32,
        "ssm_cfg": {"expand": 1, "ngroups": 4, "d_state": 8},
        "d_inner": 32,
        "d_xb": 32,
        "n_layer": 4,
        "attn_layers": [i for i in range(4) if i not in replaced],
        "is_bias": False,
        **settings,
    }
    (folder / "mamba_config.json").write_text(json.dumps(said))
    return model


@torch.no_grad()
def test_matvlms_own_checkpoint_loads_into_a_hybrid(teacher: Path, tmp_path: Path) -> None:
    theirs = matvlm_folder(tmp_path / "matvlm", (0, 2))
    ours = load_matvlm(tmp_path / "matvlm", str(teacher))
    inputs = image_prompt("llava", tokens(6)[0])
    assert torch.equal(ours(**inputs).logits, theirs(**inputs).logits)
    assert tuple(mixers(ours)) == (0, 2)
    save_hybrid(ours, tmp_path / "saved")
    assert torch.equal(load_hybrid(tmp_path / "saved")(**inputs).logits, theirs(**inputs).logits)


def test_matvlm_checkpoint_that_does_not_fit_is_refused(teacher: Path, tmp_path: Path) -> None:
    matvlm_folder(tmp_path / "a", (0,), n_layer=8)
    with pytest.raises(ConfigInvalid, match="is of 8 layers"):
        load_matvlm(tmp_path / "a", str(teacher))
    matvlm_folder(tmp_path / "b", (0,), attn_layers=[2, 3])
    with pytest.raises(ConfigInvalid, match=r"missing: .*layers\.1\.self_attn\.A_log.*unexpected: .*layers\.1"):
        load_matvlm(tmp_path / "b", str(teacher))
    matvlm_folder(tmp_path / "c", (0,), d_xb=16)
    with pytest.raises(ConfigInvalid, match=r"d_xb, ngroups, d_state as \(32, 16, 4, 8\); layer 0 needs"):
        load_matvlm(tmp_path / "c", str(teacher))
    with pytest.raises(ConfigInvalid, match=r"no mamba_config\.json"):
        load_matvlm(teacher, str(teacher))


def test_no_layer_replaced_is_a_hybrid_too(tmp_path: Path) -> None:
    model = hybrid(build("llama"), ())
    save_hybrid(model, tmp_path)
    (ids,) = tokens(5)
    assert torch.equal(load_hybrid(tmp_path)(input_ids=ids[None]).logits, model(input_ids=ids[None]).logits)
    with pytest.raises(ValueError, match="decant_hybrid"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
