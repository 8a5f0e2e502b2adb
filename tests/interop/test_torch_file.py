import pickle
import struct
import subprocess
import tracemalloc
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from torch_writers import (
    MAGIC,
    SYSTEM,
    call,
    literal,
    name,
    running,
    storage,
    tensor,
    write_legacy,
    write_zip,
)

from ant_jax.interop import Global, Unread, read

RECORDED = Path(__file__).parents[1] / "data" / "torch"


def assert_is(array, values, dtype):
    assert type(array) is np.ndarray and array.dtype == dtype and not array.flags.writeable
    np.testing.assert_array_equal(array, np.asarray(values).astype(dtype), strict=True)


@pytest.mark.parametrize("file", ["zip.pt", "zip_protocol5.pt", "legacy.pth"])
def test_what_torch_saves(file):
    tree = read(RECORDED / file)
    for kind, array in tree.pop("dtypes").items():
        dtype = ml_dtypes.bfloat16 if kind == "bfloat16" else np.dtype(kind)
        assert_is(array, np.arange(6) - 2, dtype)
    assert_is(tree.pop("scalar"), 3.5, np.float32)
    assert_is(tree.pop("empty"), np.zeros((0, 3)), np.float32)
    base, transposed, strided = tree.pop("shared")
    assert_is(base, np.arange(24), np.float32)
    assert_is(transposed, np.arange(6, 18).reshape(3, 4).T, np.float32)
    assert_is(strided, [[4, 6], [16, 18]], np.float32)
    assert np.shares_memory(base, transposed) and np.shares_memory(base, strided)
    assert_is(tree.pop("expanded"), np.full((2, 3), 7), np.int16)
    assert_is(tree.pop("parameter"), np.arange(4), np.float32)
    assert_is(tree.pop("storage"), np.arange(3).view(np.uint8), np.uint8)
    expected = {
        "size": (2, 3),
        "device": ["cpu", "cuda:1"],
        "dtype": Global("torch.float32"),
        "nested": [(1, -2.5, "ä"), {"none": None, 3: True}, (), [], b"\x00\xff", b"", 2**70],
        "set": {"a", 1},
        "tuple_key": {(1, "a"): 2},
    }
    assert tree == expected
    assert repr(tree.pop("set")) and repr(tree) == repr({k: expected[k] for k in tree})


def test_lightning():
    tree = read(RECORDED / "lightning.ckpt")
    weights = tree["state_dict"]
    assert type(weights) is dict
    assert list(weights)[:3] == ["0.weight", "0.bias", "1.weight"] and len(weights) == 7
    assert_is(weights["0.weight"], np.arange(6).reshape(2, 3), np.float32)
    assert_is(weights["1.num_batches_tracked"], 1, np.int64)
    callback = Global("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")
    assert_is(tree["callbacks"][callback]["best_model_score"], 0.25, np.float32)
    optimizer = tree["optimizer_states"][0]
    assert_is(optimizer["state"][0]["step"], 1, np.float32)
    assert optimizer["param_groups"][0]["betas"] == (0.9, 0.999)
    assert tree["lr_schedulers"] == [{"last_lr": [1e-4], "step": 7}]
    assert tree["args"] == {"model": "DiT-S/2", "inner": {"lr": 1e-4}}


def test_pickles_of_python_2(tmp_path):
    """Strings of bytes, pairs for an OrderedDict, the first rebuild and a view of a storage."""
    view = b"(U\x011K\x01K\x02t"
    whole, part = storage("0", 4, "torch.FloatStorage", b"N"), storage("0", 4, "torch.FloatStorage")
    part = storage("0", 4, "torch.FloatStorage", view)
    old = lambda of, n: call(
        "torch._utils._rebuild_tensor", of, literal(0), literal((n,)), b"K\x01\x85"
    )
    pairs = b"](](U\x01aL5L\ne](U\x01b" + old(whole, 4) + b"e](U\x01c" + old(part, 2) + b"ee"
    path = write_legacy(tmp_path / "x.pth", call("collections.OrderedDict", pairs))
    tree = read(path)
    assert list(tree) == ["a", "b", "c"] and tree["a"] == 5
    assert_is(tree["b"], np.arange(4), np.float32)
    assert_is(tree["c"], [1, 2], np.float32)


