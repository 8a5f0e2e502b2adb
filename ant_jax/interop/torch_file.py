"""Reads checkpoints of PyTorch without PyTorch and without running code in them."""

import io
import mmap
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

import ml_dtypes
import numpy as np

from ant_jax.interop import plain_pickle
from ant_jax.interop.plain_pickle import Global, Unread

_DTYPES = {
    "torch.DoubleStorage": np.float64,
    "torch.FloatStorage": np.float32,
    "torch.HalfStorage": np.float16,
    "torch.BFloat16Storage": ml_dtypes.bfloat16,
    "torch.LongStorage": np.int64,
    "torch.IntStorage": np.int32,
    "torch.ShortStorage": np.int16,
    "torch.CharStorage": np.int8,
    "torch.ByteStorage": np.uint8,
    "torch.BoolStorage": np.bool_,
    "torch.ComplexFloatStorage": np.complex64,
    "torch.ComplexDoubleStorage": np.complex128,
    "torch.storage.UntypedStorage": np.uint8,
}
_SCALARS = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"}

# The first and second pickle of the format before PyTorch 1.6.
_LEGACY = (0x1950A86A20F9469CFC6C, 1001)
_CHUNK = 1 << 20

# Returns the bytes of a storage, from its key, number of elements and type.
_RawOf = Callable[[str, int, np.dtype], np.ndarray]


