import gzip
import json
import struct
import subprocess
import sys
from pathlib import Path

import cloudpickle
import numpy as np
import pytest
from PIL import Image

from ant_jax import data
from ant_jax.runtime.extras import MissingExtraError
from ant_jax.settings import names_in, resolve, settings_of

# What tests/data/tfds/record.py has prepared: twelve images, of which image i is filled with i and
# has label i mod 3.
PREPARED = Path(__file__).parent / "tfds"
DATA_DIR = str(PREPARED / "array_record")


def write_idx(path, array):
    """Unsigned bytes in MNIST's format, compressed if the name says so."""
    content = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    content += array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """What opens a small set by each source that needs something."""
    place = tmp_path_factory.mktemp("sources")
    images = np.random.default_rng(0).integers(0, 256, (12, 6, 8, 3), np.uint8)
    for i, image in enumerate(images):
        path = place / "folder" / "train" / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    np.savez(place / "file.npz", train_images=images, train_labels=np.arange(12)[:, None] % 3)
    (place / "idx").mkdir()
    write_idx(place / "idx" / "train-images-idx3-ubyte", images[..., 0])
    write_idx(place / "idx" / "train-labels-idx1-ubyte.gz", np.arange(12, dtype=np.uint8) % 3)
    return {
        "idx": {"dir": str(place / "idx")},
        "arrays": {"file": str(place / "file.npz")},
        "folder": {"dir": str(place / "folder")},
        "tfds": {"builder": "ant_tiny_images/rgb", "dir": DATA_DIR},
    }


@pytest.mark.parametrize("name", names_in(data, data.Source))
def test_a_source_is_what_the_contract_says(name, settings):
    component = resolve(data, name, data.Source)
    # All are settings, which can be checked before anything is opened.
    assert set(settings_of(component)) >= {"split", *settings.get(name, {})}
    source = component(split="train", **settings.get(name, {}))
    assert isinstance(source, data.Source) and len(source) >= 12
    assert "train" in source.name and "\n" not in repr(source) and len(repr(source)) < 300
    facts = source.facts()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["num_images"] == len(source) and facts["num_classes"] == source.num_classes
    assert ("classes" in facts) == (name in ("digits", "folder", "tfds"))
    assert len(facts.get("classes", range(source.num_classes))) == source.num_classes
    copy = cloudpickle.loads(cloudpickle.dumps(source))
    for i in (0, len(source) - 1):
        image, label = source[i]["image"], source[i]["label"]
        assert image.dtype == np.uint8 and label.dtype == np.int32 and label.shape == ()
        for there, wanted in zip(image.shape, source.image_shape, strict=True):
            assert wanted in (None, there)
        assert 0 <= label < max(source.num_classes, 1)
        for again in (source[i], copy[i]):
            np.testing.assert_array_equal(again["image"], image)
            assert again["label"] == label
    batch = next(data.batches(source, batch_size=4, seed=0, crop="center", image_size=4))
    assert batch["image"].shape == (4, 4, 4, source.image_shape[-1])


@pytest.mark.parametrize("name", names_in(data, data.Source))
def test_a_source_names_what_it_lacks(name, settings):
    component = resolve(data, name, data.Source)
    with pytest.raises((ValueError, FileNotFoundError), match="nothing"):
        component(split="nothing", **settings.get(name, {}))
    if name in settings:
        with pytest.raises(ValueError, match=r"set \w+ to"):
            component(split="train")
    for setting in {"dir", "file"} & settings.get(name, {}).keys():
        changed = settings[name] | {setting: "~no such user/nowhere"}
        with pytest.raises(FileNotFoundError, match="nowhere"):
            component(split="train", **changed)


def test_digits_are_those_of_scikit_learn_and_so_is_what_is_held_out():
    # Here, because the import is slow and a process may have no test that needs it.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    raw = load_digits()
    rows = np.arange(len(raw.target))
    train, test = train_test_split(rows, test_size=300, stratify=raw.target, random_state=0)
    for split, part in (("all", rows), ("train", np.sort(train)), ("test", np.sort(test))):
        source = data.digits(split)
        pixels = np.round(raw.images[part] * (255 / 16))
        np.testing.assert_array_equal(source.images[..., 0], pixels)
        np.testing.assert_array_equal(source.labels, raw.target[part])
        assert (source.image_shape, source.num_classes) == ((8, 8, 1), 10)
        with pytest.raises(ValueError, match="read-only"):
            source[0]["image"][0] = 1


