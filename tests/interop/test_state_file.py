import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from torch_writers import call, literal, running, storage, tensor, write_legacy, write_zip

from ant_jax.interop import WeightsError, read_metadata, read_state, write_state

RECORDED = Path(__file__).parents[1] / "data" / "torch"
RECORDS = {"0": np.arange(4, dtype="<f4").tobytes(), "1": np.ones(4, "<f4").tobytes()}
RANGE, ONES = tensor(of=storage("0")), tensor(of=storage("1"))


def items(**values):
    """The instructions that create a dict of the objects that other instructions create."""
    return b"}" + b"".join(literal(key) + value + b"s" for key, value in values.items())


def module(**values):
    return items(**{f"module.{key}": value for key, value in values.items()})


# An object that is not a tensor.
PATH = call("pathlib.PosixPath", literal("x"))
HOLDING_THE_RANGE = {
    "alone": items(w=RANGE),
    "lightning": items(epoch=literal(3), state_dict=items(w=RANGE)),
    "dit": items(model=items(w=ONES), ema=items(w=RANGE), opt=items(), args=items()),
    "average of another kind": items(ema=items(decay=literal(0.5)), model=items(w=RANGE)),
    "parallel": module(w=RANGE),
    "parallel within": items(model=module(w=RANGE)),
    "model_state_dict": items(model_state_dict=items(w=RANGE), epoch=literal(3)),
    "compiled": items(**{"_orig_mod.w": RANGE}),
    "compiled, then parallel": items(**{"module._orig_mod.w": RANGE}),
    "parallel, then compiled": items(**{"_orig_mod.module.w": RANGE}),
    "lightning's network": items(state_dict=items(**{"model._orig_mod.w": RANGE})),
    "sharded": items(model=items(**{"module.model._fsdp_wrapped_module.w": RANGE})),
    "numbers": items(w=RANGE, epoch=literal(3), name=literal("x"), lr=literal([0.1, {"a": 1}])),
    "config": items(state_dict=items(w=RANGE), hyper_parameters=PATH, args=items(p=PATH)),
    "config among them": items(w=RANGE, config=PATH),
    "average of many": items(ema=items(decay=ONES, shadow=items(w=ONES)), model=items(w=RANGE)),
}


@pytest.mark.parametrize("case", HOLDING_THE_RANGE)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_containers(tmp_path, case, suffix):
    path = write_zip(tmp_path / f"x{suffix}", HOLDING_THE_RANGE[case], RECORDS)
    state = read_state(path)
    assert list(state) == ["w"]
    np.testing.assert_array_equal(state["w"], np.arange(4, dtype=np.float32), strict=True)


def test_names_that_look_like_containers_and_prefixes(tmp_path):
    code = items(model=RANGE, **{"module.w": ONES})
    state = read_state(write_zip(tmp_path / "x.pt", code, RECORDS))
    assert set(state) == {"model", "module.w"}


def test_files_of_torch_itself():
    state = read_state(RECORDED / "lightning.ckpt")
    assert list(state)[:3] == ["0.weight", "0.bias", "1.weight"] and len(state) == 7


@pytest.mark.parametrize(
    "code, held",
    [
        (items(epoch=literal(3)), r"a dict with the keys \['epoch'\]"),
        (items(network=items(w=RANGE)), r"a dict with the keys \['network'\]"),
        (items(state_dict=items()), r"a dict with the keys \['state_dict'\]"),
        (items(w=RANGE, opt=items(m=ONES)), r"a dict with the keys \['w', 'opt'\]"),
        (b"]" + RANGE + b"a", "<class 'list'>"),
        (RANGE, "<class 'numpy.ndarray'>"),
    ],
)
def test_no_state_dict(tmp_path, code, held):
    path = write_zip(tmp_path / "x.pt", code, RECORDS)
    with pytest.raises(WeightsError, match=f"x.pt has no state dict.* It holds {held}"):
        read_state(path)


