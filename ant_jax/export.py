"""A run's weights for others."""

from pathlib import Path

import jax
from absl import logging
from ml_collections import ConfigDict

from ant_jax import evaluate, experiment, interop, processes


def export(config: ConfigDict, workdir: Path, step: int | None = None) -> Path:
    """Writes the EMA of a checkpoint as ``.safetensors``, by the names of the papers' code.

    Raises:
      FileNotFoundError: if the workdir has no checkpoint (of that step).
      ConfigError: if the workdir is of another config.
    """
    step, _, state = evaluate.restore_run(config, workdir, step)
    path = workdir / "weights" / f"{step:08d}.safetensors"
    names = experiment.weight_names(config)
    if processes.is_first():
        interop.write_state(path, interop.to_torch(jax.device_get(state.ema_params), names))
    logging.info("the EMA of step %d: %s", step, path)
    return path
