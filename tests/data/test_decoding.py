"""Files that are not what they say: none may run anything, hang, or take memory without bound."""

import io
import os
import re
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageOps

from ant_jax import data
from ant_jax.data import decoding

SIDE = 64


@pytest.fixture(scope="module")
def picture():
    # Here, because the import is slow and a process may have no test that needs it.
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image("china.jpg")[100 : 100 + SIDE, 200 : 240 + SIDE])


def saved(picture, kind, **options):
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def chunk(kind, content):
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png(width, height, *before, rows=b"", depth=8):
    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(rows, 9))
    return b"\x89PNG\r\n\x1a\n" + b"".join([chunk(b"IHDR", header), *before, pixels])


def read(path, content):
    path.write_bytes(content)
    return data.folder(dir=path.parent)[0]["image"]


@pytest.mark.parametrize("kind", ["EPS", "TIFF", "BMP", "ICO", "GIF", "PPM", "TGA", "PCX"])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_other_formats_are_not_opened_whatever_their_name(
    tmp_path, picture, monkeypatch, kind, suffix
):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("started"))
    with pytest.raises(data.UnreadableImageError, match=r"a.* damaged, or not a JPEG, PNG or WebP"):
        read(tmp_path / f"a.{suffix}", saved(picture, kind))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "MPO"])
def test_the_first_picture_of_a_file_is_read_whatever_its_name(tmp_path, picture, kind, suffix):
    options = {"WEBP": {"lossless": True}, "PNG": {}}.get(kind, {"quality": 95})
    more = {} if kind == "JPEG" else {"save_all": True, "append_images": [picture.rotate(180)] * 3}
    image = read(tmp_path / f"a.{suffix}", saved(picture, kind, **options, **more))
    expected = np.asarray(picture)
    assert image.shape == expected.shape
    difference = np.abs(image.astype(int) - expected)
    assert difference.mean() < 8 if kind in ("JPEG", "MPO") else difference.max() == 0


def test_records_of_tfds_are_opened_as_files_are(picture):
    from ant_jax.data import TfdsSource

    records = [{"image": saved(picture.convert("L"), kind)} for kind in ("PNG", "JPEG", "EPS")]
    for channels in (1, 3, 4):
        source = TfdsSource("some[train]", records, (None, None, channels), 0)
        assert source[0]["image"].shape == source[1]["image"].shape == (SIDE, 40 + SIDE, channels)
        with pytest.raises(data.UnreadableImageError, match=r"image 2 of some\[train\]: damaged"):
            source[2]


@pytest.mark.parametrize(
    ("size", "known"),
    [((2**13, 2**14 + 1), True), ((2**20 + 1, 1), True), ((2**31 - 1, 2**31 - 1), False)],
)
def test_an_image_of_too_many_pixels_is_refused_by_its_header(tmp_path, size, known):
    # Pillow has a limit of its own, which is higher.
    words = rf"a\.png: .*{'an image may have at most 134217728' if known else 'pixels'}"
    with pytest.raises(data.UnreadableImageError, match=words):
        read(tmp_path / "a.png", png(*size))


def test_a_file_that_no_image_needs_is_not_read(tmp_path):
    with (tmp_path / "a.webp").open("wb") as file:
        file.write(b"RIFF\xf0\xff\xff\x7fWEBPVP8 ")
        file.truncate(2**40)
    with pytest.raises(data.UnreadableImageError, match=r"a\.webp: 1099511627776 bytes: an image"):
        data.folder(dir=tmp_path)[0]


def test_what_is_no_file_is_neither_listed_nor_waited_for(tmp_path, picture):
    for name in ("a.png", "d.png"):
        (tmp_path / name).write_bytes(saved(picture, "PNG"))
    os.mkfifo(tmp_path / "b.png")
    (tmp_path / "c.png").symlink_to("/dev/zero")
    (tmp_path / "e.png").symlink_to(tmp_path / "e.png")
    (tmp_path / "f.png").symlink_to(tmp_path / "nothing")
    (tmp_path / "g.png").symlink_to(tmp_path / "a.png")
    source = data.folder(dir=tmp_path)
    assert list(source.paths) == [b"a.png", b"d.png", b"e.png", b"f.png", b"g.png"]
    np.testing.assert_array_equal(source[4]["image"], np.asarray(picture))
    # A link to nothing is an image that is not there, rather than none.
    for index in (2, 3):
        with pytest.raises(data.UnreadableImageError, match=r"[ef]\.png: "):
            source[index]
    # It has become one since the folder was listed.
    (tmp_path / "d.png").unlink()
    os.mkfifo(tmp_path / "d.png")
    with pytest.raises(data.UnreadableImageError, match=r"d\.png: not a regular file"):
        source[1]


