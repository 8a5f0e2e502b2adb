import itertools

import numpy as np
import pytest
from PIL import Image

from ant_jax import data


@pytest.fixture(scope="module")
def photograph():
    """A real one, 64x64."""
    # Here, because the import is slow and a process may have no test that needs it.
    from sklearn.datasets import load_sample_image

    return load_sample_image("china.jpg")[100:164, 200:264]


def write(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **options)


@pytest.fixture
def classes(tmp_path, photograph):
    """Two classes; the files' names order them across formats and depth."""
    root = tmp_path / "set" / "train"
    write(root / "bird" / "a.png", photograph)
    write(root / "bird" / "more" / "b.JPEG", photograph, quality=95)
    write(root / "cat" / "c.webp", photograph, lossless=True)
    write(root / "cat" / "d.jpg", photograph[:, ::-1], quality=95)
    (root / "cat" / "notes.txt").write_text("no image")
    (root / ".cache").mkdir()
    write(root / ".cache" / "hidden.png", photograph)
    (root / "cat" / "._d.jpg").write_bytes(b"what some systems leave behind")
    return tmp_path / "set"


def test_subfolders_are_classes(classes, photograph):
    source = data.folder("train", classes)
    assert len(source) == 4
    assert source.num_classes == 2 and source.classes == ("bird", "cat")
    assert source.image_shape == (None, None, 3)
    assert [int(source[i]["label"]) for i in range(4)] == [0, 0, 1, 1]
    assert source[0]["label"].dtype == np.int32
    for i, exact in enumerate([True, False, True, False]):
        image = source[i]["image"].astype(int)
        assert source[i]["image"].dtype == np.uint8
        wanted = photograph[:, ::-1] if i == 3 else photograph
        assert np.abs(image - wanted).max() == 0 if exact else np.abs(image - wanted).mean() < 5


def test_without_subfolders_there_are_no_classes(tmp_path, photograph):
    for i in range(3):
        write(tmp_path / f"{i}.png", photograph + np.uint8(i))
    (tmp_path / "empty").mkdir()
    source = data.folder(dir=tmp_path)
    assert len(source) == 3 and source.num_classes == 0
    assert [int(source[i]["image"][0, 0, 0]) - int(photograph[0, 0, 0]) for i in range(3)] == [
        *range(3)
    ]
    assert int(source[2]["label"]) == 0


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK"])
def test_all_kinds_of_pixels_become_rgb(tmp_path, photograph, mode):
    picture = Image.fromarray(photograph).convert("RGB" if mode == "LA" else mode)
    if mode == "LA":
        picture = picture.convert("L")
        picture.putalpha(100)
    if mode == "RGBA":
        picture.putalpha(100)
    picture.save(tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"))
    image = data.folder(dir=tmp_path)[0]["image"]
    assert image.shape == (64, 64, 3)
    if mode == "RGBA":
        # The alpha channel is dropped, not blended.
        np.testing.assert_array_equal(image, photograph)
    if mode in ("L", "LA"):
        assert (image == image[..., :1]).all()
        grey = np.asarray(Image.fromarray(photograph).convert("L"))
        np.testing.assert_array_equal(image[..., 0], grey)


def test_smaller_images_are_enlarged_to_the_crop(tmp_path, photograph):
    write(tmp_path / "a.png", photograph[:10, :20])
    source = data.folder(dir=tmp_path)
    batch = next(data.batches(source, batch_size=1, seed=0, image_size=32, crop="center"))
    assert batch["image"].shape == (1, 32, 32, 3)
    assert abs(batch["image"].mean() - photograph[:10, 5:15].mean()) < 5


def test_images_of_a_folder_need_a_crop(classes):
    source = data.folder("train", classes)
    with pytest.raises(ValueError, match=r"vary in size: set config.data.crop = "):
        next(data.batches(source, batch_size=2, seed=0))


def damaged(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "deep"])
def test_a_damaged_image_is_named(classes, damage):
    path = classes / "train" / "cat" / "d.jpg"
    if damage == "deep":
        path = path.with_suffix(".png")
        Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).save(path)
    else:
        whole = path.read_bytes()
        path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b""}.get(damage, b"hi"))
    source = data.folder("train", classes)
    index = [bytes(each) for each in source.paths].index(f"cat/{path.name}".encode())
    with pytest.raises(data.UnreadableImageError, match=rf"cat/{path.name}: "):
        source[index]
    with pytest.raises(RuntimeError, match=rf"example {index} of .*cat/{path.name}"):
        list(itertools.islice(stream(source, 8), 1))


def stream(source, batch_size, **options):
    return data.batches(
        source, batch_size=batch_size, seed=0, image_size=16, crop="center", **options
    )


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_image_is_replaced_by_the_next(classes, num_workers, caplog):
    whole = data.folder("train", classes)
    (expected,) = itertools.islice(stream(whole, 4), 1)
    (classes / "train" / "bird" / "a.png").write_bytes(b"damaged")
    source = data.folder("train", classes)
    batches = stream(source, 4, replace_unreadable=True, num_workers=num_workers)
    batch = next(batches)
    batches.close()
    assert "unreadable, replaced by the next image: " in caplog.text
    (place,) = np.flatnonzero(batch["replaced"])
    others = np.delete(np.arange(4), place)
    np.testing.assert_array_equal(batch["image"][others], expected["image"][others])
    # The next one in the folder is the other bird, wherever that is in the batch.
    equal = [(batch["image"][place] == batch["image"][i]).all() for i in others]
    assert sum(equal) == 1 and batch["label"][place] == 0


def test_a_folder_of_damaged_images_is_an_error(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(b"damaged")
    batches = stream(data.folder(dir=tmp_path), 2, replace_unreadable=True)
    with pytest.raises(RuntimeError, match=r"\d\.jpg: "):
        next(batches)


def test_bad_folders(tmp_path, photograph):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*/none$"):
        data.folder("train", tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="has no subfolder 'train'; split = '' takes all"):
        data.folder("train", tmp_path)
    with pytest.raises(ValueError, match="set dir to the path"):
        data.folder("train")
    with pytest.raises(ValueError, match=r"has no image with the suffix \.jpg"):
        data.folder(dir=tmp_path)
    write(tmp_path / "a" / "0.png", photograph)
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match=r"class folders without an image: b$"):
        data.folder(dir=tmp_path)
    write(tmp_path / "1.png", photograph)
    with pytest.raises(ValueError, match=r"has both images \(1.png, ...\) and folders"):
        data.folder(dir=tmp_path)
