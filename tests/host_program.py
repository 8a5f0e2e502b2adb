"""One process of several, with the small network of `tiny_runs`; a program for `test_hosts`.

Arguments: a file for the numbers of the images of this process's batches, the step at which SIGTERM
comes to it or 0, whether to draw samples after training, and those of `ant_jax.main`.
"""

import copy
import json
import os
import runpy
import signal
import sys
from pathlib import Path

import pytest
import tiny_runs as t

from ant_jax import sample
from ant_jax import workdir as workdir_lib


def record(patch, reads):
    """Lists the numbers of the images of the digits that training reads from now on."""
    make = t.data.batches

    class Recorded(t.data.ArraySource):
        def __getitem__(self, i):
            reads.append(i)
            return super().__getitem__(i)

    def batches(source, **settings):
        # An evaluation names no step to start at.
        if "start_step" in settings:
            source = copy.copy(source)
            object.__setattr__(source, "__class__", Recorded)
        return make(source, **settings)

    patch.setattr(t.data, "batches", batches)


def main(reads_file, stop, samples, *arguments):
    patch = pytest.MonkeyPatch()
    t.use_small_model(patch)
    reads = []
    record(patch, reads)
    t.before_batch(patch, t.signal_at(int(stop), signal.SIGTERM))
    sys.argv = ["main", *arguments]
    try:
        runpy.run_module("ant_jax.main", run_name="__main__", alter_sys=True)
    except SystemExit as error:
        assert not error.code, error.code
    Path(reads_file).write_text(json.dumps(reads))
    if int(samples):
        workdir = Path(next(a for a in arguments if a.startswith("--workdir="))[10:])
        sample.sample(workdir_lib.load_config(workdir), workdir)


if __name__ == "__main__":
    assert os.environ["JAX_PLATFORMS"] == "cpu"
    main(*sys.argv[1:])