def test_each_folder_is_listed_once_for_a_class_and_those_above_never(tmp_path, picture):
    root = tmp_path / "above" / "set"
    content = saved(picture, "PNG")
    for place in ("cat/a", "dog", "deep"):
        (root / place).mkdir(parents=True)
    for name in ("cat/0.png", "cat/a/1.png", "dog/2.png", "deep/3.png"):
        (root / name).write_bytes(content)
    (root / "cat" / "b").symlink_to(root / "cat" / "a")
    for name, target in (("up", root), ("self", root / "cat"), ("above", tmp_path / "above")):
        (root / "cat" / name).symlink_to(target)
    (root / "kitten").symlink_to(root / "cat")
    # 2 to the power of 30 ways lead to the image at the end.
    for level in range(30):
        (tmp_path / f"{level}").mkdir()
        for link in ("x", "y"):
            end = root / "deep" if level == 29 else tmp_path / f"{level + 1}"
            (tmp_path / f"{level}" / link).symlink_to(end)
    (root / "maze").symlink_to(tmp_path / "0")
    source = data.folder(dir=root)
    assert source.classes == ("cat", "deep", "dog", "kitten", "maze")
    assert [os.fsdecode(path) for path in source.paths] == [
        *("cat/0.png", "cat/a/1.png", "deep/3.png", "dog/2.png", "kitten/0.png"),
        *("kitten/a/1.png", "maze/" + "x/" * 30 + "3.png"),
    ]
    (root / "again").symlink_to(root)
    with pytest.raises(ValueError, match=r"class folders without an image: again$"):
        data.folder(dir=root)


def test_a_folder_that_cannot_be_read_is_named(tmp_path, picture, monkeypatch):
    (tmp_path / "cat" / "more").mkdir(parents=True)
    (tmp_path / "cat" / "0.png").write_bytes(saved(picture, "PNG"))
    scandir = os.scandir

    def refused(place):
        if str(place).endswith("more"):
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(PermissionError, match="cat/more"):
        data.folder(dir=tmp_path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [*range(1, 9), 0, 77])
