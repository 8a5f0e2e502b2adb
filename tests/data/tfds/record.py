"""Prepares small data sets with tensorflow-datasets for `tests/data/test_sources.py`.

Usage: python record.py FOLDER

FOLDER receives the folders `array_record` and `tfrecord`, each as the data_dir of one format. The
files here were written by tensorflow-datasets 4.9.10 and TensorFlow 2.21.0. The tests read them
without TensorFlow, whose import takes longer than all of them.
"""

import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds


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


def main(folder):
    for file_format, config in (
        *(("array_record", config) for config in ("rgb", "grey", "text")),
        ("tfrecord", "grey"),
    ):
        AntTinyImages(
            data_dir=str(Path(folder) / file_format), config=config, file_format=file_format
        ).download_and_prepare()


if __name__ == "__main__":
    main(sys.argv[1])
