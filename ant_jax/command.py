"""The console command ``ant-jax``, the same as ``python -m ant_jax.main``."""

import os
import runpy
import sys

import ant_jax


def run() -> None:
    """Runs the command line; ``ant-jax report DIR`` is ``python -m ant_jax.report DIR``."""
    if sys.argv[1:] == ["--version"]:
        print(f"ant-jax {ant_jax.__version__}")
        return
    # As ``python -m`` does, for components of the user's own.
    sys.path.insert(0, os.getcwd())
    module = "ant_jax.main"
    if sys.argv[1:2] == ["report"]:
        module = "ant_jax.report"
        del sys.argv[1]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
