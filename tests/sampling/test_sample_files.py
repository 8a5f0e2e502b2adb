import io
import math
import tracemalloc
import zipfile

import numpy as np
import pytest

from ant_jax.sampling import files, num_samples, read_samples, write_samples


def _images(n, size=4, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3)).astype(np.uint8)


def _batches(images, labels, size):
    for i in range(0, len(images), size):
        yield images[i : i + size], None if labels is None else labels[i : i + size]


def _npy(array):
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def _zip(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("batch_size", [1, 3, 7, 10])
def test_reads_what_numpy_saves(save, batch_size, tmp_path):
    images, labels = _images(7), np.arange(7, dtype=np.int32)
    save(tmp_path / "a.npz", images, labels)
    assert num_samples(tmp_path / "a.npz") == 7
    batches = list(read_samples(tmp_path / "a.npz", batch_size))
    assert {len(x) for x, _ in batches[:-1]} <= {batch_size}
    np.testing.assert_array_equal(np.concatenate([x for x, _ in batches]), images)
    np.testing.assert_array_equal(np.concatenate([y for _, y in batches]), labels)
    save(tmp_path / "b.npz", images)
    assert all(y is None for _, y in read_samples(tmp_path / "b.npz", batch_size))


@pytest.mark.parametrize("labelled", [False, True])
def test_numpy_reads_what_is_written(labelled, tmp_path):
    images, labels = _images(7), np.arange(7) if labelled else None
    path = tmp_path / "new" / "a.npz"
    write_samples(path, _batches(images, labels, 3), 7)
    with np.load(path, allow_pickle=False) as stored:
        assert stored.files == (["arr_0", "arr_1"] if labelled else ["arr_0"])
        np.testing.assert_array_equal(stored["arr_0"], images)
        if labelled:
            np.testing.assert_array_equal(stored["arr_1"], labels)
    (read, read_labels), *others = read_samples(path, 100)
    assert not others and (read_labels is not None) == labelled
    np.testing.assert_array_equal(read, images)


def test_images_that_do_not_lie_in_order(tmp_path):
    images = _images(3).transpose(0, 2, 1, 3)[:, ::-1]
    write_samples(tmp_path / "a.npz", [(images, None)], 3)
    np.testing.assert_array_equal(next(read_samples(tmp_path / "a.npz", 3))[0], images)


def _peak(do):
    tracemalloc.start()
    do()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_no_more_than_a_few_batches_are_in_memory(compression, tmp_path):
    batch = _images(8, 64)
    path = tmp_path / "a.npz"
    written = _peak(lambda: write_samples(path, ((batch, None) for _ in range(32)), 256))
    assert path.stat().st_size > 32 * batch.nbytes
    if compression == zipfile.ZIP_DEFLATED:
        content = np.load(path)["arr_0"]
        np.savez_compressed(path, content)
        del content
    sums = []
    read = _peak(lambda: sums.extend(x.sum(dtype=int) for x, _ in read_samples(path, 8)))
    assert sums == [batch.sum(dtype=int)] * 32
    assert max(written, read) < 8 * batch.nbytes


@pytest.mark.parametrize(
    ("batches", "count", "message"),
    [
        ([(_images(2), None)], 3, "only 2 of 3"),
        ([(_images(2), None)] * 2, 3, "more than 3"),
        ([], 1, "only 0 of 1"),
        ([(_images(2), None)], 0, "num_samples must be positive"),
        ([(_images(2), None), (_images(1, 5), None)], 3, r"\(5, 5, 3\) came after \(4, 4, 3\)"),
        ([(_images(2) / 255, None)], 2, "uint8.*float64"),
        ([(_images(2)[0], None)], 2, r"uint8 \(4, 4, 3\)"),
        ([(_images(2), [1, 2, 3])], 2, r"2 images need as many integer labels, got int64 \(3,\)"),
        ([(_images(2), [0.5, 1.5])], 2, "integer labels, got float64"),
        ([(_images(2), [1, 2]), (_images(1), None)], 3, r"3 images need .*\(2,\)"),
    ],
)
def test_a_file_that_cannot_be_finished_is_not_there(batches, count, message, tmp_path):
    path = tmp_path / "a.npz"
    write_samples(path, [(_images(1), None)], 1)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        write_samples(path, batches, count)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == before


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(2)}, "no 'arr_0' but .*mu"),
        ({"arr_0": _images(2) / 255}, "uint8 images .*float64"),
        ({"arr_0": _images(2)[0]}, r"uint8 images .*\(4, 4, 3\)"),
        ({"arr_0": _images(0)}, r"\(0, 4, 4, 3\)"),
        ({"arr_0": np.asfortranarray(_images(2))}, "Fortran order"),
        ({"arr_0": np.array([_images(1), None], object)}, "'arr_0' has objects of Python"),
        ({"arr_0": _images(2), "arr_1": np.arange(3)}, r"2 images need .*\(3,\)"),
        ({"arr_0": _images(2), "arr_1": np.array([1, None])}, "'arr_1' has objects of Python"),
    ],
)
def test_bad_images(arrays, message, tmp_path):
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=f"bad.npz cannot be used: .*{message}"):
        next(read_samples(path, 2))


