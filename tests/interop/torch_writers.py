"""Writes files like `torch.save`, by single instructions, and files that try to run code."""

import os
import pickle
import struct
import zipfile

import numpy as np

MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001
SYSTEM = {"protocol_version": 1001, "little_endian": True}


def literal(value):
    """The instructions that push a value of a plain type."""
    return pickle.dumps(value, 2)[2:-1]


def name(path):
    return (
        b"c" + path.rpartition(".")[0].encode() + b"\n" + path.rpartition(".")[2].encode() + b"\n"
    )


def call(path, *arguments):
    """The instructions that call a named function; its arguments are instructions too."""
    return name(path) + b"(" + b"".join(arguments) + b"tR"


def storage(key="0", numel=4, kind="torch.FloatStorage", *view):
    parts = [literal("storage"), name(kind), literal(key), literal("cpu"), literal(numel), *view]
    return b"(" + b"".join(parts) + b"tQ"


def tensor(*, offset=0, size=(4,), strides=(1,), of=None):
    of = storage() if of is None else of
    rest = [literal(x) for x in (offset, size, strides, False)]
    return call("torch._utils._rebuild_tensor_v2", of, *rest, call("collections.OrderedDict"))


def write_zip(path, code, records=None, **more):
    records = {"0": np.arange(4, dtype="<f4").tobytes()} if records is None else records
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + code + b".")
        for key, content in records.items():
            archive.writestr(f"archive/data/{key}", content)
        for key, content in more.items():
            archive.writestr(f"archive/{key}", content)
    return path


def write_legacy(path, code, keys=("0",), raw=None, system=SYSTEM):
    raw = struct.pack("<q4f", 4, 0, 1, 2, 3) if raw is None else raw
    head = b"".join(pickle.dumps(x, 2) for x in (MAGIC, VERSION, system))
    path.write_bytes(head + b"\x80\x02" + code + b"." + pickle.dumps(list(keys), 2) + raw)
    return path


class Payload:
    """Makes pickle write instructions that run code when the file is loaded."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


def running(marker):
    """Instructions that make Python's unpickler create the marker file, and what they call."""
    command = f"touch {marker}"
    code = f"open({str(marker)!r}, 'w')"
    dump = lambda *reduced: pickle.dumps(Payload(*reduced), 2)[2:-1]
    system = dump(os.system, (command,))
    getter = dump(getattr, (Payload(__import__, ("os",)), "system"))
    return {
        "reduce": (system, "posix.system"),
        # Without the 11 bytes of protocol and frame.
        "stack": (pickle.dumps(Payload(os.system, (command,)), 4)[11:-1], "posix.system"),
        "eval": (dump(eval, (code,)), "__builtin__.eval"),
        "getattr": (getter + b"(" + literal(command) + b"tR", "__builtin__.getattr"),
        "value": (b"}" + literal("a") + system + b"s", "posix.system"),
        "inst": (b"(" + literal(command) + b"iposix\nsystem\n", "posix.system"),
        "obj": (b"(" + name("posix.system") + literal(command) + b"o", "posix.system"),
        "newobj": (
            name("subprocess.Popen")
            + b"(]"
            + literal("touch")
            + b"a"
            + literal(str(marker))
            + b"at\x81",
            "subprocess.Popen",
        ),
        "text": (b"cposix\nsystem\n(S'" + command.encode() + b"'\ntR", "posix.system"),
    }
