"""TinyLLaVA checkpoints as transformers folders: every tensor, the same logits, tokens and pixels, or an error."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, CLIPImageProcessorPil, PreTrainedModel, SiglipImageProcessorPil

from jobs.import_teacher import import_teacher
from pipeline.data.conversations import Conversation, Turn
from pipeline.data.encoding import Encoder
from pipeline.data.processors import load_processor
from pipeline.models import BiasedHead, head, load_model
from pipeline.ops.opset import TORCH
from pipeline.student import (
    apply_trained,
    build_student,
    check_plan,
    load_hybrid,
    load_trained,
    record_of,
    save_hybrid,
    trained_bytes,
)
from pipeline.surgery import trainable_names
from pipeline.tinyllava import weights
from pipeline.tinyllava.config import TOWERS
from pipeline.tinyllava.layout import file_name, original_name
from schemas.errors import ConfigInvalid
from schemas.layers import LayerPlan
from tests import tinyllava, tolerances
from tests.tinyllava import IMAGE_INDEX, Original, original, write_checkpoint, write_shards, write_tokenizer

FAMILIES = ("phi", "qwen2", "stablelm", "llama", "gemma")
CPU = torch.device("cpu")
TRACE = json.loads(Path("tests/golden/phi_trace.json").read_text())
SENTENCE = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def imported(source: Path, template: str | None = None) -> Path:
    import_teacher(str(source), source.parent / "teacher", template, Console(quiet=True))
    return source.parent / "teacher"


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def edit(folder: Path, **settings: Any) -> None:
    """Changes values of a folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@torch.no_grad()
def compare(folder: Path, theirs: Original) -> PreTrainedModel:
    """The folder's model gives the original's logits for a prompt with an image."""
    model = load_model(str(folder), torch.float32, CPU)
    generator = torch.Generator().manual_seed(1)
    pixels, text = torch.randn(1, 3, 12, 12, generator=generator), [5, 6, 7, 8, 9, 10]
    image = [model.config.image_token_index] * model.config.image_seq_length
    ids = torch.tensor([[*text[:3], *image, *text[3:]]])
    ours = model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels).logits[0]
    expected = theirs.logits([*text[:3], IMAGE_INDEX, *text[3:]], pixels)
    vocabulary = expected.shape[1]
    torch.testing.assert_close(ours[:, :vocabulary], expected, rtol=0, atol=tolerances.IMPORTED_LOGITS)
    assert (ours.softmax(-1)[:, vocabulary:] == 0).all()
    return model


@pytest.mark.parametrize("tower", ["siglip", "clip"])
@pytest.mark.parametrize("family", FAMILIES)
def test_imported_checkpoint_has_every_tensor_and_gives_the_originals_logits(
    tmp_path: Path, family: str, tower: str
) -> None:
    theirs = write_checkpoint(tmp_path / "source", family, tower)
    folder = imported(tmp_path / "source")
    model = compare(folder, theirs)
    assert model.config.image_seq_length == (8 if tower == "siglip" else 9)
    written, names = tensors_in(folder), {original_name(n): file_name(n) for n in model.state_dict()}
    for name, tensor in theirs.tensors().items():
        copied = written.pop(names[name])
        assert torch.equal(copied[: len(tensor)] if tensor.dim() else copied, tensor), name
    # a vocabulary that was full has a row more, which a bias keeps from being predicted
    assert set(written) == ({"language_model.lm_head.bias"} if family in ("llama", "gemma") else set())


