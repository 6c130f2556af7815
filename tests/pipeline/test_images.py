import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile
from transformers.image_utils import load_image

from pipeline.data.conversations import Conversation, Turn
from pipeline.data.images import decode_image, read_images
from pipeline.store import Store
from schemas.errors import SampleInvalid
from tests.pipeline.bombs import BOMBS
from tests.tolerances import JPEG_LEVELS

ORIENTATION = 0x112
# Four colours in four blocks of 16 × 16, of which JPEG keeps the middles, and no two corners alike.
COLOURS = np.array([[[250, 20, 30], [10, 240, 60]], [[40, 50, 230], [90, 90, 90]]], np.uint8)
PICTURE = COLOURS.repeat(16, 0).repeat(24, 1)
GREY = PICTURE[..., 0]
MIDDLES = (slice(8, None, 16), slice(12, None, 24))


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def stacked(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, 2)


def with_alpha(mode: str) -> Image.Image:
    image = Image.fromarray(PICTURE).convert(mode)
    image.putalpha(Image.fromarray(GREY))
    return image


def palette(**transparency: Any) -> bytes:
    return saved(Image.fromarray(PICTURE).convert("P", palette=Image.Palette.ADAPTIVE), "PNG", **transparency)


RGB = Image.fromarray(PICTURE)
ONE_BIT = Image.fromarray(GREY > 50)
DEEP = GREY.astype(np.uint16) * 256 + 77
LOSSLESS = {
    "png": (saved(RGB, "PNG"), PICTURE),
    "webp": (saved(RGB, "WEBP", lossless=True), PICTURE),
    "bmp": (saved(RGB, "BMP"), PICTURE),
    "gif": (saved(RGB, "GIF"), PICTURE),
    "gif of two frames": (saved(RGB, "GIF", save_all=True, append_images=[RGB.rotate(180)]), PICTURE),
    "webp of two frames": (
        saved(RGB, "WEBP", lossless=True, save_all=True, append_images=[RGB.rotate(180)]),
        PICTURE,
    ),
    "grey": (saved(Image.fromarray(GREY), "PNG"), stacked(GREY)),
    "16-bit grey": (saved(Image.fromarray(DEEP), "PNG"), stacked(GREY)),
    "1-bit": (saved(ONE_BIT, "PNG"), stacked(np.asarray(ONE_BIT).astype(np.uint8) * 255)),
    "grey with alpha": (saved(with_alpha("L"), "PNG"), stacked(np.asarray(RGB.convert("L")))),
    "alpha": (saved(with_alpha("RGB"), "PNG"), PICTURE),
    "webp with alpha": (saved(with_alpha("RGB"), "WEBP", lossless=True, exact=True), PICTURE),
    "palette": (palette(), PICTURE),
    "palette, one colour transparent": (palette(transparency=0), PICTURE),
    "palette with alphas": (palette(transparency=bytes([0, 99, 200, 255])), PICTURE),
    "gif with transparency": (saved(RGB.quantize(), "GIF", transparency=1), PICTURE),
}
CMYK = np.array([[[0, 250, 20, 0], [200, 10, 0, 0]], [[0, 0, 0, 90], [30, 60, 90, 40]]], np.uint8)
LOSSY = {
    "jpeg": (saved(RGB, "JPEG", quality=95), COLOURS),
    "progressive": (saved(RGB, "JPEG", quality=95, progressive=True), COLOURS),
    "mpo": (saved(RGB, "MPO", quality=95, save_all=True, append_images=[RGB.rotate(180)]), COLOURS),
    "grey jpeg": (saved(Image.fromarray(GREY), "JPEG", quality=95), stacked(COLOURS[..., 0])),
    "cmyk with Adobe's marker": (
        saved(Image.fromarray(CMYK.repeat(16, 0).repeat(24, 1), "CMYK"), "JPEG", quality=95),
        np.round((255.0 - CMYK[..., :3]) * (255.0 - CMYK[..., 3:]) / 255).astype(np.uint8),
    ),
}


