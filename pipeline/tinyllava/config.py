"""The configuration of a TinyLLaVA checkpoint as transformers' Llava, with all that its config.json leaves out."""

from collections.abc import Iterable
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CLIPVisionConfig,
    GemmaConfig,
    LlamaConfig,
    LlavaConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    SiglipVisionConfig,
    StableLmConfig,
)

from pipeline.tinyllava.layout import Checkpoint
from schemas.errors import ConfigInvalid

# The classes' defaults are those of the releases that TinyLLaVA was trained with; config.json holds what differs.
LANGUAGE: dict[str, type[PreTrainedConfig]] = {
    "phi": PhiConfig,
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "stablelm": StableLmConfig,
    "gemma": GemmaConfig,
}
VISION: dict[str, type[PreTrainedConfig]] = {
    "siglip_vision_model": SiglipVisionConfig,
    "clip_vision_model": CLIPVisionConfig,
}
CONNECTOR = "mlp2x_gelu"
STRATEGIES = {"patch": "default", "cls_patch": "full"}
# Rotary settings that are no fields of the classes any more and go into their rope_parameters.
ROTARY = ("rope_theta", "rope_scaling", "partial_rotary_factor")
LEGACY_LANGUAGE = {
    "TinyLlavaPhiForCausalLM": "phi",
    "TinyLlavaStablelmForCausalLM": "stablelm",
    "TinyLlavaLlamaForCausalLM": "llama",
}
_SO400M = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
# The towers that configurations from before TinyLLaVA Factory give by name alone.
TOWERS: dict[str, dict[str, Any]] = {
    "google/siglip-so400m-patch14-384": _SO400M,
    "bczhou/TinyLLaVA-3.1B-SigLIP": _SO400M,
    "bczhou/TinyLLaVA-2.0B-SigLIP": _SO400M,
    "bczhou/TinyLLaVA-1.5B-SigLIP": _SO400M,
    "openai/clip-vit-large-patch14-336": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
    },
}


def llava_config(checkpoint: Checkpoint) -> LlavaConfig:
    """The checkpoint's configuration, with its own vocabulary; the image token is for the tokenizer to say.

    Raises:
        ConfigInvalid: a part is of a kind that Llava has not, or is not described.
    """
    said = _legacy(checkpoint) if checkpoint.layout == "legacy" else checkpoint.config
    where = f"{checkpoint.folder}: config.json"
    if said.get("vision_model_name_or_path2"):
        raise ConfigInvalid(f"{where}: vision_model_name_or_path2: two vision towers; Llava has one")
    strategy = said.get("vision_feature_select_strategy", "patch")
    _one_of(said.get("connector_type"), [CONNECTOR], f"{where}: connector_type")
    _one_of(strategy, STRATEGIES, f"{where}: vision_feature_select_strategy")
    text, vision = _text(said, where), _part(said, "vision_config", VISION, where)
    if vision.model_type == "siglip_vision_model":
        names = checkpoint.tensors
        vision.vision_use_head = any(n.startswith("vision_tower._vision_tower.vision_model.head.") for n in names)
    config = LlavaConfig(
        text_config=text,
        vision_config=vision,
        vision_feature_layer=said.get("vision_feature_layer", -2),
        vision_feature_select_strategy=STRATEGIES[strategy],
        projector_hidden_act="gelu",
        multimodal_projector_bias=True,
        tie_word_embeddings=text.tie_word_embeddings,
        architectures=["LlavaForConditionalGeneration"],
    )
    config.image_seq_length = image_positions(config)
    return config


def extra_tokens(config: LlavaConfig) -> int:
    """Positions of the vision tower that are no patches: CLIP's class token."""
    return int(config.vision_config.model_type == "clip_vision_model")


def image_positions(config: LlavaConfig) -> int:
    """Positions of an image: all the tower's, or with the strategy ``default`` all but the first.

    SigLIP has no class token, so that its first patch is what is lost; the models were trained that way.
    """
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    return int(patches + extra_tokens(config) - (config.vision_feature_select_strategy == "default"))


def _one_of(value: Any, known: Iterable[str], where: str) -> None:
    if value not in known:
        raise ConfigInvalid(f"{where}: {value!r} is not supported; expected {' or '.join(known)}")


def _text(said: dict[str, Any], where: str) -> PreTrainedConfig:
    values = said.get("text_config") or {}
    if values.get("model_type") == "gemma":
        # The first Gemma configurations say ``gelu`` and mean its approximation, as transformers has it since 4.39.
        meant = values.get("hidden_activation") or "gelu_pytorch_tanh"
        said = said | {"text_config": values | {"hidden_act": meant}}
    return _part(said, "text_config", LANGUAGE, where)


def _part(said: dict[str, Any], key: str, known: dict[str, type[PreTrainedConfig]], where: str) -> PreTrainedConfig:
    """A part's configuration: what its class knows. What else is written there has no effect on what it computes."""
    values = said.get(key)
    if not values:
        raise ConfigInvalid(
            f"{where}: {key} is missing; put the configuration of the model that it was made from there"
        )
    kind = values.get("model_type")
    _one_of(kind, known, f"{where}: {key}.model_type")
    fields = {*known[kind].__dataclass_fields__, *ROTARY} - PreTrainedConfig.__dataclass_fields__.keys()
    try:
        return known[kind](**{k: v for k, v in values.items() if k in fields})
    except StrictDataclassError as error:
        raise ConfigInvalid(f"{where}: {key}: {' '.join(str(error).split())}") from None


def _legacy(checkpoint: Checkpoint) -> dict[str, Any]:
    """A configuration from before TinyLLaVA Factory, in its terms."""
    said, where = checkpoint.config, f"{checkpoint.folder}: config.json"
    kind, tower = next(iter(said.get("architectures") or [""])), said.get("mm_vision_tower", "")
    _one_of(kind, LEGACY_LANGUAGE, f"{where}: architectures")
    _one_of(tower, TOWERS, f"{where}: mm_vision_tower")
    vision = dict(TOWERS[tower])
    features = {
        "vision_feature_layer": said.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": said.get("mm_vision_select_feature", "patch"),
    }
    if vision["model_type"] == "siglip_vision_model":
        features = _legacy_siglip(checkpoint, vision)
    return {
        "text_config": said | {"model_type": LEGACY_LANGUAGE[kind]},
        "vision_config": vision,
        "connector_type": said.get("mm_projector_type"),
        **features,
    }


def _legacy_siglip(checkpoint: Checkpoint, vision: dict[str, Any]) -> dict[str, Any]:
    """Its code removed SigLIP's last layer, took what the one before gives and kept every patch, whatever was set."""
    prefix = "vision_tower._vision_tower.vision_model.encoder.layers."
    layers = {int(n.removeprefix(prefix).split(".")[0]) for n in checkpoint.tensors if n.startswith(prefix)}
    removed = len(layers) == vision["num_hidden_layers"] - 1
    vision["num_hidden_layers"] -= removed
    return {"vision_feature_layer": -1 if removed else -2, "vision_feature_select_strategy": "cls_patch"}