def test_files_have_the_names_that_transformers_writes(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", "qwen2")
    folder = imported(tmp_path / "source")
    AutoModelForImageTextToText.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert tensors_in(folder).keys() == tensors_in(tmp_path / "again").keys()


def test_defaults_that_config_json_leaves_out_are_written_out(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", "phi")
    config = json.loads((imported(tmp_path / "source") / "config.json").read_text())
    text = config["text_config"]
    assert (text["num_attention_heads"], text["num_key_value_heads"], text["max_position_embeddings"]) == (32, 32, 2048)
    assert text["rope_parameters"] == {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.4}
    assert (config["image_token_index"], config["image_seq_length"]) == (258, 8)
    assert (config["vision_feature_layer"], config["vision_feature_select_strategy"]) == (-2, "default")
    assert config["projector_hidden_act"] == "gelu"


def test_every_patch_is_kept_where_the_checkpoint_says_so(tmp_path: Path) -> None:
    theirs = write_checkpoint(tmp_path / "source", "qwen2", vision_feature_select_strategy="cls_patch")
    theirs.drop_first = False
    assert compare(imported(tmp_path / "source"), theirs).config.image_seq_length == 9


def write_parts(folder: Path, family: str) -> Original:
    """A checkpoint as TinyLLaVA Factory saves it after pretraining, its weights as safetensors."""
    theirs = original(family)
    for part, prefix in (
        ("language_model", "language_model."),
        ("vision_tower", "vision_tower._vision_tower."),
        ("connector", "connector."),
    ):
        (folder / part).mkdir(parents=True)
        own = {n.removeprefix(prefix): t for n, t in theirs.tensors().items() if n.startswith(prefix)}
        save_file({n: t.contiguous() for n, t in own.items()}, folder / part / "model.safetensors")
    settings = tinyllava.settings_of(family)
    (folder / "vision_tower" / "config.json").write_text(json.dumps(settings.pop("vision_config")))
    (folder / "language_model" / "config.json").write_text(json.dumps(settings.pop("text_config")))
    (folder / "config.json").write_text(json.dumps(settings))
    write_tokenizer(folder, family)
    return theirs


@pytest.mark.parametrize("family", ["phi", "gemma"])
def test_separate_parts_are_imported_as_one_model(tmp_path: Path, family: str) -> None:
    theirs = write_parts(tmp_path / "source", family)
    compare(imported(tmp_path / "source"), theirs)


def write_legacy(folder: Path, architecture: str, family: str, tower: str, removed: bool) -> Original:
    """A checkpoint from before TinyLLaVA Factory; ``removed``: without SigLIP's last layer and head, as in training."""
    theirs = original(family, tower)
    if tower == "siglip":
        theirs.drop_first = False
    tensors = {}
    for name, tensor in theirs.tensors().items():
        if removed and ("encoder.layers.1." in name or "vision_model.head." in name):
            continue
        for ours, legacy in (
            ("vision_tower._vision_tower.", "model.vision_tower.vision_tower."),
            ("connector._connector.", "model.mm_projector."),
            ("language_model.lm_head.", "lm_head."),
            ("language_model.model.", "model."),
        ):
            if name.startswith(ours):
                tensors[legacy + name.removeprefix(ours)] = tensor
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    folder.mkdir()
    write_shards(folder, tensors)
    settings = {
        **tinyllava.TEXT[family],
        "architectures": [architecture],
        "model_type": "tiny_llava_phi",
        "mm_vision_tower": "tiny/tower",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "pad",
    }
    (folder / "config.json").write_text(json.dumps(settings))
    write_tokenizer(folder, family)
    return theirs


@pytest.mark.parametrize(
    ("architecture", "family", "tower", "removed"),
    [
        ("TinyLlavaPhiForCausalLM", "phi", "siglip", True),
        ("TinyLlavaPhiForCausalLM", "phi", "siglip", False),
        ("TinyLlavaStablelmForCausalLM", "stablelm", "clip", False),
        ("TinyLlavaLlamaForCausalLM", "llama", "siglip", True),
    ],
)
def test_names_from_before_tinyllava_factory_are_imported_and_siglip_keeps_its_first_patch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, family: str, tower: str, removed: bool
) -> None:
    monkeypatch.setitem(TOWERS, "tiny/tower", tinyllava.VISION[tower])
    theirs = write_legacy(tmp_path / "source", architecture, family, tower, removed)
    assert compare(imported(tmp_path / "source"), theirs).config.image_seq_length == 9


def test_half_precision_stays_as_it_is(tmp_path: Path) -> None:
    theirs = write_checkpoint(tmp_path / "source", "phi")
    for file in (tmp_path / "source").glob("*.safetensors"):
        save_file({n: t.half() for n, t in load_file(file).items()}, file)
    folder = imported(tmp_path / "source")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float16"
    assert {t.dtype for t in tensors_in(folder).values()} == {torch.float16}
    bias = theirs.tensors()["language_model.lm_head.bias"].half()
    assert torch.equal(tensors_in(folder)["language_model.lm_head.bias"], bias)


def test_large_weights_are_written_in_shards_with_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "SHARD", "50KB")
    theirs = write_checkpoint(tmp_path / "source", "llama")
    folder = imported(tmp_path / "source")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert {n: f.name for f in folder.glob("*.safetensors") for n in load_file(f)} == index
    assert len(set(index.values())) > 1
    compare(folder, theirs)


