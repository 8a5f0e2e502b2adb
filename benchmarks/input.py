"""Images per second that the input pipeline delivers: ``python -m benchmarks.input``.

Writes crops of scikit-learn's two sample photographs as JPEG files of the given sizes, reads them
from the file system's cache, crops them to 256x256 and flips them. In every round each variant
delivers a few batches in turn; the results are medians over rounds. A model that trains on N images
per second needs a pipeline that delivers at least N.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from ant_jax import data


def parse():
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["256x256", "500x375"], help="WIDTHxHEIGHT")
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--images", type=int, default=200, help="number of files")
    parser.add_argument("--rounds", type=int, default=8)
    return parser.parse_args()


def main():
    args = parse()
    with tempfile.TemporaryDirectory() as folder:
        streams = {}
        for size in args.sizes:
            directory = Path(folder) / size
            width, height = map(int, size.split("x"))
            write_images(directory, width, height, args.images)
            source = data.folder(dir=str(directory))
            for workers in args.workers:
                streams[size, workers] = data.batches(
                    source,
                    batch_size=args.batch,
                    seed=0,
                    image_size=256,
                    crop="center",
                    flip=True,
                    num_workers=workers,
                )
        rates = {key: [] for key in streams}
        for round_number in range(args.rounds + 1):
            for key, stream in streams.items():
                # Discard the batches that were prepared during the turns of the others.
                drain(stream)
                begin = time.perf_counter()
                for _ in range(4):
                    next(stream)
                # The first round starts the workers.
                if round_number:
                    rates[key].append(4 * args.batch / (time.perf_counter() - begin))
        for stream in streams.values():
            stream.close()
    print("| JPEG files | workers | images per second |\n| --- | --- | --- |")
    for (size, workers), rate in rates.items():
        print(f"| {size} | {workers} | {np.median(rate):.0f} |")


def write_images(directory, width, height, num):
    """Writes random crops of the photographs (427 pixels high), enlarged if they are too small."""
    # Here, because the import is slow.
    from sklearn.datasets import load_sample_images

    directory.mkdir()
    rng = np.random.default_rng(0)
    photographs = [Image.fromarray(photograph) for photograph in load_sample_images().images]
    for i in range(num):
        picture = photographs[i % 2]
        scale = min(1, picture.width / width, picture.height / height)
        w, h = int(width * scale), int(height * scale)
        left = int(rng.integers(picture.width - w + 1))
        top = int(rng.integers(picture.height - h + 1))
        crop = picture.crop((left, top, left + w, top + h)).resize((width, height))
        crop.save(directory / f"{i:05d}.jpg", quality=90)


def drain(stream):
    """Takes batches until one was not ready in advance."""
    for _ in range(100):
        begin = time.perf_counter()
        next(stream)
        if time.perf_counter() - begin > 0.02:
            return


if __name__ == "__main__":
    main()
