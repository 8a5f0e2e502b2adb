"""Loads a run as NumPy arrays, for plots and notebooks."""

import os
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from ant_jax import config as config_lib
from ant_jax import workdir as workdir_lib
from ant_jax.runtime import logs
from ant_jax.runtime.files import user_path


class Run(NamedTuple):
    """The results of a run.

    Attributes:
      config: its config.
      step: of the checkpoint that was loaded.
      params: the moving average of the parameters at that step, NumPy arrays in nested dicts.
      metrics: the content of ``metrics.jsonl``, an array for each name, NaN where nothing was
        measured. The first axis is that of the lines, whose steps are ``metrics["step"]``.
      samples: the samples that ``--mode sample`` has drawn at that step, uint8 images (n, H, W, C)
        and int32 labels (n,) or None; None if there are no samples.
    """

    config: ConfigDict
    step: int
    params: dict[str, Any]
    metrics: dict[str, np.ndarray]
    samples: tuple[np.ndarray, np.ndarray | None] | None

    def __repr__(self) -> str:
        """In one line, without the arrays."""
        return f"Run(step={self.step}, metrics of {', '.join(self.metrics)})"


def load_run(workdir: str | os.PathLike, step: workdir_lib.Step = None) -> Run:
    """Loads the results of a run as NumPy arrays, without compiling anything.

    Args:
      workdir: of the run.
      step: of the checkpoint, or "best", which ``config.evaluation.every`` keeps; the newest by
        default.

    Raises:
      FileNotFoundError: if there is no run in the workdir, or no such checkpoint.
      ConfigError: if a file is damaged.
      CheckpointError: if no checkpoint is intact.
    """
    workdir = user_path(workdir)
    known = workdir_lib.recorded(workdir)
    if known is None:
        raise FileNotFoundError(f"no run in {workdir}: it has no config.json and no checkpoints")
    restored = workdir_lib.restore_average(workdir, step, known["id"])
    if restored is None:
        raise FileNotFoundError(f"no checkpoint in {workdir}: its run has saved none yet")
    step, params = restored
    path = workdir / "metrics.jsonl"
    metrics = logs.columns(path) if path.exists() else {}
    return Run(
        config_lib.from_json(known["config"]), step, params, metrics, _samples(workdir, step)
    )


def _samples(workdir, step):
    paths = sorted(workdir.glob(f"samples/{step:08d}*.npz"), key=lambda path: path.stat().st_mtime)
    if not paths:
        return None
    with np.load(paths[-1]) as stored:
        return stored["arr_0"], stored.get("arr_1")
