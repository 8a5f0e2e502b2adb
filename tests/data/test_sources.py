import subprocess
import sys
from typing import ClassVar

import numpy as np
import pytest
import tensorflow_datasets as tfds

from ant_jax import data
from ant_jax.data import sources


class AntTinyImages(tfds.core.GeneratorBasedBuilder):
    """Twelve PNG images: image i is filled with i and has label i mod 3."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [
        tfds.core.BuilderConfig(name="rgb", description="varying size"),
        tfds.core.BuilderConfig(name="grey", description="fixed size, no labels"),
        tfds.core.BuilderConfig(name="text", description="no image at all"),
    ]

    def _info(self):
        features = {
            "rgb": {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(num_classes=3),
            },
            "grey": {"image": tfds.features.Image(shape=(6, 8, 1))},
            "text": {"text": tfds.features.Text()},
        }[self.builder_config.name]
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(12):
            yield (
                i,
                {
                    "rgb": {"image": np.full((6 + i, 8, 3), i, np.uint8), "label": i % 3},
                    "grey": {"image": np.full((6, 8, 1), i, np.uint8)},
                    "text": {"text": "a"},
                }[self.builder_config.name],
            )


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("tfds"))
    for config in ("rgb", "grey", "text"):
        AntTinyImages(
            data_dir=path, config=config, file_format="array_record"
        ).download_and_prepare()
    return path


def test_digits_are_the_real_ones_scaled():
    from sklearn.datasets import load_digits

    raw = load_digits()
    source = data.load("digits", "all")
    assert len(source) == 1797
    assert source.num_classes == 10
    assert source.image_shape == (8, 8, 1)
    images = np.stack([source[i]["image"] for i in range(1797)])
    labels = np.stack([source[i]["label"] for i in range(1797)])
    assert images.dtype == np.uint8 and labels.dtype == np.int32
    assert images.min() == 0 and images.max() == 255
    np.testing.assert_array_equal(np.round(images[..., 0] * (16 / 255)), raw.images)
    np.testing.assert_array_equal(labels, raw.target)


def test_digit_splits_partition_the_digits_and_are_stratified():
    train, test, everything = (data.digits(split) for split in ("train", "test", "all"))
    assert (len(train), len(test)) == (1497, 300)

    def rows(source):
        return {
            image.tobytes() + bytes([label])
            for image, label in zip(source.images, source.labels, strict=True)
        }

    # The 1797 images are all different, so bytes identify them.
    assert len(rows(everything)) == 1797
    assert not rows(train) & rows(test)
    assert rows(train) | rows(test) == rows(everything)
    counts = np.bincount(test.labels)
    assert counts.min() >= 28 and counts.max() <= 32


def test_the_digits_held_out_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    raw = load_digits()
    parts = train_test_split(
        np.arange(len(raw.target)), test_size=300, stratify=raw.target, random_state=0
    )
    for split, part in zip(("train", "test"), parts, strict=True):
        source, chosen = data.digits(split), np.sort(part)
        np.testing.assert_array_equal(source.labels, raw.target[chosen])
        pixels = np.round(raw.images[chosen] * (255 / 16))
        np.testing.assert_array_equal(source.images[..., 0], pixels)


def test_digits_are_found_wherever_scikit_learn_keeps_them(monkeypatch):
    expected = data.digits("all")
    monkeypatch.setattr(sources.Path, "exists", lambda path: False)
    there = data.digits.__wrapped__("all")
    np.testing.assert_array_equal(there.images, expected.images)
    np.testing.assert_array_equal(there.labels, expected.labels)


@pytest.mark.parametrize("name", ["mnist", "tfds:", "tfds", "digits:", ""])
def test_unknown_source(name):
    with pytest.raises(ValueError, match="tfds:BUILDER"):
        data.load(name, "train")


def test_unknown_digits_split():
    with pytest.raises(ValueError, match=r"'valid'.*train, test, all"):
        data.load("digits", "valid")


def test_tfds_colour_images_of_varying_size(data_dir):
    source = data.load("tfds:ant_tiny_images/rgb", "train", data_dir)
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
    assert len(data.load("tfds:ant_tiny_images/rgb", "train[:25%]", data_dir)) == 3


def test_tfds_grey_images_without_labels(data_dir):
    source = data.load("tfds:ant_tiny_images/grey", "train", data_dir)
    assert source.num_classes == 0
    assert source.image_shape == (6, 8, 1)
    assert source[5]["image"].shape == (6, 8, 1)
    assert source[5]["label"] == 0


def test_tfds_feeds_the_pipeline_from_workers(data_dir):
    source = data.load("tfds:ant_tiny_images/rgb", "train", data_dir)
    options = dict(batch_size=5, seed=0, image_size=4, crop="random", flip=True, start_step=2)
    here = data.batches(source, **options)
    workers = data.batches(source, num_workers=2, **options)
    for _ in range(4):
        expected, got = next(here), next(workers)
        assert got["image"].shape == (5, 4, 4, 3)
        np.testing.assert_array_equal(got["image"], expected["image"])
        np.testing.assert_array_equal(got["label"], expected["label"])
        np.testing.assert_array_equal(expected["image"][:, 0, 0, 0] % 3, expected["label"])
    del got
    workers.close()


def test_tfds_is_read_without_tensorflow(data_dir):
    code = (
        "import sys; from ant_jax import data;"
        f"s = data.load('tfds:ant_tiny_images/rgb', 'train', {data_dir!r});"
        "assert s[3]['image'].ndim == 3; assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_tfds_errors_name_the_culprit_and_the_remedy(data_dir, tmp_path):
    with pytest.raises(ValueError, match="no builder 'ant_no_such_images'"):
        data.load("tfds:ant_no_such_images", "train", data_dir)
    with pytest.raises(ValueError, match="'valid'"):
        data.load("tfds:ant_tiny_images/rgb", "valid", data_dir)
    with pytest.raises(ValueError, match="no uint8 'image'"):
        data.load("tfds:ant_tiny_images/text", "train", data_dir)
    missing = str(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"nowhere.*download_and_prepare\(\)"):
        data.load("tfds:ant_tiny_images/rgb", "train", missing)


def test_tfds_stored_without_random_access(tmp_path):
    builder = AntTinyImages(data_dir=str(tmp_path), config="grey", file_format="tfrecord")
    builder.download_and_prepare()
    with pytest.raises(ValueError, match=r"random access.*array_record"):
        data.load("tfds:ant_tiny_images/grey", "train", str(tmp_path))
