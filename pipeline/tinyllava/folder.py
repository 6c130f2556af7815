"""A TinyLLaVA checkpoint written as a native transformers folder, and the check that it is whole."""

from dataclasses import dataclass
from pathlib import Path

from transformers import GenerationConfig, LlavaConfig, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from pipeline.hub import as_teacher
from pipeline.models import model_loader
from pipeline.tinyllava.config import llava_config
from pipeline.tinyllava.layout import read_checkpoint
from pipeline.tinyllava.processor import IMAGE, build_processor, read_tokenizer, template_name
from pipeline.tinyllava.weights import account, stored_type, write_weights


@dataclass(frozen=True)
class Written:
    """What was written; ``rows`` are those that the vocabulary gained."""

    language: str
    vision: str
    dtype: str
    tensors: int
    template: str
    image_tokens: int
    aspect: str
    rows: int


def write_llava(source: Path, folder: Path, template: str | None = None) -> Written:
    """Writes the checkpoint's weights, configuration and processor; ``template`` names another than its own.

    Every check that needs no weights comes before any is copied. Nothing is downloaded, unpickled or executed.

    Raises:
        ConfigInvalid: the source is no TinyLLaVA checkpoint, or not one that Llava can hold exactly.
    """
    transformers_logging.disable_progress_bar()
    checkpoint = read_checkpoint(source)
    config = llava_config(checkpoint)
    found = account(checkpoint, config)
    name = template_name(checkpoint, config, template)
    tokenizer = read_tokenizer(checkpoint, config.text_config.model_type, name)
    processor = build_processor(checkpoint, config, tokenizer)
    rows = _place_image_token(config, tokenizer)
    config.dtype = str(stored_type(found)).removeprefix("torch.")
    write_weights(found, rows, folder)
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    _generation(config, tokenizer).save_pretrained(folder)
    _check(folder)
    parts = config.text_config.model_type, config.vision_config.model_type, config.dtype
    return Written(*parts, len(found), name, config.image_seq_length, checkpoint.aspect, rows)


def _place_image_token(config: LlavaConfig, tokenizer: PreTrainedTokenizerFast) -> int:
    """Tells the configuration the image token, and how many rows its vocabulary needs for it."""
    config.image_token_index = tokenizer.convert_tokens_to_ids(IMAGE)
    rows = max(0, config.image_token_index + 1 - config.text_config.vocab_size)
    config.text_config.vocab_size += rows
    return rows


def _generation(config: LlavaConfig, tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    """An answer ends with the template's end, or with what the language model's own configuration says."""
    own = config.text_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=sorted(ends), pad_token_id=tokenizer.pad_token_id
    )


def _check(folder: Path) -> None:
    """Has transformers read what was written, without the values: names and shapes must be the model's."""
    _, report = model_loader(as_teacher(folder)).from_pretrained(
        folder, device_map="meta", local_files_only=True, output_loading_info=True
    )
    wrong = {kind: sorted(names) for kind, names in report.items() if names}
    assert not wrong, wrong
