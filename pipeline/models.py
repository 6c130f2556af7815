"""Loads pretrained models without network, pickle or remote code, and names the parts of one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)
from transformers.activations import NewGELUActivation
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from pipeline.folders import folder_config
from pipeline.headers import tensors_of
from pipeline.hub import as_teacher, folder_of
from schemas.config import TeacherConfig
from schemas.errors import ConfigInvalid
from schemas.hybrid import MODEL_TYPE, RECORD
from schemas.sections import Device

HEAD_BIAS = "lm_head.bias"
# Enough for every position to have another state.
CHECKED_TOKENS = 8
# The same operations on the same numbers, with one rounding more where a division became a product: units in the last
# place of the largest logit. In bfloat16 that is 1.6 %; a cap at 30 takes 3.5 % off a logit of 10.
LOGITS_ROUNDING = 2.0


class BiasedHead(nn.Linear):
    """A language head with a bias where the stock class has none: vision-language classes leave out Phi-2's."""


def base_config(settings: dict[str, Any], base: str) -> Any:
    """The configuration of the model that a hybrid was made of, of what stands in the hybrid's ``config.json``."""
    own = {name: value for name, value in settings.items() if name != RECORD}
    return CONFIG_MAPPING[base].from_dict({**own, "model_type": base})


def has_image_positions(config: Any) -> bool:
    """Whether a token's (3-D) position depends on the images before it and not on its place alone."""
    text = config.get_text_config()
    rotary = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    return "mrope_section" in rotary


def pick_device(device: Device) -> torch.device:
    """The device to compute on; ``auto`` takes CUDA where there is one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def load_config(source: str | Path | TeacherConfig, *, student: bool = False) -> Any:
    """The model's configuration, with the defaults of its class; of an exported ``student`` its base model's.

    Raises:
        ConfigInvalid: the folder has none, or its class is the repository's own code and that is not trusted.
    """
    teacher = as_teacher(source)
    folder = folder_of(teacher)
    settings = folder_config(folder)
    if settings.get("model_type") == MODEL_TYPE:
        if not student:
            raise ConfigInvalid(f"teacher.path: {teacher.path}: is an exported student, which is no teacher here")
        return base_config(settings, settings[RECORD]["base"])
    if settings.get("model_type") == "tinyllava":
        raise ConfigInvalid(
            f"teacher.path: {teacher.path}: is a checkpoint of TinyLLaVA's own code; "
            f"`decant import-teacher {teacher.path} FOLDER` makes a teacher of it"
        )
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=teacher.trust_remote_code)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        if "trust_remote_code" in str(error):
            reason = (
                "its model class is Python code in the repository; to run that, give teacher.revision as a commit that "
                "you have read, and teacher.trust_remote_code"
            )
        raise ConfigInvalid(f"teacher.path: {teacher.path}: config.json cannot be used: {reason}") from None


def load_model(
    source: str | Path | TeacherConfig,
    dtype: torch.dtype,
    device: torch.device,
    spread: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """The teacher's model in eval mode without gradients, from safetensors only; its language head's bias is kept.

    It is whole on ``device``, or where ``spread`` puts its parts (see ``pipeline.spread``).
    """
    transformers_logging.disable_progress_bar()
    teacher = as_teacher(source)
    model = model_loader(teacher).from_pretrained(
        folder_of(teacher),
        dtype=dtype,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=teacher.trust_remote_code,
        **(spread or {}),
    )
    fuse_activations(model)
    return cast(PreTrainedModel, (model if spread else model.to(device)).eval().requires_grad_(False))


def _class_for(config: Any) -> Any:
    return AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM


def build_model(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """A model of the configuration whose weights are not even initialised; the caller loads every one."""
    with no_init_weights():
        model = cast(PreTrainedModel, _class_for(config).from_config(config, dtype=dtype))
    model.tie_weights()
    fuse_activations(model)
    return model.eval().requires_grad_(False)


def model_loader(teacher: TeacherConfig) -> Any:
    """What loads the teacher's model: an auto class, or one with a bias at its head where the weights hold one."""
    config, files = load_config(teacher), Path(folder_of(teacher)).glob("*.safetensors")
    if not any(name.endswith(HEAD_BIAS) for file in files for name in tensors_of(file)):
        return _class_for(config)
    with torch.device("meta"):
        return _with_head_bias(type(build_model(config, torch.float32)))