RUNNING = list(running(Path("marker")))


@pytest.mark.parametrize("case", RUNNING)
@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_nothing_is_run(tmp_path, write, case):
    marker = tmp_path / "marker"
    code, culprit = running(marker)[case]
    # The objects beside it are read.
    path = write(tmp_path / "x.pt", b"]" + tensor() + b"a" + code + b"a")
    weights, made = read(path)
    assert_is(weights, np.arange(4), np.float32)
    made = made["a"] if case == "value" else made
    assert made == Unread(culprit)
    assert not marker.exists()


def test_the_files_would_run_something(tmp_path):
    for case in RUNNING:
        marker = tmp_path / case
        made = pickle.loads(b"\x80\x02" + running(marker)[case][0] + b".")
        if case == "newobj":
            # An object that is not initialized: the unpickler would call only its __new__.
            assert type(made) is subprocess.Popen
        else:
            assert marker.exists(), case


STATE = literal({"name": "posix.system", "writeable": 1})
# An object of an unknown class, and what a pickle may do with it.
PATH = call("pathlib.PosixPath", literal("a"))
UNREAD = {
    "call": (PATH, "pathlib.PosixPath"),
    "call of what was made": (PATH + b"(" + tensor() + b"tR", "pathlib.PosixPath"),
    "keywords": (name("torch.Size") + b")" + literal({"x": 1}) + b"\x92", "torch.Size"),
    "class of a storage": (call("torch.FloatStorage", literal(4)), "torch.FloatStorage"),
    "unknown rebuild": (call("torch._utils._rebuild_qtensor"), "torch._utils._rebuild_qtensor"),
    "module": (b"(" + literal("module") + name("a.B") + b"NNtQ)\x81" + STATE + b"b", "a.B"),
    "state": (PATH + STATE + b"b", "pathlib.PosixPath"),
    "element": (PATH + literal(1) + b"a", "pathlib.PosixPath"),
    "elements": (PATH + b"(" + tensor() + literal(1) + b"e", "pathlib.PosixPath"),
    "item": (PATH + literal(1) * 2 + b"s", "pathlib.PosixPath"),
    "items": (PATH + b"(" + literal([]) + literal(1) + b"u", "pathlib.PosixPath"),
    "set's elements": (PATH + b"(" + literal(1) + b"\x90", "pathlib.PosixPath"),
    "frozen set": (b"(" + literal(1) + b"\x91", "builtins.frozenset"),
    "array of bytes": (b"\x96\x01" + bytes(7) + b"a", "builtins.bytearray"),
    "array of NumPy": (literal(np.arange(3)), "numpy._core.multiarray._reconstruct"),
    "objects of NumPy": (literal(np.dtype("O")), "numpy.dtype"),
}


@pytest.mark.parametrize("case", UNREAD)
def test_an_object_of_another_class_is_left_unread(tmp_path, case):
    code, culprit = UNREAD[case]
    path = write_zip(tmp_path / "x.pt", b"]" + tensor() + b"a" + code + b"a")
    weights, made = read(path)
    assert_is(weights, np.arange(4), np.float32)
    assert made == Unread(culprit)


def test_what_has_an_unread_key_is_left_out(tmp_path):
    code = b"]" + literal({"a": 1}) + PATH + literal(2) + b"sa"
    code += call("builtins.set", b"]" + PATH + b"a" + literal(1) + b"a") + b"a"
    code += b"\x8f(" + PATH + literal(1) + b"\x90a"
    code += call("collections.OrderedDict", b"](]" + PATH + b"a" + literal(1) + b"ae") + b"a"
    assert read(write_zip(tmp_path / "x.pt", code)) == [{"a": 1}, {1}, {1}, {}]


