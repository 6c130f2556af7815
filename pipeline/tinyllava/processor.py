"""How a TinyLLaVA checkpoint reads text and images, as a transformers processor.

Owns the image token, the rule that text around an image is tokenised in pieces, and the images' preprocessing.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Regex, normalizers
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling

from pipeline.data.templates import ENDS, TEMPLATES
from pipeline.tinyllava.config import extra_tokens
from pipeline.tinyllava.layout import Checkpoint
from schemas.errors import ConfigInvalid

IMAGE = "<image>"
# What says a vocabulary, whole: the fast format, byte-pair merges, or SentencePiece.
VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",))
TOKENIZER_FILES = (
    *(name for names in VOCABULARIES for name in names),
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
)
# A text with one image, and one with nothing beside it.
PROBES = (f"USER: {IMAGE}\nWhat are these? ASSISTANT:", f"USER: {IMAGE} ASSISTANT:")
ASPECTS = ("square", "pad")
TEMPLATE_OF = {"phi": "phi", "llama": "llama", "stablelm": "phi", "gemma": "gemma", "qwen2": "qwen2_base"}
# Families whose training padded with the unknown token.
PADS_WITH_UNKNOWN = ("phi", "llama", "gemma")


def template_name(checkpoint: Checkpoint, config: LlavaConfig, wanted: str | None) -> str:
    """The conversation template that the language model was trained with, unless another is wanted.

    Raises:
        ConfigInvalid: there is no such template.
    """
    if wanted is not None and wanted not in TEMPLATES:
        raise ConfigInvalid(f"--template {wanted}: is none of {', '.join(TEMPLATES)}")
    family = config.text_config.model_type
    instructed = "instruct" in checkpoint.made_from.lower()
    return wanted or ("qwen2_instruct" if family == "qwen2" and instructed else TEMPLATE_OF[family])


def read_tokenizer(checkpoint: Checkpoint, family: str, template: str) -> PreTrainedTokenizerFast:
    """The checkpoint's tokenizer as a fast one with ``<image>`` as a special token and the template's end as end.

    Raises:
        ConfigInvalid: its files are missing or need more than transformers, or it would read text in another way.
    """
    source = _load(_tokenizer_folder(checkpoint), checkpoint)
    end = ENDS.get(template, source.eos_token)
    if end not in source.get_vocab():
        raise ConfigInvalid(
            f"{checkpoint.folder}: template {template} ends answers with {end}, which the tokenizer has not; "
            "choose another with --template"
        )
    pad = source.unk_token if family in PADS_WITH_UNKNOWN else source.pad_token
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=source.backend_tokenizer,
        bos_token=source.bos_token,
        eos_token=end,
        unk_token=source.unk_token,
        pad_token=pad or end,
        additional_special_tokens=[IMAGE],
        padding_side=source.padding_side,
        model_max_length=checkpoint.config.get("tokenizer_model_max_length", source.model_max_length),
    )
    tokenizer.chat_template = TEMPLATES[template]
    _keep_pieces(tokenizer, checkpoint)
    return tokenizer


def build_processor(checkpoint: Checkpoint, config: LlavaConfig, tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Tokenizer and image preprocessing together.

    Raises:
        ConfigInvalid: images are preprocessed in a way that Llava has not.
    """
    return LlavaProcessor(
        image_processor=_image_processor(checkpoint, config),
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=tokenizer.chat_template,
        image_token=IMAGE,
        num_additional_image_tokens=extra_tokens(config),
    )


def _tokenizer_folder(checkpoint: Checkpoint) -> Path:
    folders = (checkpoint.folder, checkpoint.folder / "language_model")
    for folder in folders:
        if any(all((folder / name).is_file() for name in names) for names in VOCABULARIES):
            return folder
    raise ConfigInvalid(
        f"{checkpoint.folder}: has no tokenizer ({' or '.join(' and '.join(names) for names in VOCABULARIES)}); "
        f"copy the tokenizer files of {checkpoint.made_from} there"
    )


def _load(folder: Path, checkpoint: Checkpoint) -> Any:
    # away from config.json, whose model type transformers does not know
    with tempfile.TemporaryDirectory() as scratch:
        for name in TOKENIZER_FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, Path(scratch) / name)
        try:
            return AutoTokenizer.from_pretrained(scratch, local_files_only=True, trust_remote_code=False)
        # a tokenizer's files have no format of their own, and reading them fails in as many ways
        except Exception as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ConfigInvalid(
                f"{folder}: the tokenizer cannot be read: {reason}; put tokenizer.json and tokenizer_config.json of "
                f"{checkpoint.made_from} in the place of its tokenizer files"
            ) from None


def _keep_pieces(tokenizer: PreTrainedTokenizerFast, checkpoint: Checkpoint) -> None:
    """Makes the text behind an image begin as a text of its own does, as where the original splits there.

    Only a tokenizer that puts a blank in front of the first word alone does otherwise. What follows an image begins
    with white space; what follows an end token, before which the original does not split, does not.
    """
    backend = tokenizer.backend_tokenizer
    if not _in_pieces(tokenizer) and backend.normalizer is None:
        backend.normalizer = normalizers.Replace(Regex(r"^(?=\s)"), "▁")
    if not _in_pieces(tokenizer):
        raise ConfigInvalid(
            f"{checkpoint.folder}: the tokenizer does not split text at {IMAGE} as the original does, "
            "so that the model would read other tokens than it was trained on"
        )


def _in_pieces(tokenizer: PreTrainedTokenizerFast) -> bool:
    return all(tokenizer(text)["input_ids"] == _pieces(tokenizer, text) for text in PROBES)


def _pieces(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """The original's rule: each piece is tokenised alone, and BOS stays in front of the first one only."""
    before, after = (tokenizer(piece)["input_ids"] for piece in text.split(IMAGE))
    begins = int(before[:1] == [tokenizer.bos_token_id])
    return [*before, tokenizer.convert_tokens_to_ids(IMAGE), *after[begins:]]


def _image_processor(checkpoint: Checkpoint, config: LlavaConfig) -> Any:
    """Resizing as published with the tower; ``pad`` makes the image square first, in the colour of the mean."""
    if checkpoint.aspect not in ASPECTS:
        raise ConfigInvalid(
            f"{checkpoint.folder}: config.json: image_aspect_ratio: {checkpoint.aspect!r} is not supported; "
            f"expected {' or '.join(ASPECTS)}"
        )
    side = config.vision_config.image_size
    square = {"height": side, "width": side}
    settings: dict[str, Any] = {"size": square, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    kind, crops = SiglipImageProcessorPil, config.vision_config.model_type == "clip_vision_model"
    if crops:
        size = {"size": {"shortest_edge": side}, "crop_size": square}
        kind, settings = CLIPImageProcessorPil, {**size, "image_mean": OPENAI_CLIP_MEAN, "image_std": OPENAI_CLIP_STD}
    settings["resample"] = PILImageResampling.BICUBIC
    if checkpoint.aspect == "pad":
        return LlavaImageProcessorPil(do_pad=True, do_center_crop=crops, **settings)
    return kind(**settings)
