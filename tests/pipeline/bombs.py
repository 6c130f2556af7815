"""Image files of a few kilobytes that claim pixels, or hold text, of gigabytes."""

import io
import struct
import zlib
from collections.abc import Callable

from PIL import Image


def encoded(kind: str, size: tuple[int, int] = (16, 16), **options: object) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", size, (200, 40, 90)).save(sink, kind, **options)
    return sink.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def gigabytes_of_zeros(count: int) -> bytes:
    """A zlib stream, by repeating a block that is flushed to a byte; its checksum is missing."""
    packer = zlib.compressobj()
    head = packer.compress(b"") + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(1 << 24)) + packer.flush(zlib.Z_FULL_FLUSH)
    return head + block * (64 * count)


def png(width: int, height: int, *before: bytes) -> bytes:
    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), *before]
    parts += [chunk(b"IDAT", gigabytes_of_zeros(1)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def jpeg() -> bytes:
    data = encoded("JPEG")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", 65500, 65500) + data[at + 4 :]


def gif() -> bytes:
    """The frame is larger than the canvas, which Pillow makes as large as the frame."""
    data = encoded("GIF")
    at = data.index(b"\x2c", 13 + 3 * (2 << (data[10] & 7))) + 5
    return data[:at] + struct.pack("<HH", 65535, 65535) + data[at + 4 :]


def webp(width: int, height: int) -> bytes:
    """An animation with small frames on a large canvas."""
    other = Image.new("RGB", (16, 16), (1, 2, 3))
    data = encoded("WEBP", save_all=True, append_images=[other])
    canvas = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    return data[:24] + canvas + data[30:]


def bmp() -> bytes:
    data = encoded("BMP")
    return data[:18] + struct.pack("<ii", 60000, 60000) + data[26:]


BOMBS: dict[str, Callable[[], bytes]] = {
    "png": lambda: png(60000, 60000),
    "png just over our limit": lambda: png(8192, 8193),
    "png below ours with a gigabyte behind its pixels": lambda: png(8192, 8192),
    "png with 4 GiB of text": lambda: png(16, 16, chunk(b"zTXt", b"k\0\0" + gigabytes_of_zeros(4))),
    "png with 4 GiB of colour profile": lambda: png(16, 16, chunk(b"iCCP", b"k\0\0" + gigabytes_of_zeros(4))),
    "jpeg": jpeg,
    "gif": gif,
    "webp of the format's largest size": lambda: webp(16383, 16383),
    "webp between our limit and Pillow's": lambda: webp(16383, 10000),
    "bmp": bmp,
}
