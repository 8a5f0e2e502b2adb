"""The arrays of a checkpoint, written and read by orbax."""

import collections
import contextlib
import json
import math
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ant_jax.runtime.checkpoint_files import CheckpointError


def open_orbax() -> Any:
    """Opens orbax's checkpointer, which is also a context manager."""
    # Imported late, because the import is slow and the first training step does not need it.
    import orbax.checkpoint as ocp

    return ocp.StandardCheckpointer(multiprocessing_options=_of_all_processes())


def _of_all_processes():
    import orbax.checkpoint as ocp

    # With the processes named, orbax waits for them by messages. Otherwise it uses a collective,
    # which on CPUs fails after half a minute.
    count = jax.process_count()
    return ocp.options.MultiprocessingOptions(
        active_processes=set(range(count)) if count > 1 else None
    )


@contextlib.contextmanager
def plain_path(directory: Path) -> Iterator[Path]:
    """Gives a path to a directory without characters that are special to orbax or tensorstore.

    Orbax finds its files by a glob pattern, in which brackets have a meaning. Tensorstore replaces
    a backslash by a slash and writes to another folder. Neither accepts bytes that are not UTF-8.
    For a directory with such a name this gives a symbolic link to it.
    """
    text = str(directory)
    if not re.search(r"[\[\]*?\\\ud800-\udfff]", text):
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="ant_jax-") as folder:
        link = Path(folder, "checkpoints")
        link.symlink_to(directory, target_is_directory=True)
        yield link


def read(path: Path, template: Any) -> Any:
    """Reads all arrays of a checkpoint.

    Args:
      path: of the checkpoint, in a `plain_path`.
      template: pytree of arrays or `jax.ShapeDtypeStruct` with shardings, of the saved structure.

    Returns:
      The pytree, with the shardings of the template.

    Raises:
      ValueError: if the template has another structure or other shapes; names the first array that
        differs.
    """
    with open_orbax() as orbax:
        _check_template(orbax.metadata(path).item_metadata.tree, template)
        return _to_local(orbax.restore(path, to_global(template)), template)


def _check_template(saved: Any, template: Any) -> None:
    """Raises a ValueError, which names the first array that is only in one tree or differs."""
    there = {each.name: tuple(each.shape) for each in jax.tree.leaves(saved)}
    now = {
        jax.tree_util.keystr(keys, simple=True, separator="."): tuple(leaf.shape)
        for keys, leaf in jax.tree_util.tree_leaves_with_path(template)
    }
    for name in [*now, *there]:
        if there.get(name) != now.get(name):
            raise ValueError(
                f"{name} is {there.get(name, 'missing')} there and {now.get(name, 'missing')} now"
            )


def read_part(path: Path, name: str, template: Any = None) -> Any:
    """Reads one part of a checkpoint, as NumPy arrays in nested dicts.

    Args:
      path: of the checkpoint, in a `plain_path`.
      name: of the part: a key at the root of the saved pytree.
      template: pytree of arrays or `jax.ShapeDtypeStruct` that the part must be like; None for any.

    Raises:
      ValueError: if the template has another structure or other shapes; names the first array that
        differs.
    """
    import orbax.checkpoint as ocp

    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=_of_all_processes())
    with ocp.Checkpointer(handler, multiprocessing_options=_of_all_processes()) as orbax:
        tree = {name: orbax.metadata(path).item_metadata.tree[name]}
        if template is not None:
            _check_template(tree, {name: template})
        kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        wanted = ocp.args.PyTreeRestore(tree, restore_args=kinds, partial_restore=True)
        return orbax.restore(path, args=wanted)[name]


def to_save(tree: Any) -> Any:
    """The arrays that orbax saves: one copy of those that each device of one process holds whole.

    Of several copies it saves a slice each, and compiles a program for each slice.
    """
    if jax.process_count() > 1:
        return to_global(tree)
    one = lambda leaf: leaf.addressable_data(0) if leaf.is_fully_replicated else leaf
    return jax.tree.map(lambda leaf: one(leaf) if isinstance(leaf, jax.Array) else leaf, tree)


def to_global(tree: Any) -> Any:
    """Turns arrays that every process holds whole into global ones, the only kind orbax accepts.

    Arrays that the devices of all processes share are global already.
    """
    if jax.process_count() == 1:
        return tree
    mesh = jax.sharding.Mesh(jax.devices(), ("devices",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def convert(leaf):
        if not leaf.sharding.is_fully_addressable:
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        shards = [shard.data for shard in leaf.addressable_shards]
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)

    return jax.tree.map(convert, tree)


def _to_local(tree: Any, template: Any) -> Any:
    """The inverse of `to_global`: arrays with the shardings of the template."""
    if jax.process_count() == 1:
        return tree

    def convert(leaf, like):
        if not like.sharding.is_fully_addressable:
            return leaf
        shards = [shard.data for shard in leaf.addressable_shards]
        return jax.make_array_from_single_device_arrays(leaf.shape, like.sharding, shards)

    return jax.tree.map(convert, tree, template)


def shape_and_dtype(leaf: Any) -> tuple[tuple[int, ...], str]:
    """The shape of an array and the name of its dtype."""
    return tuple(leaf.shape), np.dtype(leaf.dtype).name


def check(path: Path, arrays: collections.Counter) -> None:
    """Checks that every array was saved, by reading it back.

    Orbax raises no error if it could not write the index of its files.

    Args:
      path: of the checkpoint, in a `plain_path`.
      arrays: how many arrays of each `shape_and_dtype` were saved.

    Raises:
      CheckpointError: if an array is missing or can't be read.
    """
    import tensorstore

    base = {"driver": "file", "path": f"{path}/"}
    try:
        store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
        keys = store.list().result()
        # Each array has one description and some chunks.
        parts = collections.Counter(key.rpartition(b"/")[0] for key in keys)
        found = collections.Counter()
        for key in keys:
            # One at a time, because together they are as large as the state.
            value = store.read(key).result().value
            name, _, last = key.rpartition(b"/")
            if last != b".zarray":
                continue
            about = json.loads(value)
            grid = [-(-n // m) for n, m in zip(about["shape"], about["chunks"], strict=True)]
            if parts[name] == 1 + math.prod(grid):
                found[tuple(about["shape"]), np.dtype(about["dtype"]).name] += 1
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"what was saved in {path} can't be read: {error}") from error
    if found != arrays:
        raise CheckpointError(
            f"what was saved in {path} holds {(found & arrays).total()} of {arrays.total()} arrays"
        )