@pytest.mark.parametrize("kind", LOSSLESS)
def test_every_lossless_kind_gives_its_pixels(kind: str) -> None:
    data, expected = LOSSLESS[kind]
    image = decode_image(data)
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), expected)


@pytest.mark.parametrize("kind", LOSSY)
def test_every_lossy_kind_gives_its_colours(kind: str) -> None:
    data, expected = LOSSY[kind]
    found = np.asarray(decode_image(data))[MIDDLES].astype(int)
    assert np.abs(found - expected).max() <= JPEG_LEVELS


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright_as_transformers_loads_them(tmp_path: Path, orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / "a"
    path.write_bytes(saved(RGB, kind, exif=exif))
    expected = np.asarray(load_image(str(path)))
    assert expected.shape[:2] == ((48, 32) if orientation > 4 else (32, 48))
    assert np.array_equal(np.asarray(decode_image(path.read_bytes())), expected)


def conversation(*images: str | bytes) -> Conversation:
    return Conversation("data.json", "r7", images, (Turn("user", "<image>" * len(images)),), {})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "coco" / "train").mkdir(parents=True)
    (folder / "coco" / "train" / "a.png").write_bytes(LOSSLESS["png"][0])
    (folder / "b.gif").write_bytes(LOSSLESS["gif"][0])
    (tmp_path / "secret.png").write_bytes(LOSSLESS["png"][0])
    return folder


def refused(root: Path, *images: str | bytes) -> str:
    with pytest.raises(SampleInvalid) as caught:
        read_images(conversation(*images), Store(str(root)), truncated="refuse")
    return str(caught.value)


def test_images_come_in_the_records_order_byte_for_byte(root: Path) -> None:
    inline = LOSSLESS["webp"][0]
    found = read_images(conversation("b.gif", inline, "./coco//train/a.png"), Store(str(root)), truncated="refuse")
    assert found == (LOSSLESS["gif"][0], inline, LOSSLESS["png"][0])
    assert read_images(conversation(), Store(str(root)), truncated="refuse") == ()
    assert refused(root, "b.gif", b"x").startswith("data.json: record r7: images.1: cannot be decoded: no JPEG, PNG")


@pytest.mark.parametrize(
    "name",
    [
        "{outside}",
        "../secret.png",
        "coco/../../secret.png",
        "coco/train/../a.png",
        "..",
        "%2e%2e/secret.png",
        "coco/%2E%2e/%2e%2e/secret.png",
        "~/secret.png",
        "~root/secret.png",
        "..\\secret.png",
        "C:\\secret.png",
        "c:secret.png",
        "file://{outside}",
        "http://127.0.0.1:9/secret.png",
        "simplecache::file://{outside}",
        "a.png\0",
        "\n/../secret.png",
    ],
)
def test_no_name_leads_out_of_the_image_root(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "fetch", lambda self, key: pytest.fail(f"{key} was read"))
    assert "expected a path below the image root" in refused(root, name.format(outside=root.parent / "secret.png"))


@pytest.mark.parametrize("name", ["", ".", "./", "a" * 256, "a/" * 600 + "b", "日" * 86])
def test_names_that_no_file_can_have_are_refused(root: Path, name: str) -> None:
    assert "expected a file's name" in refused(root, name)


def test_missing_files_and_folders_are_named(root: Path) -> None:
    assert refused(root, "./coco/none.png") == f"data.json: record r7: image: {root}/coco/none.png: No such file"
    assert "Is a directory" in refused(root, "coco")
    assert "Not a directory" in refused(root, "b.gif/a.png")


def test_links_in_the_root_are_the_users_and_are_followed(root: Path, tmp_path: Path) -> None:
    (root / "linked").symlink_to(tmp_path / "images" / "coco")
    (root / "other.png").symlink_to(tmp_path / "secret.png")
    found = read_images(conversation("linked/train/a.png", "other.png"), Store(str(root)), truncated="refuse")
    assert found == (LOSSLESS["png"][0],) * 2
    assert "expected a path below" in refused(root, "linked/../../secret.png")