def test_head_bias_is_loaded_exactly_in_any_type_and_without_a_word(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    theirs = write_checkpoint(tmp_path / "source", "phi")
    folder, bias = imported(tmp_path / "source"), theirs.language.lm_head.bias  # type: ignore[union-attr]
    capfd.readouterr()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        found = head(load_model(str(folder), dtype, CPU))
        assert isinstance(found, BiasedHead)
        assert torch.equal(found.bias, bias.to(dtype))  # type: ignore[union-attr, operator]
        assert not found.bias.requires_grad
    assert capfd.readouterr().err == ""


def test_tied_head_stays_tied_under_its_bias(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", "gemma")
    model = load_model(str(imported(tmp_path / "source")), torch.float32, CPU)
    assert head(model).weight is model.get_input_embeddings().weight
    assert head(model).bias is not None


@torch.no_grad()
@pytest.mark.parametrize("family", ["phi", "gemma"])
def test_hybrid_of_an_imported_teacher_is_saved_loaded_and_trained_with_its_bias(tmp_path: Path, family: str) -> None:
    write_checkpoint(tmp_path / "source", family)
    teacher, plan = str(imported(tmp_path / "source")), LayerPlan(2, (1,))
    check_plan(teacher, plan)
    student = build_student(teacher, plan, "mimic", 0, torch.float32, CPU, TORCH)
    assert record_of(student).head_bias
    for name in trainable_names(student):
        student.get_parameter(name).add_(0.1)
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = student(input_ids=ids).logits
    save_hybrid(student, tmp_path / "hybrid")
    assert torch.equal(load_hybrid(tmp_path / "hybrid")(input_ids=ids).logits, expected)
    trained = {name: student.get_parameter(name) for name in trainable_names(student)}
    data = trained_bytes(trained, record_of(student), ("mixers", "connector"))
    (tmp_path / "trained.safetensors").write_bytes(data)
    assert torch.equal(load_trained(tmp_path / "trained.safetensors", teacher)(input_ids=ids).logits, expected)
    fresh = build_student(teacher, plan, "mimic", 0, torch.float32, CPU, TORCH)
    apply_trained(fresh, data, "trained")
    assert record_of(fresh).head_bias


def phi_vocabulary(folder: Path) -> None:
    """Phi-2's tokenizer with the true entries of one sentence; the others have their number and another text."""
    known = {i: token for token, i in TRACE["vocab"].items()} | {50256: "<|endoftext|>"}
    vocabulary = {known.get(i, f"<{i}>"): i for i in range(50257)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *TRACE["merges"]]) + "\n")
    blanks = [" " * n for n in range(31, 1, -1)] + ["\t" * n for n in range(9, 1, -1)]
    (folder / "added_tokens.json").write_text(json.dumps({text: 50257 + i for i, text in enumerate(blanks)}))


def test_tokens_are_those_of_the_published_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tinyllava.TEXT["phi"], "vocab_size", 51200)
    monkeypatch.setitem(tinyllava.TEXT["phi"], "hidden_size", 64)
    monkeypatch.setitem(tinyllava.TEXT["phi"], "num_attention_heads", 2)
    monkeypatch.setitem(tinyllava.VISION["siglip"], "image_size", 384)
    monkeypatch.setitem(tinyllava.VISION["siglip"], "patch_size", 14)
    write_checkpoint(tmp_path / "source", "phi")
    phi_vocabulary(tmp_path / "source")
    processor = load_processor(str(imported(tmp_path / "source")))
    ask = Conversation("", "", ("a.png",), (Turn("user", "<image>\nWhat are these?"),), {})
    encoder, sink = Encoder(processor, 3072), io.BytesIO()
    Image.new("RGB", (40, 30)).save(sink, "PNG")
    assert encoder.renderer.prompt(ask.turns) == SENTENCE + " USER: <image>\nWhat are these? ASSISTANT:"
    ids = encoder.prompt_ids(ask, [sink.getvalue()]).tolist()
    assert len(ids) == 769
    assert ids[28:32] == [1294, 1137, 25, 220]
    assert ids[32:760] == [50295] * 728
    assert ids[760:] == [198, 2061, 389, 777, 30, 24994, 8808, 8643, 25]
    # text that says an added token is that token, as in the original
    assert processor.tokenizer("<|endoftext|>   \t\t")["input_ids"] == [50256, 50285, 50294]