REFUSED = {
    "an argument": (call("torch.Size", PATH), "torch.Size"),
    "state of a global": (name("collections.OrderedDict") + STATE + b"b", "a Global"),
    "state of a tensor": (tensor() + STATE + b"b", "a ndarray"),
    "state of a list": (b"]" + STATE + b"b", "a list"),
    "call of a tensor": (tensor() + b")R", "a ndarray"),
    "call of a string": (literal("eval") + b")R", "a str"),
    "append to a global": (name("os.environ") + literal(1) + b"a", "without a list"),
    "item of a global": (name("os.environ") + literal(1) * 2 + b"s", "without a dict"),
    "item of a tensor": (tensor() + literal(1) * 2 + b"s", "without a dict"),
    "element of a global": (name("a.b") + b"(" + literal(1) + b"\x90", "without a set"),
    "extension": (b"\x82\x01", "EXT1"),
    "global of no name": (b"NN\x93", "name is not a string"),
    "big-endian NumPy": (literal(np.dtype(">f8")), "big-endian"),
    "scalar cut off": (
        call(
            "numpy._core.multiarray.scalar",
            call("numpy.dtype", literal("f8"), literal(False), literal(True)),
            call("_codecs.encode", literal("abcd"), literal("latin1")),
        ),
        "its type's size",
    ),
    "bytes in code": (call("_codecs.encode", literal("a"), literal("rot13")), "latin1"),
    "too many arguments": (call("torch.Size", b"))"), "torch.Size"),
    "arguments of a list": (name("torch.Size") + b"]R", "torch.Size"),
    "unhashable key": (b"}]Ns", "as a key"),
    "deep key": (b"})" + b"\x85" * 20_000 + b"Ns", "as a key"),
    "deep element": (call("builtins.set", b"])" + b"\x85" * 20_000 + b"a"), "plain values"),
    "unhashable key of pairs": (call("collections.OrderedDict", b"]]])aaNaa"), "as a key"),
    "too little on the stack": (b"t", "damaged"),
    "nothing in the memo": (b"h\x01", "damaged"),
    "odd items": (b"}(Nu", "without a dict"),
    "size of text": (call("torch.Size", literal(("a",))), "torch.Size"),
    "device of numbers": (call("torch.device", literal(1)), "torch.device"),
    "parameter of text": (
        call("torch._utils._rebuild_parameter", literal("a"), literal(True), b"N"),
        "without a tensor",
    ),
    "another reference": (literal(("file", "/etc/passwd")) + b"Q", "reference"),
    "negative storage": (tensor(of=storage(numel=-4)), "-4 values"),
    "quantised storage": (
        tensor(of=storage(kind="torch.QInt8Storage")),
        "QInt8Storage",
    ),
    "another size of the storage": (tensor(of=storage(numel=3), size=(3,)), None),
    "view outside": (storage("0", 4, "torch.FloatStorage", literal(("1", 3, 2))), "not within"),
    "view before": (storage("0", 4, "torch.FloatStorage", literal(("1", -1, 2))), "not within"),
    "tensor of a global": (tensor(of=name("torch.FloatStorage")), "without a storage"),
    "tensor of a transposed tensor": (
        tensor(of=tensor(size=(2, 2), strides=(1, 2)), size=(2,), strides=(1,)),
        "without a storage",
    ),
    "tensor, offset": (tensor(offset=1), "not within"),
    "tensor, offset of an end": (tensor(offset=4, size=(), strides=()), "not within"),
    "tensor, negative offset": (tensor(offset=-1), "natural"),
    "tensor, fractional offset": (tensor(offset=0.5), "natural"),
    "tensor, size": (tensor(size=(5,)), "not within"),
    "tensor, negative size": (tensor(size=(-1,)), "natural"),
    "tensor, stride": (tensor(size=(2,), strides=(4,)), "not within"),
    "tensor, negative stride": (tensor(offset=3, strides=(-1,)), "natural"),
    "tensor, unlike": (tensor(size=(2, 2)), "don't fit"),
    "tensor, list": (tensor(size=[4]), "don't fit"),
    "tensor, huge": (tensor(size=(2**40, 2**40), strides=(0, 0)), None),
    "tensor, huge stride": (tensor(size=(1,), strides=(2**80,)), None),
    "tensor, huge and empty": (tensor(size=(0, 2**80), strides=(1, 1)), None),
    "tensor, many dimensions": (tensor(size=(1,) * 99, strides=(0,) * 99), None),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_refused(tmp_path, write, case):
    code, culprit = REFUSED[case]
    path = write(tmp_path / "x.pt", code)
    with pytest.raises(ValueError, match=f"cannot read .*x.pt: .*{culprit or ''}"):
        read(path)


def test_conjugate_views_are_refused(tmp_path):
    rest = [literal(x) for x in (0, (4,), (1,), False)] + [b"}", literal({"neg": True})]
    code = call("torch._utils._rebuild_tensor_v2", storage(), *rest)
    with pytest.raises(ValueError, match="negative view"):
        read(write_zip(tmp_path / "x.pt", code))


def write_archive(path, change):
    """A checkpoint with changes in its table of records."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + tensor() + b".")
        archive.writestr("archive/data/0", bytes(16))
        change(archive)


def claim_much(archive):
    info = archive.getinfo("archive/data/0")
    info.file_size = info.compress_size = 1 << 40


def deflated(archive):
    archive.writestr("archive/data/1", bytes(100), zipfile.ZIP_DEFLATED)


def encrypted(archive):
    archive.getinfo("archive/data/0").flag_bits |= 1


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def damaged_record(path):
    write_zip(path, tensor())
    flip(path, path.read_bytes().index(np.arange(4, dtype="<f4").tobytes()) + 5)


def misplaced_table(path):
    """Records that would begin before the file."""
    write_zip(path, tensor())
    content = bytearray(path.read_bytes())
    (offset,) = struct.unpack("<I", content[-6:-2])
    content[-6:-2] = struct.pack("<I", offset + 10_000)
    path.write_bytes(content)


def legacy(**changes):
    return lambda path: write_legacy(path, **{"code": tensor(), **changes})


DAMAGED = {
    "empty": (lambda p: p.write_bytes(b""), "it is empty"),
    "web page": (lambda p: p.write_bytes(b"<!DOCTYPE html><p>404"), "begins with b'<!DOCTYPE"),
    "other pickle": (lambda p: p.write_bytes(pickle.dumps({"a": 1})), "no PyTorch checkpoint"),
    "version": (lambda p: p.write_bytes(pickle.dumps(MAGIC) + pickle.dumps(1002)), "no PyTorch"),
    "tar": (lambda p: p.write_bytes(b"x".ljust(257, b"\0") + b"ustar"), "tar archive"),
    "other zip": (lambda p: write_archive(p, lambda a: a.writestr("b/data.pkl", b"")), "2 records"),
    "script": (lambda p: write_zip(p, tensor(), **{"constants.pkl": b""}), "TorchScript"),
    "big-endian": (lambda p: write_zip(p, tensor(), byteorder=b"big"), "big-endian"),
    "no such record": (
        lambda p: write_zip(p, tensor(of=storage("1"))),
        "archive/data/1 is missing",
    ),
    "short record": (lambda p: write_zip(p, tensor(), {"0": bytes(8)}), "has 8 bytes, not the 16"),
    "same name": (
        lambda p: write_archive(p, lambda a: a.writestr("archive/data/0", b"")),
        "the same name",
    ),
    "huge record": (lambda p: write_archive(p, claim_much), "larger than the file"),
    "compressed": (lambda p: write_archive(p, deflated), "archive/data/1 is compressed"),
    "encrypted": (lambda p: write_archive(p, encrypted), "archive/data/0 is compressed or encr"),
    "checksum": (damaged_record, "CRC-32 for file 'archive/data/0'"),
    "table": (misplaced_table, ""),
    "big-endian legacy": (legacy(system=SYSTEM | {"little_endian": False}), "big-endian"),
    "huge storage": (legacy(code=tensor(of=storage(numel=1 << 40))), "larger than the file"),
    "many storages": (
        legacy(code=b"(" + b"".join(storage(str(i), 40) for i in range(99)) + b"l"),
        "larger than the file",
    ),
    "two sizes": (legacy(code=tensor() + tensor(of=storage(numel=3))), "two sizes"),
    "unlisted": (legacy(keys=()), "does not match its tensors"),
    "listed twice": (legacy(keys=("0", "0")), "does not match its tensors"),
    "list of no keys": (legacy(keys=([],)), "list of storages is damaged"),
    "other size": (legacy(raw=struct.pack("<q4f", 3, 0, 1, 2, 3)), "other than 4 values"),
    "negative size": (legacy(raw=struct.pack("<q4f", -4, 0, 1, 2, 3)), "other than 4 values"),
}


@pytest.mark.parametrize("case", DAMAGED)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_damaged(tmp_path, case):
    write, cause = DAMAGED[case]
    path = tmp_path / "x.pt"
    write(path)
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"x.pt: .*{cause}"):
        read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6


def test_paths(tmp_path):
    with pytest.raises(ValueError, match="is a directory"):
        read(tmp_path)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.pt")


@pytest.mark.parametrize("file", ["zip.pt", "legacy.pth"])
def test_cut_off_or_changed(tmp_path, file):
    """Any damage raises ValueError and no other error; truncation is always found."""
    content = (RECORDED / file).read_bytes()
    path = tmp_path / file
    for length in range(0, len(content), 61):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=file):
            read(path)
    rng = np.random.default_rng(0)
    for position in rng.integers(len(content), size=150):
        path.write_bytes(content)
        flip(path, position)
        try:
            read(path)
        except ValueError as error:
            assert file in str(error)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_containers(tmp_path, protocol):
    """Each protocol writes them with different instructions."""
    tree = {
        "numbers": [0, -1, 300, 70_000, 2**40, -(2**80), 0.1, True, False, None],
        "text": ["", "a", "é\n", "x" * 300, b"", b"\xff\n", b"y" * 300],
        "containers": [
            [],
            {},
            (),
            (1,),
            (1, 2),
            (1, 2, 3),
            (1, 2, 3, [4]),
            {"k": {2: 3}},
            {5, "b"},
        ],
        3: {None: 1, 2.5: 2, (1, "a"): 3},
    }
    tree["again"] = tree["numbers"]
    result = read(write_zip(tmp_path / "x.pt", pickle.dumps(tree, protocol)[:-1]))
    assert result == tree
    assert result["numbers"][7:] == [True, False, None] and result["numbers"][7] is True
    assert result["again"] is result["numbers"]


def test_bombs_do_no_harm(tmp_path):
    deep = b"]" * 20_000 + b"a" * 19_999
    tree = read(write_zip(tmp_path / "deep.pt", deep))
    for _ in range(19_999):
        (tree,) = tree
    assert tree == []
    memo = b"]r\xff\xff\xff\x7f" + b"j\xff\xff\xff\x7fa"
    cyclic = read(write_zip(tmp_path / "memo.pt", memo))
    assert cyclic[0] is cyclic


@pytest.mark.parametrize("write", ["zip", "legacy"])
def test_a_storage_is_held_once(tmp_path, write):
    numel = 4_000_000
    code = b"(" + 2 * tensor(of=storage(numel=numel), size=(numel,)) + b"l"
    content = np.arange(numel, dtype="<f4").tobytes()
    path = tmp_path / "x.pt"
    if write == "zip":
        write_zip(path, code, {"0": content})
    else:
        write_legacy(path, code, raw=struct.pack("<q", numel) + content)
    del content
    tracemalloc.start()
    first, second = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 16e6 < peak < 24e6
    assert np.shares_memory(first, second)
    np.testing.assert_array_equal(second, np.arange(numel, dtype=np.float32))


def test_a_whole_module_is_not_read():
    assert read(RECORDED / "module.pt") == Unread("torch.nn.modules.linear.Linear")