def test_orientation_is_applied_where_asked_for_alone(tmp_path, picture, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = saved(picture, kind, exif=exif)
    stored = read(tmp_path / "a.png", content)
    with Image.open(io.BytesIO(content)) as file:
        shown = np.asarray(ImageOps.exif_transpose(file))
    np.testing.assert_array_equal(data.folder("", tmp_path, "apply")[0]["image"], shown)
    assert stored.shape == (SIDE, 40 + SIDE, 3)
    assert (orientation in range(2, 9)) != np.array_equal(stored, shown)
    with pytest.raises(ValueError, match=r"'applied'.*ignore, apply"):
        data.folder("", tmp_path, "applied")


def test_a_damaged_note_of_the_orientation_is_as_none(tmp_path, picture):
    content = saved(picture, "PNG")
    for note in (b"", b"MM\0*\0\0\0\xff", b"II*\0\x08\0\0\0\xff\xff" + b"\x12\x01" * 40):
        (tmp_path / "a.png").write_bytes(content[:33] + chunk(b"eXIf", note) + content[33:])
        image = data.folder("", tmp_path, "apply")[0]["image"]
        np.testing.assert_array_equal(image, np.asarray(picture))


def test_the_colour_below_alpha_shows(tmp_path, picture):
    clear = picture.convert("RGBA")
    clear.putalpha(0)
    image = read(tmp_path / "a.webp", saved(clear, "WEBP", lossless=True, exact=True))
    np.testing.assert_array_equal(image, np.asarray(picture))


def hostile(picture):
    """Files that claim or unpack to more than they are, by name."""
    zeros = zlib.compress(bytes(2**27), 1)
    wide = bytes(1 + 3 * 20000) * 2
    progressive = bytearray(saved(picture, "JPEG", progressive=True))
    place = re.search(b"\xff\xc2..\x08", bytes(progressive), re.DOTALL).end()
    claim = lambda height, width: (
        bytes(progressive[:place]) + struct.pack(">HH", height, width) + progressive[place + 4 :]
    )
    frames = {"save_all": True, "append_images": [picture.rotate(i) for i in range(60)]}
    return {
        "wide.png": png(20000, 2, rows=wide),
        "tall.png": png(2, 20000, rows=bytes(7) * 20000),
        "claims.png": png(2**16, 2**16),
        "deep.png": png(64, 64, rows=bytes(2**26)),
        "ztxt.png": png(8, 8, chunk(b"zTXt", b"a\0\0" + zeros), rows=bytes(25 * 8)),
        "itxt.png": png(8, 8, chunk(b"iTXt", b"a\0\1\0\0\0" + zeros), rows=bytes(25 * 8)),
        "iccp.png": png(8, 8, chunk(b"iCCP", b"a\0\0" + zeros), rows=bytes(25 * 8)),
        "chunk.png": png(8, 8)[:33] + b"\xff\xff\xff\xf0tEXt",
        "claims.jpg": claim(65500, 65500),
        "truncated.jpg": bytes(progressive[: len(progressive) // 2]),
        "frames.webp": saved(picture, "WEBP", **frames),
        "frames.png": saved(picture, "PNG", **frames),
        "canvas.webp": b"RIFF\x20\0\0\0WEBPVP8X\x0a\0\0\0\x02\0\0\0\xfe\x3f\0\xfe\x3f\0",
    }


def test_memory_is_that_of_the_pixels_whatever_a_file_claims(tmp_path, picture):
    files = hostile(picture)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    program = (
        "import resource, sys, numpy as np; from ant_jax import data; from ant_jax.data import *\n"
        "from ant_jax.data import transforms\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        f"source = data.folder('', {str(tmp_path)!r})\n"
        "before = peak()\n"
        "for i in range(len(source)):\n"
        "    try:\n"
        "        image = source[i]['image']\n"
        "        transforms.center_crop(image, 256)\n"
        "        transforms.random_crop(image, 256, np.random.default_rng(i))\n"
        "        print(source.paths[i].decode(), 'read')\n"
        "    except data.UnreadableImageError as error:\n"
        "        print(error)\n"
        "print(peak() - before)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=100
    )
    assert result.returncode == 0, result.stderr
    *lines, megabytes = result.stdout.splitlines()
    assert len(lines) == len(files)
    # The largest of them is the crop of a strip of 64 squares.
    assert int(megabytes) < 100
    ends = {line.split(":")[0].split("/")[-1].removesuffix(" read"): line for line in lines}
    whole = {"wide.png", "tall.png", "frames.webp", "frames.png", "deep.png"}
    assert {name for name, line in ends.items() if line.endswith(" read")} >= whole
    for name in files.keys() - whole - {"ztxt.png", "itxt.png"}:
        assert f"{name}: " in ends[name], ends[name]


def test_no_damage_is_more_than_an_unreadable_image(tmp_path, picture):
    rng = np.random.default_rng(0)
    small = picture.resize((24, 16))
    seeds = [
        saved(small, "JPEG"),
        saved(small, "JPEG", progressive=True),
        saved(small, "PNG"),
        saved(small.convert("P"), "PNG"),
        saved(small, "WEBP"),
        saved(small, "WEBP", lossless=True, save_all=True, append_images=[small.rotate(90)]),
        saved(small, "MPO", save_all=True, append_images=[small.rotate(90)]),
    ]
    ends = {"read": 0, "refused": 0}
    for number in range(400):
        content = mutated(seeds[number % len(seeds)], rng)
        try:
            image = read(tmp_path / "a.jpg", content)
            assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
            ends["read"] += 1
        except data.UnreadableImageError as error:
            assert "a.jpg: " in str(error)
            ends["refused"] += 1
    assert min(ends.values()) > 50


def mutated(content, rng):
    """The file with some bytes flipped, cut, doubled, or set to the ends of their range."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 6)):
        place, kind = int(rng.integers(len(content))), rng.integers(5)
        if kind == 0:
            content[place] ^= 1 << rng.integers(8)
        elif kind == 1:
            content[place] = rng.choice([0, 1, 0x7F, 0x80, 0xFF])
        elif kind == 2:
            del content[place : place + int(rng.integers(1, 30))]
        elif kind == 3:
            content[place:place] = content[place : place + int(rng.integers(1, 30))]
        else:
            del content[max(place, 1) :]
        content = content or bytearray(1)
    return bytes(content)


def test_the_limits_hold_together():
    # Two of Pillow's limits would speak first.
    assert decoding.MAX_PIXELS < 2 * Image.MAX_IMAGE_PIXELS
