"""Tiny random TinyLLaVA checkpoints in the layouts of the original, and what the original computes from them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    GemmaConfig,
    LlamaConfig,
    PhiConfig,
    Qwen2Config,
    SiglipVisionConfig,
    SiglipVisionModel,
    StableLmConfig,
)

from tests.decoders import randomise

END = "<|endoftext|>"
IMAGE_INDEX = -200
# What each config.json says of its language model; the rest is the classes' defaults, as in the published files.
COMMON = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
TEXT: dict[str, dict[str, Any]] = {
    # heads stay the class's 32: ten wide, four of them rotated
    "phi": {**COMMON, "hidden_size": 320, "partial_rotary_factor": 0.4, "vocab_size": 280, "resid_pdrop": 0.1},
    "qwen2": {**COMMON, **HEADS, "vocab_size": 280, "rope_theta": 1e6, "tie_word_embeddings": True},
    "stablelm": {**COMMON, **HEADS, "vocab_size": 280, "use_qkv_bias": True, "num_key_value_heads": 4},
    # as many as its tokenizer has: the image token needs a new row
    "llama": {**COMMON, **HEADS, "vocab_size": 260},
    "gemma": {**COMMON, **HEADS, "vocab_size": 260, "head_dim": 16, "hidden_act": "gelu"},
}
CONFIGS = {
    "phi": PhiConfig,
    "qwen2": Qwen2Config,
    "stablelm": StableLmConfig,
    "llama": LlamaConfig,
    "gemma": GemmaConfig,
}
# Two layers, of which the last is not used; three by three patches.
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION: dict[str, dict[str, Any]] = {
    "siglip": {**TOWER, "model_type": "siglip_vision_model", "image_size": 12, "patch_size": 4},
    "clip": {**TOWER, "model_type": "clip_vision_model", "image_size": 12, "patch_size": 4, "projection_dim": 16},
}
NAMES = {
    "phi": "microsoft/phi-2",
    "qwen2": "Qwen/Qwen2-0.5B",
    "stablelm": "stabilityai/stablelm-2-zephyr-1_6b",
    "llama": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "gemma": "google/gemma-2b-it",
}


@dataclass
class Original:
    """The parts of a checkpoint, and the forward pass of the original code."""

    language: nn.Module
    vision: nn.Module
    connector: nn.Sequential
    layer: int = -2
    drop_first: bool = True

    @torch.no_grad()
    def logits(self, ids: list[int], pixels: torch.Tensor) -> torch.Tensor:
        """Logits [positions, vocabulary] for token ids in which -200 stands for the image."""
        states = self.vision(pixels, output_hidden_states=True).hidden_states[self.layer]
        features = self.connector(states[0, int(self.drop_first) :])
        place, embed = ids.index(IMAGE_INDEX), self.language.get_input_embeddings()  # type: ignore[operator]
        before, after = torch.tensor(ids[:place]).long(), torch.tensor(ids[place + 1 :]).long()
        embeddings = torch.cat([embed(before), features, embed(after)])[None]
        found: torch.Tensor = self.language(inputs_embeds=embeddings).logits[0]
        return found

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor under the original's name."""
        parts = {
            "language_model.": self.language,
            "vision_tower._vision_tower.vision_model.": self.vision,
            "connector._connector.": self.connector,
        }
        found = {p + n: t.detach().clone() for p, m in parts.items() for n, t in m.state_dict().items()}
        if self.language.config.tie_word_embeddings:  # type: ignore[union-attr]
            del found["language_model.lm_head.weight"]
        return found


