import io
import math
import tracemalloc
import zipfile

import numpy as np
import pytest

from ant_jax.evaluation import Gaussian, read_statistics
from ant_jax.sampling import read_samples


def _images(n, size=4, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3)).astype(np.uint8)


def _gaussian(d, seed=0):
    x = np.random.default_rng(seed).standard_normal((d + 5, d))
    return Gaussian(x.mean(axis=0), np.cov(x, rowvar=False))


def _peak(do):
    tracemalloc.start()
    do()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_a_reference_batch_with_images_and_statistics(tmp_path):
    path = tmp_path / "a.npz"
    pool, spatial = _gaussian(3), _gaussian(4)
    mean32 = pool.mean.astype(np.float32)
    np.savez(
        path, arr_0=_images(2), mu=mean32, sigma=pool.cov, mu_s=spatial.mean, sigma_s=spatial.cov
    )
    got = read_statistics(path)
    assert got.keys() == {"features", "spatial"} and got["features"].mean.dtype == np.float64
    np.testing.assert_array_equal(got["features"].mean, mean32)
    np.testing.assert_array_equal(got["features"].cov, pool.cov)
    np.testing.assert_array_equal(got["spatial"].mean, spatial.mean)
    np.testing.assert_array_equal(got["spatial"].cov, spatial.cov)
    np.testing.assert_array_equal(next(read_samples(path, 2))[0], _images(2))
    np.savez(path, mu=mean32, sigma=pool.cov)
    assert read_statistics(path).keys() == {"features"}


def test_images_alone_have_no_statistics(tmp_path):
    np.savez(tmp_path / "a.npz", _images(2))
    assert read_statistics(tmp_path / "a.npz") == {}


_EYE = {"mu": np.zeros(2), "sigma": np.eye(2)}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": np.zeros(2)}, "neither 'arr_0' nor 'mu' but .*labels"),
        ({"mu": np.zeros(2)}, "no 'sigma'"),
        ({"sigma": np.eye(2)}, "no 'mu'"),
        (_EYE | {"mu_s": np.zeros(2)}, "no 'sigma_s'"),
        (_EYE | {"sigma": np.ones((2, 3))}, r"'sigma' must be .*\(2, 3\)"),
        (_EYE | {"sigma": np.eye(3)}, r"'sigma' must be .*\(3, 3\)"),
        (_EYE | {"mu": np.zeros((1, 2))}, r"'mu' and .*\(1, 2\)"),
        (_EYE | {"mu": np.array([0, np.nan])}, "'mu' has numbers that are not finite"),
        (_EYE | {"sigma": np.diag([1, np.inf])}, "'sigma' has numbers that are not finite"),
        (_EYE | {"mu": np.zeros(2, int)}, "'mu' must be floating-point numbers, got int64"),
        (_EYE | {"mu": np.array([1, None])}, "'mu' has objects of Python"),
    ],
)
def test_bad_statistics(arrays, message, tmp_path):
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=f"bad.npz cannot be used: .*{message}"):
        read_statistics(path)


def test_damaged_statistics(tmp_path):
    path = tmp_path / "bad.npz"
    np.savez(path, **_EYE)
    content = path.read_bytes()
    for damaged in (content[:-30], content[: len(content) // 2], b"", b"no zip"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"bad\.npz cannot be used"):
            read_statistics(path)
    with pytest.raises(FileNotFoundError, match=r"absent\.npz"):
        read_statistics(tmp_path / "absent.npz")


def _zeros(shape, dtype):
    """The content of an array's file, of which the zeros are compressed to nearly nothing."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    )
    return header.getvalue() + bytes(math.prod(shape) * np.dtype(dtype).itemsize)


# Each of a few kB, and of tens of MB where all of it is read.
_BOMBS = {
    "more than 4096": {"mu": _zeros((4200,), "f2"), "sigma": _zeros((4200, 4200), "f2")},
    "bytes instead of": {"mu": _zeros((4,), "f2"), "sigma": _zeros((3000, 3000), "f2") + b"0"},
}


@pytest.mark.parametrize("message", _BOMBS)
def test_what_a_file_asks_for_is_checked_before_it_is_unpacked(message, tmp_path):
    path = tmp_path / "bad.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in _BOMBS[message].items():
            archive.writestr(f"{name}.npy", content)
    assert path.stat().st_size < 200_000

    def read():
        with pytest.raises(ValueError, match=f"bad.npz cannot be used: .*{message}"):
            read_statistics(path)

    assert _peak(read) < 2**20