def test_text_behind_an_image_begins_as_a_text_of_its_own(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", "llama")
    tokenizer = load_processor(str(imported(tmp_path / "source"))).tokenizer
    blank, line, first = 259, 3 + ord("\n"), 3 + ord("U")
    assert tokenizer("U<image>\nU</s>U")["input_ids"] == [1, blank, first, 260, blank, line, first, 2, first]


def expanded(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """The original's rule for ``pad``."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


@pytest.mark.parametrize("aspect", ["square", "pad"])
@pytest.mark.parametrize("tower", ["siglip", "clip"])
def test_pixels_are_those_of_the_originals_preprocessing(tmp_path: Path, tower: str, aspect: str) -> None:
    write_checkpoint(tmp_path / "source", "qwen2", tower, image_aspect_ratio=aspect)
    processor = load_processor(str(imported(tmp_path / "source")))
    side, colour = {"height": 12, "width": 12}, (127, 127, 127)
    theirs: Any = SiglipImageProcessorPil(size=side, resample=3, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    if tower == "clip":
        theirs, colour = CLIPImageProcessorPil(size={"shortest_edge": 12}, crop_size=side), (122, 116, 104)
    for width, height in ((37, 20), (20, 37), (33, 33), (12, 5), (5, 13)):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))
        expected = theirs(expanded(image, colour) if aspect == "pad" else image)["pixel_values"]
        assert np.array_equal(processor.features([image])["pixel_values"], np.array(expected))
        assert processor.positions([image.size]) == [8 if tower == "siglip" else 9]


@pytest.mark.parametrize(
    ("family", "name", "expected"),
    [
        ("phi", "microsoft/phi-2", "<|endoftext|>"),
        ("stablelm", "stabilityai/stablelm-2-zephyr-1_6b", "<|endoftext|>"),
        ("llama", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "</s>"),
        ("gemma", "google/gemma-2b-it", "<eos>"),
        ("qwen2", "Qwen/Qwen2-0.5B", "<|endoftext|>"),
        ("qwen2", "Qwen/Qwen2-0.5B-Instruct", "<|im_end|>"),
    ],
)
def test_answers_end_as_the_language_model_was_trained(tmp_path: Path, family: str, name: str, expected: str) -> None:
    write_checkpoint(tmp_path / "source", family, llm_model_name_or_path=name)
    folder = imported(tmp_path / "source")
    tokenizer = load_processor(str(folder)).tokenizer
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == f"{SENTENCE} USER: Why? ASSISTANT: So.{expected}"
    assert tokenizer.eos_token == expected
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert tokenizer.convert_tokens_to_ids(expected) in ends


def test_another_template_is_taken_where_it_is_asked_for(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", "qwen2")
    tokenizer = load_processor(str(imported(tmp_path / "source", "pretrain"))).tokenizer
    turns = [{"role": "user", "content": "Describe."}, {"role": "assistant", "content": "A cat"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "<image>A cat\n"


def with_tensors(change: dict[str, torch.Tensor | None]) -> Callable[[Path], None]:
    def edited(folder: Path) -> None:
        found = {n: t for n, t in (tensors_in(folder) | change).items() if t is not None}
        for file in folder.glob("*.safetensors"):
            file.unlink()
        write_shards(folder, found)

    return edited


def with_settings(**settings: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder, **settings)


def pickled(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04K\x01.")


def shortened(folder: Path) -> None:
    file = min(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-4])


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def no_text_config(folder: Path) -> None:
    edit(folder, text_config=None)


LAYER = "language_model.model.layers.0."
REFUSALS: dict[str, tuple[Callable[[Path], None], str]] = {
    "unknown": (with_tensors({"language_model.stray": torch.zeros(1)}), r"unknown: language_model\.stray"),
    "missing": (with_tensors({f"{LAYER}mlp.fc1.bias": None}), r"missing: .*layers\.0\.mlp\.fc1\.bias"),
    "shape": (
        with_tensors({"connector._connector.0.bias": torch.zeros(3)}),
        r"another shape or type .*: connector\._connector\.0\.bias",
    ),
    "type": (
        with_tensors({f"{LAYER}mlp.fc1.bias": torch.zeros(48, dtype=torch.int8)}),
        r"another shape or type .*layers\.0\.mlp\.fc1\.bias",
    ),
    "no bias": (with_tensors({"language_model.lm_head.bias": None}), r"missing: language_model\.lm_head\.bias"),
    "mamba": (with_tensors({f"{LAYER}mamba.D": torch.zeros(1)}), "decant import-matvlm"),
    "connector": (with_settings(connector_type="qformer"), r"connector_type: 'qformer' .*expected mlp2x_gelu"),
    "strategy": (with_settings(vision_feature_select_strategy="cls"), r"select_strategy: 'cls' .*patch or cls_patch"),
    "language": (with_settings(text_config={"model_type": "openelm"}), r"text_config\.model_type: 'openelm'"),
    "sizes": (with_settings(text_config={"model_type": "phi", "hidden_size": "x"}), "text_config: .*hidden_size"),
    "tower": (with_settings(vision_config={"model_type": "dinov2"}), r"vision_config\.model_type: 'dinov2'"),
    "two towers": (with_settings(vision_model_name_or_path2="facebook/dinov2"), "two vision towers"),
    "no text": (no_text_config, "text_config is missing; put the configuration"),
    "aspect": (with_settings(image_aspect_ratio="anyres"), r"image_aspect_ratio: 'anyres' .*square or pad"),
    "quantised": (with_settings(quantization_config={"bits": 4}), "quantised"),
    "pickled": (pickled, r"pickled \(pytorch_model\.bin\).*save_file"),
    "cut off": (shortened, r"model-00001-of-00002\.safetensors: is no safetensors file, or is cut off"),
    "shard": (
        without("model-00002-of-00002.safetensors"),
        r"model-00002-of-00002\.safetensors of .*index.* is missing",
    ),
    "no config": (without("config.json"), r"no config\.json"),
    "no tokenizer": (without("merges.txt"), "has no tokenizer .*copy the tokenizer files of microsoft/phi-2"),
    "adapter": (lambda folder: (folder / "adapter_config.json").write_text("{}") and None, "LoRA adapter"),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_what_llava_cannot_hold_exactly_is_refused_and_nothing_is_left(tmp_path: Path, kind: str) -> None:
    change, message = REFUSALS[kind]
    write_checkpoint(tmp_path / "source", "phi")
    change(tmp_path / "source")
    with pytest.raises(ConfigInvalid, match=message) as error:
        imported(tmp_path / "source")
    assert str(tmp_path / "source") in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_pickled_parts_are_refused(tmp_path: Path) -> None:
    write_parts(tmp_path / "source", "phi")
    (tmp_path / "source/connector/model.safetensors").rename(tmp_path / "source/connector/pytorch_model.bin")
    with pytest.raises(ConfigInvalid, match=r"source/connector: has its weights pickled \(pytorch_model\.bin\)"):
        imported(tmp_path / "source")


def test_head_that_is_not_the_embedding_it_is_tied_to_is_refused(tmp_path: Path) -> None:
    theirs = write_checkpoint(tmp_path / "source", "qwen2")
    weight = theirs.tensors()["language_model.model.embed_tokens.weight"]
    with_tensors({"language_model.lm_head.weight": weight.clone()})(tmp_path / "source")
    compare(imported(tmp_path / "source"), theirs)
    (tmp_path / "teacher").rename(tmp_path / "first")
    with_tensors({"language_model.lm_head.weight": weight + 1})(tmp_path / "source")
    with pytest.raises(ConfigInvalid, match=r"lm_head\.weight is not the embedding's"):
        imported(tmp_path / "source")


def test_tokenizers_that_need_other_code_or_lack_the_templates_end_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", "stablelm")
    with pytest.raises(ConfigInvalid, match="template gemma ends answers with <eos>, which the tokenizer has not"):
        imported(tmp_path / "source", "gemma")
    with pytest.raises(ConfigInvalid, match="--template vicuna: is none of phi, llama"):
        imported(tmp_path / "source", "vicuna")
    code = {
        "tokenizer_class": "Arcade100kTokenizer",
        "auto_map": {"AutoTokenizer": ["arcade.Arcade100kTokenizer", None]},
    }
    (tmp_path / "source/tokenizer_config.json").write_text(json.dumps(code))
    with pytest.raises(
        ConfigInvalid, match=r"cannot be read: .*put tokenizer\.json and tokenizer_config\.json of stabilityai"
    ):
        imported(tmp_path / "source")


def test_existing_destination_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", "phi")
    (tmp_path / "teacher").mkdir()
    with pytest.raises(ConfigInvalid, match="exists already"):
        imported(tmp_path / "source")