@pytest.mark.parametrize("read", [lambda path: list(read_samples(path, 2)), num_samples])
def test_files_that_are_none(read, tmp_path):
    path = tmp_path / "bad.npz"
    np.savez(path, _images(5))
    content = path.read_bytes()
    for damaged in (content[:-30], content[: len(content) // 2], b"", b"no zip", _npy(_images(2))):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"bad\.npz cannot be used"):
            read(path)
    with pytest.raises(FileNotFoundError, match=r"absent\.npz"):
        read(tmp_path / "absent.npz")


def test_damage_within_the_images(tmp_path):
    path = tmp_path / "bad.npz"
    content = _npy(_images(5))
    for member, message in (
        (content[:-1], r"239 bytes instead of the 240 of uint8 \(5, 4, 4, 3\)"),
        (content + b"\0", "241 bytes instead of the 240 of"),
        (content[:40], "cannot be used"),
        (b"\x93NUMPY\x09\x00" + content[8:], r"unknown format \(9, 0\)"),
    ):
        _zip(path, {"arr_0.npy": member})
        with pytest.raises(ValueError, match=f"bad.npz.*{message}"):
            list(read_samples(path, 2))
    _zip(path, {"arr_0.npy": content})
    damaged = path.read_bytes().replace(content[-9:], bytes(9))
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"bad\.npz.*CRC"):
        list(read_samples(path, 2))


def _zeros(shape, dtype):
    """The content of an array's file, of which the zeros are compressed to nearly nothing."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    )
    return header.getvalue() + bytes(math.prod(shape) * np.dtype(dtype).itemsize)


# Each of a few kB, and of tens of MB where all of it is read.
_BOMBS = {
    "'arr_0' has .* bytes instead of the 400": {
        "arr_0": _zeros((4, 10, 10, 1), "u1") + bytes(2**24)
    },
    "has images of 16777216 bytes each": {"arr_0": _zeros((1, 2**12, 2**12, 1), "u1")},
    "EOF: reading array header": {"arr_0": b"\x93NUMPY\x02\x00" + b"\xff" * 4 + b" " * 2**24},
}


@pytest.mark.parametrize("message", _BOMBS)
def test_what_a_file_asks_for_is_checked_before_it_is_unpacked(message, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_AT_ONCE", 2**20)
    path = tmp_path / "bad.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in _BOMBS[message].items():
            archive.writestr(f"{name}.npy", content)
    assert path.stat().st_size < 200_000

    def read():
        with pytest.raises(ValueError, match=f"bad.npz cannot be used: .*{message}"):
            next(read_samples(path, 2))

    assert _peak(read) < 2**20


def test_batches_of_large_images_and_labels_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_AT_ONCE", 2**20)
    path = tmp_path / "a.npz"
    np.savez_compressed(path, np.zeros((3, 2**9, 2**9, 4), np.uint8), np.arange(3))
    counts = [(len(images), len(labels)) for images, labels in read_samples(path, 3)]
    assert counts == [(1, 1)] * 3
    np.savez_compressed(path, np.zeros((2**20, 1, 1, 1), np.uint8), np.zeros(2**20, int))
    assert _peak(lambda: next(read_samples(path, 10))) < 2**20


def test_an_archive_that_numpy_does_not_write(tmp_path):
    path = tmp_path / "bad.npz"
    # The dictionary that LZMA is unpacked with may be of gigabytes.
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("arr_0.npy", _npy(_images(2)))
    with pytest.raises(ValueError, match=r"bad.npz.*'arr_0' is not compressed as NumPy does it"):
        num_samples(path)


def test_a_batch_has_a_size(tmp_path):
    np.savez(tmp_path / "a.npz", _images(2))
    with pytest.raises(ValueError, match="batch_size"):
        next(read_samples(tmp_path / "a.npz", 0))