@pytest.mark.parametrize(
    "code, fault",
    [
        (PATH, r"as an object of pathlib\.PosixPath, which can't be read"),
        # The moving average is not replaced by the network.
        (items(ema=PATH, model=items(w=RANGE)), r"as an object of pathlib\.PosixPath"),
        (
            items(w=RANGE, v=call("torch._utils._rebuild_qtensor")),
            r"v is created by torch\._",
        ),
        (items(w=RANGE, v=literal(np.arange(3))), r"v is created by numpy\._?core\.multiarray\._"),
        (items(w=RANGE, **{"_orig_mod.w": ONES}), "two weights of the name w"),
    ],
)
def test_what_may_be_a_part_of_the_network_is_not_left_out(tmp_path, code, fault):
    with pytest.raises(WeightsError, match=f"x.pt.* {fault}"):
        read_state(write_zip(tmp_path / "x.pt", code, RECORDS))


def test_a_circle_of_containers_ends(tmp_path):
    # A dict that contains itself in a list, and 20 000 nested lists.
    code = b"}r\x01\x00\x00\x00" + literal("w") + RANGE + b"s" + literal("x")
    code += b"]j\x01\x00\x00\x00a" + b"]" * 20_000 + b"a" * 20_000 + b"s"
    path = write_zip(tmp_path / "x.pt", code, RECORDS)
    with pytest.raises(WeightsError, match="no state dict"):
        read_state(path)
    deep = b"}" + literal("w") + RANGE + b"s" + literal("x")
    deep += b"]" * 20_000 + b"a" * 19_999 + b"s"
    assert list(read_state(write_zip(tmp_path / "deep.pt", deep, RECORDS))) == ["w"]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_nothing_is_run(tmp_path, write, suffix):
    marker = tmp_path / "marker"
    path = write(tmp_path / f"x{suffix}", items(w=tensor(), x=running(marker)["reduce"][0]))
    assert list(read_state(path)) == ["w"]
    path = write(tmp_path / f"y{suffix}", items(w=tensor(), ema=running(marker)["reduce"][0]))
    with pytest.raises(WeightsError, match=r"an object of posix\.system"):
        read_state(path)
    assert not marker.exists()


STATE = {
    "half": np.arange(6, dtype=np.float16).reshape(2, 3),
    "brain": np.arange(6).astype(ml_dtypes.bfloat16).reshape(3, 2),
    "single": np.float32([[0.1, -np.inf], [np.nan, 3]]),
    "scalar": np.array(7),
    "none": np.zeros((0, 3)),
    "strided": np.arange(24.0).reshape(2, 3, 4).transpose(2, 0, 1)[::2],
    "big-endian": np.arange(3, dtype=">f4"),
}


def test_safetensors_whatever_the_suffix(tmp_path):
    path = tmp_path / "folder" / "x.pt"
    write_state(path, STATE)
    state = read_state(path)
    assert set(state) == set(STATE)
    for name, value in STATE.items():
        assert state[name].shape == value.shape
        assert state[name].dtype == value.dtype.newbyteorder("=")
        np.testing.assert_array_equal(state[name].astype(float), value.astype(float))
    assert [path.name for path in path.parent.iterdir()] == ["x.pt"]


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "x.safetensors"
    write_state(path, {"w": np.arange(4)})
    before = path.read_bytes()
    with path.open("rb") as reader:
        write_state(path, {"w": np.arange(5)})
        assert reader.read() == before
    assert read_state(path)["w"].shape == (5,)


def test_what_a_file_says_of_itself(tmp_path):
    path = tmp_path / "x.safetensors"
    write_state(path, {"w": np.arange(4)}, {"a": "b"})
    assert read_metadata(path) == {"a": "b"} and list(read_state(path)) == ["w"]
    write_state(path, {"w": np.arange(4)})
    assert read_metadata(path) == read_metadata(RECORDED / "zip.pt") == {}


def safetensors_header(header, size=None):
    return struct.pack("<Q", len(header) if size is None else size) + header


@pytest.mark.parametrize(
    "content",
    [
        safetensors_header(b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}') + bytes(7),
        safetensors_header(b"{}", 2**60),
        safetensors_header(b'{"w":1}'),
        # A type that NumPy doesn't have.
        safetensors_header(b'{"w":{"dtype":"F8_E8M0","shape":[1],"data_offsets":[0,1]}}') + b"1",
    ],
)
def test_damaged_safetensors(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"cannot read .*x\.safetensors: "):
        read_state(path)


def test_paths(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_state(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="is a directory"):
        read_state(tmp_path)
