"""The console command ``ant-jax``, the same as ``python -m ant_jax.main``."""

import runpy
import sys


def run() -> None:
    """Runs the command line; ``ant-jax report DIR`` is ``python -m ant_jax.report DIR``."""
    module = "ant_jax.main"
    if sys.argv[1:2] == ["report"]:
        module = "ant_jax.report"
        del sys.argv[1]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