def read(path: str | Path) -> Any:
    """Reads a file of `torch.save`: .pt, .pth or .ckpt, zipped or in the format before 1.6.

    Reads only tensors and plain containers. It neither imports nor calls what the file names, and
    does not need PyTorch. A class that the file only refers to, such as a callback of PyTorch
    Lightning as a key, becomes a `Global`. An object of another class, such as a config or a path
    beside the tensors, becomes an `Unread`, which holds only the name of the class. An
    argparse.Namespace, which DiT's training script adds, becomes a dict of its attributes.

    Each storage is read once, and its tensors are views of it. In a zipped file the checksum of
    each storage is verified. The formats are those of torch/serialization.py in PyTorch 2.13.

    Args:
      path: The file.

    Returns:
      The saved object, most often a dict. Tensors and parameters become read-only NumPy arrays of
      the same shape and type; bfloat16 is that of ml_dtypes. A storage by itself becomes a
      one-dimensional array. The other types are dict (also for an OrderedDict, without its
      attributes), list, tuple (also for a torch.Size), set, str (also for a torch.device), int,
      float, bool (also for NumPy's scalars), None, bytes, np.dtype, `Global` (also for a
      torch.dtype) and `Unread`.

    Raises:
      FileNotFoundError: If the file does not exist.
      ValueError: If the file is not a checkpoint, is damaged, or was written on a big-endian
        machine. The message names the file and the cause.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a directory, not a PyTorch checkpoint")
    with path.open("rb") as file:
        try:
            return _read(file)
        # zipfile raises the types after ValueError for damaged archives.
        except (
            ValueError,
            OSError,
            EOFError,
            NotImplementedError,
            OverflowError,
            struct.error,
            zipfile.BadZipFile,
        ) as error:
            raise ValueError(f"cannot read {path}: {error}") from error


def _read(file):
    head = file.read(512)
    if head.startswith(b"PK\x03\x04"):
        return _read_zip(file)
    if head[257:262] == b"ustar":
        raise ValueError("it is a tar archive, the first format of PyTorch; save it anew")
    if not head:
        raise ValueError("it is empty")
    return _read_legacy(file, head)


def _read_zip(file):
    with zipfile.ZipFile(file) as archive:
        records = {info.filename: info for info in archive.infolist()}
        if len(records) < len(archive.infolist()):
            raise ValueError("two of its records have the same name")
        for name, info in records.items():
            # PyTorch does neither. Otherwise a record could be larger than the file.
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
                raise ValueError(f"its record {name} is compressed or encrypted")
        if sum(info.file_size for info in records.values()) > _size(file):
            raise ValueError("its records are larger than the file")
        prefixes = [name[: -len("data.pkl")] for name in records if name.endswith("/data.pkl")]
        if len(prefixes) != 1:
            raise ValueError(f"it is a zip archive with {len(prefixes)} records data.pkl, not one")
        prefix = prefixes[0]
        if prefix + "constants.pkl" in records:
            raise ValueError("it is a program (TorchScript), not a checkpoint")
        byteorder = prefix + "byteorder"
        if byteorder in records and archive.read(byteorder) != b"little":
            raise ValueError("it was written on a big-endian machine; save it anew on another")

        raws: dict[str, np.ndarray] = {}

        def raw_of(key, numel, dtype):
            name = f"{prefix}data/{key}"
            if name not in records:
                raise ValueError(f"its record {name} is missing")
            if records[name].file_size != numel * dtype.itemsize:
                raise ValueError(
                    f"its record {name} has {records[name].file_size} bytes, not the "
                    f"{numel * dtype.itemsize} of {numel} values of {dtype}"
                )
            if key not in raws:
                raws[key] = np.empty(records[name].file_size, np.uint8)
                with archive.open(name) as record:
                    _fill(raws[key], record, name)
            return raws[key]

        return _unpickle(io.BytesIO(archive.read(prefix + "data.pkl")), raw_of)


def _read_legacy(file, head):
    left = _size(file)
    raws: dict[str, np.ndarray] = {}
    numels: dict[str, int] = {}

    def raw_of(key, numel, dtype):
        nonlocal left
        nbytes = numel * dtype.itemsize
        if key not in raws:
            # The bytes come after all pickles, so a damaged file could claim any size here.
            left -= nbytes
            if left < 0:
                raise ValueError(f"its storages up to {key} are larger than the file")
            raws[key], numels[key] = np.empty(nbytes, np.uint8), numel
        if raws[key].nbytes != nbytes:
            raise ValueError(f"its storage {key} has two sizes, {raws[key].nbytes} and {nbytes}")
        return raws[key]

    # A memory map, because its read(n) allocates no more than the file has.
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        # It has what `plain_pickle.load` needs of a file.
        stream = cast("BinaryIO", mapped)
        try:
            versions = _unpickle(stream, raw_of), _unpickle(stream, raw_of)
        except ValueError:
            versions = None
        if versions != _LEGACY:
            raise ValueError(f"it is no PyTorch checkpoint; it begins with {head[:16]!r}")
        system = _unpickle(stream, raw_of)
        if type(system) is not dict or system.get("little_endian") is not True:
            raise ValueError("it was written on a big-endian machine; save it anew on another")
        tree = _unpickle(stream, raw_of)
        keys = _unpickle(stream, raw_of)
        file.seek(stream.tell())
    if type(keys) is not list or not all(type(key) is str for key in keys):
        raise ValueError("its list of storages is damaged")
    if sorted(keys) != sorted(raws):
        raise ValueError("its list of storages does not match its tensors")
    for key in keys:
        if file.read(8) != numels[key].to_bytes(8, "little"):
            raise ValueError(f"its storage {key} is cut off or of other than {numels[key]} values")
        _fill(raws[key], file, f"storage {key}")
    return tree


def _size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size


def _fill(raw: np.ndarray, stream: Any, name: str) -> None:
    """Reads an array by the method ``readinto``, which the types of files in typing lack."""
    view, done = raw.data, 0
    # In parts, because zipfile copies all bytes of one read.
    while count := stream.readinto(view[done : done + _CHUNK]):
        done += count
    if done < raw.nbytes:
        raise ValueError(f"it is cut off: {name} has {done} of {raw.nbytes} bytes")


def _unpickle(stream: BinaryIO, raw_of: _RawOf) -> Any:
    namespaces: dict[int, dict] = {}

    def namespace():
        attributes: dict = {}
        namespaces[id(attributes)] = attributes
        return attributes

    def set_state(target, state):
        if isinstance(target, np.dtype):
            if type(state) is not tuple or state[1] not in ("<", "|", "="):
                raise ValueError("a big-endian or unknown NumPy type")
        elif type(target) is not dict or type(state) is not dict:
            raise ValueError(f"a damaged pickle: a state of a {type(target).__name__}")
        elif id(target) in namespaces:
            target.update(state)

    builders = {**_BUILDERS, "argparse.Namespace": namespace}
    return plain_pickle.load(stream, builders, set_state, lambda id: _storage(id, raw_of))


def _storage(persistent_id: Any, raw_of: _RawOf) -> np.ndarray | Global:
    match persistent_id:
        case ("storage", Global(name), str(key), _, int(numel)):
            view = None
        case ("storage", Global(name), str(key), _, int(numel), view):
            pass
        # In the format before 1.6, a whole module with its source.
        case ("module", Global() as what, *_):
            return what
        case _:
            raise ValueError("a reference to neither a storage nor a module")
    if name not in _DTYPES:
        raise ValueError(f"tensors of {name}, a type that can't be read")
    if numel < 0:
        raise ValueError(f"storage {key} has {numel} values")
    storage = _read_only(raw_of(key, numel, np.dtype(_DTYPES[name])).view(_DTYPES[name]))
    match view:
        case None:
            return storage
        # The first versions of PyTorch wrote views.
        case (_, int(start), int(count)) if 0 <= start <= start + count <= numel:
            return storage[start : start + count]
    raise ValueError(f"a view of storage {key} that is not within it")


def _tensor(storage, offset, size, strides):
    if type(storage) is not np.ndarray or storage.ndim != 1 or not storage.flags.c_contiguous:
        raise ValueError("a tensor without a storage")
    if type(size) is not tuple or type(strides) is not tuple or len(size) != len(strides):
        raise ValueError("a tensor whose size and strides don't fit")
    if not all(type(n) is int and n >= 0 for n in (offset, *size, *strides)):
        raise ValueError("a tensor whose offset, size or strides are not natural numbers")
    if 0 in size:
        return _read_only(np.empty(size, storage.dtype))
    end = offset + sum((n - 1) * stride for n, stride in zip(size, strides, strict=True)) + 1
    if end > storage.size:
        raise ValueError(f"a tensor of size {size} that is not within its storage")
    itemsize = storage.itemsize
    # As bytes, because arrays with types of ml_dtypes don't support the buffer protocol.
    buffer = storage.view(np.uint8)
    return np.ndarray(
        size, storage.dtype, buffer, offset * itemsize, [stride * itemsize for stride in strides]
    )


def _read_only(array):
    array.flags.writeable = False
    return array


def _tensor_v2(storage, offset, size, strides, requires_grad, hooks, metadata=None):
    if metadata:
        raise ValueError("a tensor that is a conjugate or negative view")
    return _tensor(storage, offset, size, strides)


def _parameter(data, requires_grad, hooks):
    if type(data) not in (np.ndarray, Unread):
        raise ValueError("a parameter without a tensor")
    return data


def _ordered_dict(pairs=()):
    result = {}
    for key, value in pairs:
        if type(key) is Unread:
            continue
        if not plain_pickle.is_key(key):
            raise ValueError(f"a {type(key).__name__} as a key")
        result[key] = value
    return result


def _set(elements=()):
    elements = [element for element in elements if type(element) is not Unread]
    if not all(plain_pickle.is_key(element) for element in elements):
        raise ValueError("a set of more than plain values")
    return set(elements)


def _size_of(size):
    if type(size) is not tuple or not all(type(n) is int for n in size):
        raise ValueError("a torch.Size that is no tuple of integers")
    return size


def _device(kind, index=None):
    if type(kind) is not str or type(index) not in (int, type(None)):
        raise ValueError("a torch.device that is no name and number")
    return kind if index is None else f"{kind}:{index}"


def _encode(text, encoding):
    # Pickle protocols before 3 write bytes like this.
    if type(text) is not str or encoding != "latin1":
        raise ValueError("bytes that are not written as latin1")
    return text.encode("latin1")


def _dtype(code, align, copy):
    if type(code) is not str:
        raise ValueError("a NumPy type without a name")
    return np.dtype(code) if code in _SCALARS else Unread("numpy.dtype")


def _scalar(dtype, data):
    if type(dtype) is Unread:
        return Unread("numpy.scalar")
    if not isinstance(dtype, np.dtype) or type(data) is not bytes or len(data) != dtype.itemsize:
        raise ValueError("a NumPy scalar that is not of its type's size")
    return np.frombuffer(data, dtype)[0].item()


_BUILDERS = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.Size": _size_of,
    "torch.device": _device,
    "collections.OrderedDict": _ordered_dict,
    "collections.defaultdict": lambda *_: {},
    "builtins.set": _set,
    "__builtin__.set": _set,
    "__builtin__.bytes": lambda: b"",
    "_codecs.encode": _encode,
    "numpy.dtype": _dtype,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
}
