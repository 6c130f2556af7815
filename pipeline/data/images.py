"""Images of records: which files a record may name, and bytes as upright RGB pictures or as the error that they are.

Owns every limit on what a record can make this process read or decode.
"""

import io
import posixpath
import re
from threading import Lock
from typing import Literal
from urllib.parse import unquote

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from pipeline.data.conversations import Conversation
from pipeline.store import Store
from schemas.errors import SampleInvalid, shown

# What Pillow decodes by itself; others of its formats call programs such as Ghostscript. JPEG includes MPO.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
# 64 megapixels: a lossless WebP of them takes 1.0 GiB at its peak (two canvases, a frame, the picture, 4 bytes a pixel
# each), everything else less, so that a worker of 2 GiB has room for the rest.
MOST_PIXELS = 2**26
# Of an object store's key, and of a file's name on any file system: beyond them, asking fails as if a disk had failed.
LONGEST_KEY, LONGEST_NAME = 1024, 255
# An absolute path, a home folder, a Windows drive or its separators, a URL, and what ends a name in C.
OUTSIDE = re.compile(r"/|~|[A-Za-z]:|.*(\\|://|\0)", re.DOTALL)
# Pillow's switch is the process's; one picture at a time sets it.
SALVAGE = Lock()


def read_images(
    conversation: Conversation, images: Store, *, truncated: Literal["refuse", "keep"]
) -> tuple[bytes, ...]:
    """The conversation's image files, in order, each one checked to decode; none for a text-only record.

    A record names files below the root of ``images``. A symbolic link there is the user's and is followed; since no
    name may climb (``..``), a record reaches through a link only what lies below the link's target.

    Args:
        conversation: the record.
        images: the image root.
        truncated: what a file that ends too early is: an error, or what can be read of it (the rest grey or black),
            as PNG, so that every later reader sees the same picture.

    Raises:
        SampleInvalid: a file is not below the root, is missing or is no picture that can be decoded.
        StoreUnavailable: object storage does not answer.
    """
    found = []
    for number, image in enumerate(conversation.images):
        field = "image" if len(conversation.images) == 1 else f"images.{number}"
        where = f"{conversation.source}: record {shown(conversation.record)}: {field}"
        where, data = _located(image, images, where)
        try:
            found.append(_whole(data) if truncated == "refuse" else _kept(data))
        except SampleInvalid as error:
            raise SampleInvalid(f"{where}: {error}") from None
    return tuple(found)


def decode_image(data: bytes) -> Image.Image:
    """The picture as RGB, turned upright as its EXIF orientation says; of an animation the first frame.

    Transparency is dropped and 16-bit grey scaled to 8 bits.

    Raises:
        SampleInvalid: the bytes are no picture that can be decoded; the text is for a caller to put a place before.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise Image.DecompressionBombError
            return _rgb(image)
    except MemoryError:
        raise  # within the limit it is the machine that is too small
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise SampleInvalid(f"is not decoded: it claims more than {MOST_PIXELS:,} pixels") from None
    except UnidentifiedImageError:
        raise SampleInvalid("cannot be decoded: no JPEG, PNG, WebP, GIF or BMP, or its header is broken") from None
    except Exception as error:  # Pillow's parsers raise whatever they stumble over, struct.error and KeyError too
        raise SampleInvalid(f"cannot be decoded: {shown(str(error)) or type(error).__name__}") from None


def _rgb(image: Image.Image) -> Image.Image:
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "I;16":
        # Pillow's own conversion clips, which leaves all but the darkest white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "P":
        # straight to RGB, Pillow warns of the transparency that is to be dropped
        image = image.convert("RGBA")
    return image.convert("RGB")


def _located(image: str | bytes, images: Store, where: str) -> tuple[str, bytes]:
    """The place of an image, for messages, and its bytes."""
    if isinstance(image, bytes):
        return where, image
    key = _key(image, where)
    where = f"{where}: {images.path(shown(key))}"
    try:
        return where, images.fetch(key)
    except OSError as error:
        problem = "No such file" if isinstance(error, FileNotFoundError) else error.strerror or type(error).__name__
        raise SampleInvalid(f"{where}: {problem}") from None


def _key(name: str, where: str) -> str:
    """The name of a file below the root, in its shortest spelling."""
    plain = unquote(name)  # web servers read `%2e%2e` as `..`
    if OUTSIDE.match(plain) or ".." in plain.split("/"):
        raise SampleInvalid(
            f"{where}: expected a path below the image root, with forward slashes and no '..', got {shown(name)}"
        )
    key = posixpath.normpath(name)
    if key == "." or len(key.encode()) > LONGEST_KEY or any(len(p.encode()) > LONGEST_NAME for p in key.split("/")):
        raise SampleInvalid(f"{where}: expected a file's name, got {shown(name) or 'an empty one'}")
    return key


def _whole(data: bytes) -> bytes:
    decode_image(data)
    return data


def _kept(data: bytes) -> bytes:
    """The data where they decode, else a PNG of what can be read of them."""
    try:
        return _whole(data)
    except SampleInvalid:
        with SALVAGE:
            ImageFile.LOAD_TRUNCATED_IMAGES = True
            try:
                image = decode_image(data)
            finally:
                ImageFile.LOAD_TRUNCATED_IMAGES = False
    image.info.clear()  # a broken profile or text would be written as well
    sink = io.BytesIO()
    image.save(sink, "PNG")
    return sink.getvalue()