IMAGES = np.arange(5 * 4 * 4 * 2, dtype=np.uint8).reshape(5, 4, 4, 2)


def test_arrays_are_a_source():
    source = data.ArraySource(IMAGES, [2, 0, 1, 1, 0])
    assert (source.image_shape, source.num_classes, len(source)) == ((4, 4, 2), 3, 5)
    np.testing.assert_array_equal(source[2]["image"], IMAGES[2])
    assert source[0]["label"] == 2
    assert data.ArraySource(IMAGES, [2, 0, 1, 1, 0], num_classes=7).num_classes == 7
    assert data.ArraySource(IMAGES, np.uint8([2, 0, 1, 1, 0])).num_classes == 3
    assert data.ArraySource(IMAGES).num_classes == 0 and data.ArraySource(IMAGES)[1]["label"] == 0


@pytest.mark.parametrize(
    ("told", "images", "more"),
    [
        (r"images of arrays must be uint8 .* got float64 \(5, 4, 4, 2\)", IMAGES / 255, {}),
        (r"images of mine must be uint8 .* got uint8 \(4, 4, 2\)", IMAGES[0], {"name": "mine"}),
        (r"must be 5 integers, .* got int64 \(4,\)", IMAGES, {"labels": [0, 1, 2, 3]}),
        (r"must be 5 integers, .* got float64 \(5,\)", IMAGES, {"labels": np.zeros(5)}),
        (r"must be 0 .. 0, got -1 for image 3", IMAGES, {"labels": [0, 0, 0, -1, 0]}),
        (r"0 .. 1, got 2 for image 1", IMAGES, {"labels": [0, 2, 0, 1, 0], "num_classes": 2}),
        (r"classes of arrays must be 0 names, got 1", IMAGES, {"classes": ("dog",)}),
    ],
)
def test_arrays_that_are_no_images_or_labels(told, images, more):
    with pytest.raises(ValueError, match=told):
        data.ArraySource(images, **more)


def test_arrays_of_a_file(tmp_path):
    path = tmp_path / "file.npz"
    np.savez(path, images=IMAGES[..., 0], val_images=IMAGES, val_labels=[[3]] * 5)
    grey, labelled = data.arrays("", path), data.arrays("val", path)
    assert grey.image_shape == (4, 4, 1) and grey.num_classes == 0
    assert labelled.num_classes == 4 and labelled[4]["label"] == 3
    with pytest.raises(ValueError, match="no array 'train_images', only: images, val_images, val"):
        data.arrays("train", path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"file.npz is damaged, or not an .npz file, which num"):
        data.arrays("", path)
    np.savez(path, images=np.array([{}], object))
    with pytest.raises(ValueError, match=r"file.npz can't be read: it has objects of Python; save"):
        data.arrays("", path)


def test_idx_images_are_padded(tmp_path):
    images = np.arange(3 * 4 * 6, dtype=np.uint8).reshape(3, 4, 6)
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", images)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", np.array([1, 0, 9], np.uint8))
    source = data.idx("test", str(tmp_path), pad=2)
    assert source.image_shape == (8, 10, 1) and source.num_classes == 10
    np.testing.assert_array_equal(source.images[:, 2:-2, 2:-2, 0], images)
    assert source.images.sum() == images.sum(dtype=int)
    assert source.labels.tolist() == [1, 0, 9]


def test_half_the_size_is_the_mean_of_four_pixels():
    images = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 1), np.uint8)
    source = data.ArraySource(images)
    batch = next(data.batches(source, batch_size=2, seed=0, image_size=14, crop="center"))
    means = images.reshape(2, 14, 2, 14, 2).astype(float).mean((2, 4))
    found = np.sort(batch["image"][..., 0].astype(float), 0)
    # Rows and columns are rounded one after the other.
    assert np.abs(found - np.sort(means, 0)).max() <= 1


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda content: content[:-5], r"train-images.* damaged: it has only 43 than the 48 bytes"),
        (lambda content: content + b"x", r"damaged: it has more than the 48 bytes of \(3, 4, 4\)"),
        (lambda content: content[:9], "does not begin as unsigned bytes with 3 axes do"),
        (lambda content: b"\0\0\x0d\3" + content[4:], "does not begin as unsigned bytes"),
        (lambda content: b"\0\0\x08\1" + content[4:], "does not begin as unsigned bytes"),
        (lambda content: content[:4] + b"\xff" * 12 + content[16:], "more than 4 GiB"),
    ],
)
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_damaged_idx_files_are_one_line(harm, told, ending, tmp_path):
    plain, path = tmp_path / "plain", tmp_path / f"train-images-idx3-ubyte{ending}"
    write_idx(plain, np.zeros((3, 4, 4), np.uint8))
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(3, np.uint8))
    harmed = harm(plain.read_bytes())
    path.write_bytes(gzip.compress(harmed) if ending else harmed)
    with pytest.raises(ValueError, match=told):
        data.idx("train", str(tmp_path))


