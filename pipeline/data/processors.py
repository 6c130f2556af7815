"""How one teacher reads text and images: its tokenizer, its chat template, and what its vision tower is given."""

import inspect
from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps
from transformers import AutoProcessor, AutoTokenizer, LlavaImageProcessorPil
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from pipeline.folders import folder_config
from pipeline.hub import as_teacher, folder_of
from pipeline.models import load_config
from schemas.config import TeacherConfig
from schemas.errors import ConfigInvalid, SampleInvalid
from schemas.hybrid import RECORD

Aspect = Literal["processor", "square", "pad"]
Size = tuple[int, int]
# What stands between images where only their tokens are counted; no image token.
BETWEEN = "\n"
# Most models bring the shorter side to their own size, and the longer one with it: at 336 pixels this is 23 megapixels.
# Also what Qwen2-VL takes at the most.
MOST_RATIO = 200
# What is padded to a square is made smaller first where the square would take gigabytes; a tower sees a few hundred.
LONGEST_PADDED = 8192


class Processor:
    """Tokenizer, template and, for a vision-language model, image processing; without a GPU, a network or torchvision.

    ``image_token`` stands once for every image position of a sequence; both it and its id are None for a text model.
    """

    def __init__(self, tokenizer: Any, template: str | None, whole: Any = None, aspect: Aspect = "processor") -> None:
        """``whole`` is transformers' processor of the model, which knows how many positions an image has."""
        self.tokenizer, self.template, self.whole, self.aspect = tokenizer, template, whole, aspect
        self.image_token: str | None = getattr(whole, "image_token", None)
        self.image_token_id: int | None = getattr(whole, "image_token_id", None)
        # patches a side that make one position, of models that see images of any side ratio
        self.merge: int = getattr(getattr(whole, "image_processor", None), "merge_size", 0)
        if self.merge and aspect != "processor":
            raise ConfigInvalid(f"teacher.aspect: `{aspect}`: this model takes images as they are; use `processor`")
        self.pads = aspect == "pad" or isinstance(getattr(whole, "image_processor", None), LlavaImageProcessorPil)
        # any will do, since padding is masked
        self.pad_id = int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0)

    @property
    def image_processor(self) -> Any:
        """Transformers' processor of images alone."""
        return self.whole.image_processor

    def features(self, images: Sequence[Image.Image]) -> dict[str, np.ndarray]:
        """What the model takes of one sample's images: ``pixel_values``, and of some families sizes or grids.

        Rows of the first axis are images, or for Qwen2-VL and its kin their patches.
        """
        framed = [self._framed(image) for image in images]
        # nested, because some families see several images of one sample in less detail than one
        found = self.image_processor([framed], return_tensors="np")
        return {name: np.asarray(value) for name, value in found.items()}

    def positions(self, sizes: Sequence[Size]) -> list[int]:
        """How many positions each image of one sample has, by the (width, height) of all of them.

        Raises:
            SampleInvalid: an image is too long for its width.
        """
        for width, height in sizes:
            if max(width, height) > MOST_RATIO * min(width, height):
                raise SampleInvalid(
                    f"image: {width} × {height} pixels: one side is more than {MOST_RATIO} times the other"
                )
        return list(self._positions(tuple(sizes)))

    @lru_cache(maxsize=65536)  # noqa: B019 - a process has one processor or two, for as long as it lives
    def _positions(self, sizes: tuple[Size, ...]) -> tuple[int, ...]:
        assert self.image_token is not None
        if self.merge:  # by arithmetic: these models see images in their own size, which takes long to process
            patches = (self.image_processor.get_number_of_image_patches(height, width) for width, height in sizes)
            return tuple(count // self.merge**2 for count in patches)
        blank = [self._framed(Image.new("RGB", size)) for size in sizes]
        text = BETWEEN.join([self.image_token] * len(sizes))
        ids = self.whole(text=[text], images=[blank])["input_ids"][0]
        counts = tuple(len(list(run)) for token, run in groupby(ids) if token == self.image_token_id)
        assert len(counts) == len(sizes), f"{len(sizes)} images gave {len(counts)} runs of image tokens"
        return counts

    def _framed(self, image: Image.Image) -> Image.Image:
        """The image with the side ratio that the tower takes, where that is not left to the image processor."""
        if self.pads and max(image.size) > LONGEST_PADDED:
            image = ImageOps.contain(image, (LONGEST_PADDED, LONGEST_PADDED))
        width, height = image.size
        if self.aspect == "processor" or width == height:
            return image
        if self.aspect == "pad":
            side = max(width, height)
            # the mean of the training images, as LLaVA and TinyLLaVA fill
            colour = tuple(int(255 * mean) for mean in self.image_processor.image_mean)
            square = Image.new("RGB", (side, side), colour)
            square.paste(image, ((side - width) // 2, (side - height) // 2))
            return square
        size = getattr(self.image_processor, "crop_size", None) or self.image_processor.size
        side = size.get("height") or size.get("shortest_edge")
        return image.resize((side, side), Image.Resampling.BICUBIC)


def load_processor(source: str | Path | TeacherConfig) -> Processor:
    """The processor of a teacher or of an exported student.

    Raises:
        ConfigInvalid: the folder lacks its files, or they need code that is not trusted.
    """
    teacher, folder = as_teacher(source), folder_of(source)
    config, trust = load_config(teacher, student=True), teacher.trust_remote_code
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust)
        if not hasattr(config, "vision_config"):
            return Processor(tokenizer, tokenizer.chat_template)
        whole = _whole(folder, config, tokenizer, trust)
    except (OSError, ValueError) as error:
        raise ConfigInvalid(f"teacher.path: {teacher.path}: tokenizer or processor cannot be read: {error}") from None
    # an exported student reads images as it was trained to
    record = folder_config(folder).get(RECORD, {"teacher": {"aspect": teacher.aspect}})
    aspect = record["teacher"].get("aspect", "processor")
    return Processor(tokenizer, whole.chat_template or tokenizer.chat_template, whole, aspect)


def _whole(folder: str, config: Any, tokenizer: Any, trust: bool) -> Any:
    if trust and type(config) not in PROCESSOR_MAPPING:
        return AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=True)
    # PIL's resampling is what models were trained with, and the same on every machine; torchvision's differs
    images = AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
    kind = _without_video(PROCESSOR_MAPPING[type(config)])
    said, _ = kind.get_processor_dict(folder, local_files_only=True)
    known = inspect.signature(kind.__init__).parameters
    given = {name: value for name, value in said.items() if name in known}
    parts = dict.fromkeys(kind.get_attributes()) | {"image_processor": images, "tokenizer": tokenizer}
    return kind(**{**given, **parts})


def _without_video(kind: Any) -> Any:
    """The processor's class for images alone: the part for video needs torchvision, and no teacher here sees video."""

    class StillImages(kind):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument is None and "video" in argument_name:
                return type(None)
            return super().check_argument_for_proper_class(argument_name, argument)

    return StillImages
