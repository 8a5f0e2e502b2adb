"""Exports the weights of a run, for other codes."""

from pathlib import Path

import jax
from absl import logging
from ml_collections import ConfigDict

from ant_jax import init_from, interop, results
from ant_jax import workdir as workdir_lib
from ant_jax.config import ConfigError
from ant_jax.runtime import processes
from ant_jax.runtime.files import user_path


def export(config: ConfigDict, workdir: str | Path, step: int | None = None) -> Path:
    """Writes the EMA of a checkpoint as ``.safetensors``, with the names of the published code.

    A network without published code keeps its own names. The metadata of the file hold the settings
    that do not follow from shapes, such as the number of attention heads.

    Args:
      config: of the run.
      workdir: of the run.
      step: of the checkpoint; the newest by default.

    Returns:
      The path of the file.

    Raises:
      FileNotFoundError: if the workdir has no checkpoint, or none of that step.
      ConfigError: if the workdir has another config, or if the network or the noise process was
        given from Python, so that the metadata could not describe it.
    """
    workdir = user_path(workdir)
    given = (workdir_lib.recorded(workdir) or {"given": {}})["given"]
    for name in ("model", "process"):
        if name in given:
            raise ConfigError(
                f"the run in {workdir} was given {name} = {given[name]} from Python, and the file "
                f"could not describe it: name it in the config, config.{name}.name = "
                "'package.module:attribute', and train with that"
            )
    step, setup, params = results.restore_run(config, workdir, step, draws=False)
    path = workdir / "weights" / f"{step:08d}.safetensors"
    if processes.is_first():
        settings = init_from.export_settings(config)
        names = init_from.export_names(setup, settings)
        weights = interop.to_torch(jax.device_get(params), names)
        interop.write_state(path, weights, init_from.export_metadata(settings))
    logging.info("the EMA of step %d: %s", step, path)
    return path