def test_image_roots_may_be_urls() -> None:
    store = Store("memory://pictures")
    store.write("coco/a b%20.png", LOSSLESS["png"][0])
    assert read_images(conversation("coco/a b%20.png"), store, truncated="refuse") == (LOSSLESS["png"][0],)
    with pytest.raises(SampleInvalid, match=r"record r7: image: /pictures/coco/none\.png: No such file"):
        read_images(conversation("coco/none.png"), store, truncated="refuse")
    with pytest.raises(SampleInvalid, match="below the image root"):
        read_images(conversation("../other/a.png"), store, truncated="refuse")


NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP"])
def test_cut_files_are_refused_or_kept_as_what_can_be_read(kind: str) -> None:
    whole = saved(Image.fromarray(NOISE), kind, **({"interlace": 0} if kind == "GIF" else {}))
    cut = whole[: len(whole) * 2 // 3]
    store = Store("memory://pictures")
    with pytest.raises(SampleInvalid, match=r"data\.json: record r7: image: cannot be decoded"):
        read_images(conversation(cut), store, truncated="refuse")
    (kept,) = read_images(conversation(cut), store, truncated="keep")
    assert kept.startswith(b"\x89PNG")
    expected, found = (np.asarray(decode_image(data)) for data in (whole, kept))
    same = (expected == found).all((1, 2))
    assert 16 <= same.sum() <= 48
    missing = found[:8] if kind == "BMP" else found[-8:]  # a BMP begins below
    assert len(np.unique(missing.reshape(-1, 3), axis=0)) == 1
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    assert read_images(conversation(whole), store, truncated="keep") == (whole,)
    with pytest.raises(SampleInvalid, match="cannot be decoded"):
        read_images(conversation(whole[:10]), store, truncated="keep")
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_a_kept_picture_is_turned_once() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    whole = saved(Image.fromarray(NOISE[:32]), "JPEG", exif=exif)
    (kept,) = read_images(conversation(whole[:-200]), Store("memory://pictures"), truncated="keep")
    assert decode_image(kept).size == (32, 64)
    assert np.array_equal(np.asarray(decode_image(kept))[:, 18:], np.asarray(decode_image(whole))[:, 18:])


MEASURED = """
import json, sys
from pathlib import Path
from pipeline.data.conversations import Conversation, Turn
from pipeline.data.images import read_images
from pipeline.store import Store
from schemas.errors import SampleInvalid
for path in sorted(Path(sys.argv[1]).iterdir()):
    for truncated in ("refuse", "keep"):
        said = Conversation("d", "r", (path.name,), (Turn("user", "<image>"),), {})
        try:
            read_images(said, Store(sys.argv[1]), truncated=truncated)
            error = None
        except SampleInvalid as caught:
            error = str(caught)
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        print(json.dumps([path.name, truncated, error, int(status["VmHWM"].split()[0])]))
"""


def test_decompression_bombs_take_less_than_two_gibibytes(tmp_path: Path) -> None:
    for name, make in BOMBS.items():
        (tmp_path / name).write_bytes(make())
    script = [sys.executable, "-c", MEASURED, str(tmp_path)]
    lines = subprocess.run(script, capture_output=True, text=True, check=True, timeout=300).stdout.splitlines()
    results = {(name, mode): (error, peak) for name, mode, error, peak in map(json.loads, lines)}
    assert {name for name, _ in results} == set(BOMBS)
    for (name, mode), (error, peak) in results.items():
        assert peak < 2 * 2**20, (name, mode, peak)  # KiB
        if name.startswith("png below"):
            assert error is None  # large, but within the limit
        elif "GiB of" in name:
            assert mode == "keep" or "cannot be decoded" in error
        else:
            assert "claims more than 67,108,864 pixels" in error