def test_other_damage_of_idx_files(tmp_path):
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(3, np.uint8))
    with pytest.raises(FileNotFoundError, match=r"has neither train-images-idx3-ubyte nor .*\.gz"):
        data.idx("train", str(tmp_path))
    compressed = tmp_path / "train-images-idx3-ubyte.gz"
    write_idx(compressed, np.random.default_rng(0).integers(0, 256, (4, 9, 9), np.uint8))
    whole = compressed.read_bytes()
    with pytest.raises(ValueError, match="has 4 images and 3 labels of 'train'"):
        data.idx("train", str(tmp_path))
    for harmed in (whole[:-40], b"no gzip" + whole, whole[:60] + b"xxxx" + whole[64:]):
        compressed.write_bytes(harmed)
        with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz is damaged"):
            data.idx("train", str(tmp_path))


def test_tfds_colour_images_of_varying_size():
    source = data.tfds("train", "ant_tiny_images/rgb", DATA_DIR)
    assert len(source) == 12
    assert source.num_classes == 3
    assert source.image_shape == (None, None, 3)
    seen = set()
    for i in range(12):
        example = source[i]
        value = int(example["image"][0, 0, 0])
        assert example["image"].dtype == np.uint8
        np.testing.assert_array_equal(example["image"], np.full((6 + value, 8, 3), value))
        assert example["label"] == value % 3 and example["label"].dtype == np.int32
        seen.add(value)
    assert seen == set(range(12))
    assert len(data.tfds("train[:25%]", "ant_tiny_images/rgb", DATA_DIR)) == 3


def test_tfds_grey_images_without_labels():
    source = data.tfds("train", "ant_tiny_images/grey", DATA_DIR)
    assert source.num_classes == 0
    assert source.image_shape == (6, 8, 1)
    assert source[5]["image"].shape == (6, 8, 1)
    assert source[5]["label"] == 0


def test_tfds_feeds_the_pipeline_from_workers():
    source = data.tfds("train", "ant_tiny_images/rgb", DATA_DIR)
    options = dict(batch_size=5, seed=0, image_size=4, crop="random", flip=True, start_step=2)
    here = data.batches(source, **options)
    workers = data.batches(source, num_workers=1, **options)
    for _ in range(4):
        expected, got = next(here), next(workers)
        assert got["image"].shape == (5, 4, 4, 3)
        np.testing.assert_array_equal(got["image"], expected["image"])
        np.testing.assert_array_equal(got["label"], expected["label"])
        np.testing.assert_array_equal(expected["image"][:, 0, 0, 0] % 3, expected["label"])
    del got
    workers.close()


def test_tfds_is_read_without_tensorflow():
    code = (
        "import sys; from ant_jax import data;"
        f"s = data.tfds('train', 'ant_tiny_images/rgb', {DATA_DIR!r});"
        "assert s[3]['image'].ndim == 3; assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_tfds_errors_name_the_culprit_and_the_remedy(tmp_path):
    with pytest.raises(ValueError, match="no builder 'ant_no_such_images'"):
        data.tfds("train", "ant_no_such_images", DATA_DIR)
    with pytest.raises(ValueError, match="'valid'"):
        data.tfds("valid", "ant_tiny_images/rgb", DATA_DIR)
    with pytest.raises(ValueError, match="no uint8 'image'"):
        data.tfds("train", "ant_tiny_images/text", DATA_DIR)
    missing = str(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"nowhere.*download_and_prepare\(\)"):
        data.tfds("train", "mnist", missing)


def test_without_tensorflow_datasets_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    told = r"tensorflow_datasets is not installed: pip install -e '.*\[tfds\]'"
    with pytest.raises(MissingExtraError, match=told):
        data.tfds("train", "cifar10")


def test_tfds_stored_without_random_access():
    with pytest.raises(ValueError, match=r"random access.*array_record"):
        data.tfds("train", "ant_tiny_images/grey", str(PREPARED / "tfrecord"))