def original(family: str, tower: str = "siglip", **text: Any) -> Original:
    """A checkpoint's parts at random."""
    torch.manual_seed(0)
    # the original's releases of transformers all took Gemma's `gelu` for the tanh approximation; not all since have
    act = {"hidden_act": "gelu_pytorch_tanh"} if family == "gemma" else {}
    language = AutoModelForCausalLM.from_config(CONFIGS[family](**TEXT[family] | text | act))
    settings = {k: v for k, v in VISION[tower].items() if k != "model_type"}
    vision: nn.Module = (
        SiglipVisionModel(SiglipVisionConfig(**settings))
        if tower == "siglip"
        else CLIPVisionModel(CLIPVisionConfig(**settings))
    )
    width = language.config.hidden_size
    connector = nn.Sequential(nn.Linear(16, width), nn.GELU(), nn.Linear(width, width))
    for seed, part in enumerate((language, vision, connector)):
        randomise(part, seed)
        part.eval()
    return Original(language, vision, connector)


def settings_of(family: str, tower: str = "siglip", **changes: Any) -> dict[str, Any]:
    """The config.json that TinyLLaVA writes."""
    return {
        "architectures": ["TinyLlavaForConditionalGeneration"],
        "model_type": "tinyllava",
        "connector_type": "mlp2x_gelu",
        "image_aspect_ratio": "square",
        "image_token_index": IMAGE_INDEX,
        "llm_model_name_or_path": NAMES[family],
        "text_config": {"model_type": family, "torch_dtype": "float16", "_name_or_path": NAMES[family], **TEXT[family]},
        "tokenizer_model_max_length": 3072,
        "tokenizer_padding_side": "right",
        "tokenizer_use_fast": False,
        "vision_config": VISION[tower] | {"model_name_or_path": "google/siglip-so400m-patch14-384"},
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "patch",
        "vision_model_name_or_path2": "",
        **changes,
    }


def write_checkpoint(folder: Path, family: str, tower: str = "siglip", **changes: Any) -> Original:
    """A checkpoint as TinyLLaVA Factory saves it after fine-tuning, in two shards."""
    model = original(family, tower)
    folder.mkdir()
    write_shards(folder, model.tensors())
    (folder / "config.json").write_text(json.dumps(settings_of(family, tower, **changes)))
    write_tokenizer(folder, family)
    return model


def write_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Two shards with their index."""
    names = sorted(tensors)
    files = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, chosen in files.items():
        save_file({n: tensors[n].contiguous() for n in chosen}, folder / file)
    index = {"metadata": {}, "weight_map": {n: file for file, chosen in files.items() for n in chosen}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_tokenizer(folder: Path, family: str) -> None:
    """Tokenizer files of the family's kind, with every byte as a token and no merges."""
    if family in ("llama", "gemma"):
        _write_metaspace(folder, family)
    else:
        _write_byte_level(folder, family)


def _write_byte_level(folder: Path, family: str) -> None:
    """GPT-2's kind: vocab.json and merges.txt, no tokenizer.json."""
    vocabulary = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))} | {END: 256}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    added = {"  ": 257} if family == "phi" else {"<|im_start|>": 257, "<|im_end|>": 258}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    kinds = {"phi": "CodeGenTokenizer", "qwen2": "Qwen2Tokenizer", "stablelm": "GPT2Tokenizer"}
    special = {"bos_token": END, "eos_token": END, "unk_token": END, "pad_token": END}
    if family == "qwen2":
        special |= {"bos_token": None, "unk_token": None}  # type: ignore[dict-item]
    settings = {"tokenizer_class": kinds[family], "model_max_length": 3072, "padding_side": "right", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").write_text(json.dumps({k: v for k, v in special.items() if v}))


def _write_metaspace(folder: Path, family: str) -> None:
    """SentencePiece's kind as its fast files say it; Llama's puts a blank in front of the first word alone."""
    special = ["<unk>", "<s>", "</s>"] if family == "llama" else ["<unk>", "<bos>", "<eos>"]
    vocabulary = {token: i for i, token in enumerate(special)}
    vocabulary |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)} | {"▁": 259}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    scheme = "first" if family == "llama" else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(single=f"{special[1]} $A", special_tokens=[(special[1], 1)])
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    backend.save(str(folder / "tokenizer.json"))
    names = dict(zip(("unk_token", "bos_token", "eos_token"), special, strict=True))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "right", "add_bos_token": True, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
