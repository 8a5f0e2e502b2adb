import json
import subprocess
import sys

import jax
import numpy as np
import pytest

import ant_jax
from ant_jax import config as config_lib
from ant_jax import train
from ant_jax import workdir as workdir_lib
from ant_jax.config import ConfigError
from ant_jax.workdir import compatibility
from configs import digits

SETTINGS = {
    "num_steps": 4,
    "data.batch_size": 40,
    "log_every": 2,
    "log_to": (),
    "sample.every": 0,
    "checkpoint.every": 2,
    "evaluation.features": "",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, small_model):
    """A workdir, its config and the last state; not to be changed."""
    config = digits.get_config("linear")
    config_lib.update(config, SETTINGS)
    workdir = tmp_path_factory.mktemp("run")
    return workdir, config, train.train(config, workdir)


def test_a_run_is_loaded_as_numpy_arrays(trained):
    workdir, config, state = trained
    run = ant_jax.load_run(str(workdir))
    assert repr(run).startswith(f"Run(step={run.step}, ") and len(repr(run)) < 300
    assert run.config == config and run.step == 4 and run.samples is None
    assert jax.tree.structure(run.params) == jax.tree.structure(state.ema_params)
    for leaf, expected in zip(
        jax.tree.leaves(run.params), jax.tree.leaves(state.ema_params), strict=True
    ):
        assert type(leaf) is np.ndarray
        np.testing.assert_array_equal(leaf, expected)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert run.metrics.keys() == lines[0].keys()
    np.testing.assert_array_equal(run.metrics["step"], [2, 4])
    for name in ("loss", "cluster_losses"):
        np.testing.assert_array_equal(run.metrics[name], [line[name] for line in lines])


def test_the_samples_of_a_run_s_step_are_those_drawn_last(trained):
    workdir, _, _ = trained
    folder = workdir / "samples"
    folder.mkdir(exist_ok=True)
    images, labels = np.arange(32, dtype=np.uint8).reshape(2, 4, 4, 1), np.arange(2, dtype=np.int32)
    np.savez(folder / "00000002.npz", arr_0=images + 1)
    np.savez(folder / "00000004.npz", arr_0=images)
    try:
        found, none = ant_jax.load_run(workdir).samples
        assert none is None
        np.testing.assert_array_equal(found, images)
        np.savez(folder / "00000004-12345678.npz", arr_0=images + 2, arr_1=labels)
        for array, expected in zip(
            ant_jax.load_run(workdir).samples, (images + 2, labels), strict=True
        ):
            np.testing.assert_array_equal(array, expected)
    finally:
        for path in folder.iterdir():
            path.unlink()


def test_what_was_not_measured_is_nan(trained):
    workdir, _, _ = trained
    path = workdir / "metrics.jsonl"
    content = path.read_text()
    rows = [
        {"step": 1, "loss": None, "weights": None, "cosines": None},
        {"step": 2, "loss": 0.5, "weights": [1, None], "cosines": None},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        metrics = ant_jax.load_run(workdir).metrics
    finally:
        path.write_text(content)
    np.testing.assert_array_equal(metrics["loss"], [np.nan, 0.5])
    np.testing.assert_array_equal(metrics["weights"], [[np.nan, np.nan], [1, np.nan]])
    np.testing.assert_array_equal(metrics["cosines"], [np.nan, np.nan])


def test_a_folder_without_a_run_is_named(trained, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no run in {tmp_path}: it has no config.json"):
        ant_jax.load_run(tmp_path)
    workdir_lib.save_config(trained[1], tmp_path)
    with pytest.raises(FileNotFoundError, match=f"no checkpoint in {tmp_path}: its run has saved"):
        ant_jax.load_run(tmp_path)


def test_the_package_is_imported_without_jax():
    program = "import sys, ant_jax; assert not {'jax', 'numpy'} & set(sys.modules); ant_jax.no"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=100
    )
    assert "AttributeError: module 'ant_jax' has no attribute 'no'" in result.stderr


def test_an_object_of_a_script_may_come_from_its_module(trained):
    """The module of a script is `__main__`, or has the name of the file in another script."""
    workdir, config, _ = trained
    before = workdir_lib.recorded(workdir)
    names = ("__main__.Mlp", "mm.Mlp", "package.mm.Mlp", "mm.Other", "mm.MyMlp")
    fits = {
        (one, other)
        for one in names
        for other in names
        if not refused(before | {"given": {"model": one}}, config, {"model": other}, workdir)
    }
    same = {(name, name) for name in names}
    scripts = {("__main__.Mlp", name) for name in ("mm.Mlp", "package.mm.Mlp")}
    assert fits == same | scripts | {(other, one) for one, other in scripts}
    assert refused(before | {"given": {"model": "mm.Mlp"}}, config, {"source": "mm.Mlp"}, workdir)


def refused(*arguments):
    try:
        compatibility.check_config(*arguments)
    except ConfigError:
        return True
    return False