def _with_head_bias(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    class Biased(stock):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            if head(self).bias is None:
                add_head_bias(self)

    # transformers writes the name down as the architecture, and renames a file's tensors for its own modules' classes
    Biased.__name__, Biased.__module__ = stock.__name__, stock.__module__
    return Biased


def add_head_bias(model: PreTrainedModel) -> None:
    """Gives the language head a bias, of zeros; the weight stays the same parameter."""
    old = head(model)
    new = BiasedHead(old.in_features, old.out_features, device="meta")
    new.weight = old.weight
    new.bias = nn.Parameter(old.weight.new_zeros(old.out_features))
    model.set_output_embeddings(new.requires_grad_(False))


def fuse_activations(model: nn.Module) -> None:
    """Computes ``gelu_new`` (Phi's) by torch's kernel of the same function, in place.

    transformers spells it out in eight operations, which are a fifth of a training step's time and two fifths of its
    memory at Phi-2's size, and round eight times in bfloat16.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))


def body(model: PreTrainedModel) -> nn.Module:
    """Everything below the language head: its output's ``last_hidden_state`` is [B, L, D].

    Raises:
        ConfigInvalid: the model keeps it elsewhere, as GPT-2 and its time do.
    """
    inner = getattr(model, "model", None)
    if inner is None:
        raise ConfigInvalid(f"teacher.path: {type(model).__name__} has no decoder of layers with self_attn")
    return cast(nn.Module, inner)


def head(model: PreTrainedModel) -> nn.Linear:
    """The language head, [D] to [V]."""
    return cast(nn.Linear, model.get_output_embeddings())


class LogitsHead(nn.Module):
    """The language head and what its model does to the logits after it: scales them, or caps them at ±``cap``."""

    def __init__(self, linear: nn.Linear, scale: float, cap: float | None) -> None:
        super().__init__()
        self.linear, self.scale, self.cap = linear, scale, cap
        self.out_features = linear.out_features

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of states [..., D]."""
        logits = self.linear(hidden) * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def logits_head(model: PreTrainedModel) -> nn.Module:
    """What makes the model's logits [..., V] of its last hidden states [..., D]; has ``out_features``.

    It goes by the model's own configuration: Gemma caps logits, Granite divides and Cohere multiplies them. A
    vision-language model around one of these leaves them as they are.
    """
    config, linear = model.config, head(model)
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    cap = getattr(config, "final_logit_softcapping", None)
    return linear if scale == 1 and not cap else LogitsHead(linear, scale, cap)


@torch.no_grad()
def check_logits(model: PreTrainedModel) -> None:
    """Compares the logits of a few tokens with those that the model's own forward gives.

    Raises:
        ConfigInvalid: it does to them what its configuration does not tell.
    """
    tokens = torch.arange(1, 1 + CHECKED_TOKENS, device=model.device)[None]
    expected = model(input_ids=tokens, use_cache=False).logits.float()
    found = logits_head(model)(body(model)(input_ids=tokens, use_cache=False).last_hidden_state).float()
    error = float((found - expected).abs().max() / expected.abs().max())
    if not error <= LOGITS_ROUNDING * torch.finfo(model.dtype).eps:
        raise ConfigInvalid(
            f"teacher.path: {type(model).__name__} does more to its logits than its head and the settings "
            f"final_logit_softcapping, logits_scaling and logit_scale say: they differ by {error:.1%} of the largest. "
            "Its distribution cannot be had from its last hidden states; take a model of another class"
        )


def attention_kinds(config: Any) -> set[str]:
    """What a decoder's layers attend to, as transformers calls it: everything, where its configuration says nothing."""
    return set(getattr(config, "layer_types", None) or ("full_attention",))


def decoder(model: PreTrainedModel) -> nn.Module:
    """The decoder that holds ``layers[i].self_attn``, alone or inside a vision-language model."""
    inner = body(model)
    return cast(nn.Module, getattr(inner, "language_model", inner))


def connector(model: PreTrainedModel) -> nn.Module | None:
    """The vision-language connector, None for a text model.

    Llava and its kin call it ``multi_modal_projector``; in Qwen2-VL and 2.5-VL it is the vision tower's ``merger``.
    """
    inner = body(model)
    found = getattr(inner, "multi_modal_projector", None) or getattr(getattr(inner, "visual", None), "merger", None)
    return cast("nn.Module | None", found)
