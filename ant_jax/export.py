"""Exports the weights of a run, for other codes."""

import json
from pathlib import Path

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from ant_jax import config as config_lib
from ant_jax import init_from, interop, results
from ant_jax import workdir as workdir_lib
from ant_jax.config import ConfigError
from ant_jax.diffusion.flow import Flow
from ant_jax.diffusion.gaussian import GaussianDiffusion
from ant_jax.models import dit, dit_diffusers
from ant_jax.runtime import processes
from ant_jax.runtime.files import user_path, write_bytes

# The version that the test outputs are of.
_VERSION = "0.42.0"
_CARD = """\
---
library_name: diffusers
---
The moving average of step {step} of a run of ant-jax.

```python
from diffusers import {classes}

{load}{frequencies}```
"""
_OF_PIXELS = """\
transformer = DiTTransformer2DModel.from_pretrained("FOLDER/transformer")
"""
_OF_LATENTS = """\
# An autoencoder with the latents of the run, which are scaled by {scale:g}.
vae = AutoencoderKL.from_pretrained("VAE", scaling_factor={scale:g})
pipe = DiTPipeline.from_pretrained("FOLDER", vae=vae)
transformer = pipe.transformer
"""
_FREQUENCIES = """\
# Diffusers has other frequencies of timesteps than DiT. With the next lines the outputs are equal.
for block in transformer.transformer_blocks:
    block.norm1.emb.time_proj.downscale_freq_shift = 0
"""


def export(
    config: ConfigDict, workdir: str | Path, step: int | None = None, layout: str = "published"
) -> Path:
    """Writes the EMA of a checkpoint for other codes.

    Args:
      config: of the run.
      workdir: of the run.
      step: of the checkpoint; the newest by default.
      layout: "published": a ``.safetensors`` file with the names of the published code. A network
        without published code keeps its own names. The metadata of the file hold the settings that
        do not follow from shapes, such as the number of attention heads. "diffusers": a folder that
        `DiTPipeline` of diffusers loads.

    Returns:
      The path of the file or folder.

    Raises:
      FileNotFoundError: if the workdir has no checkpoint, or none of that step.
      ConfigError: if the workdir has another config; if the network or the noise process was
        given from Python, so that the metadata could not describe it; or if diffusers has no such
        network or process.
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
    params = jax.device_get(params)
    path = workdir / "weights" / f"{step:08d}"
    if layout == "diffusers":
        path = path.with_name(f"{path.name}-diffusers")
        _write_for_diffusers(path, config, setup, params, step)
    else:
        path = path.with_suffix(".safetensors")
        settings = config_lib.meaning(config)
        names = init_from.export_names(setup, settings)
        weights = interop.to_torch(params, names)
        if processes.is_first():
            interop.write_state(path, weights, init_from.export_metadata(settings))
    logging.info("the EMA of step %d: %s", step, path)
    return path


def _write_for_diffusers(folder, config, setup, params, step):
    try:
        if not isinstance(setup.model, dit.DiT):
            raise ValueError(f"only a 'dit', not config.model.name = {config.model.name!r}")
        scheduler = _scheduler(setup.process, config)
        flow = isinstance(setup.process, Flow)
        found = dit_diffusers.transformer(params, setup.model, setup.image_shape, flow)
    except ValueError as error:
        raise ConfigError(f"cannot export for diffusers: {error}") from error
    if not processes.is_first():
        return
    latents = bool(config.autoencoder.name)
    card = _CARD.format(
        step=step,
        classes="AutoencoderKL, DiTPipeline" if latents else "DiTTransformer2DModel",
        load=(_OF_LATENTS if latents else _OF_PIXELS).format(scale=config.autoencoder.scale),
        frequencies="" if found.exact else _FREQUENCIES,
    )
    contents = {
        "transformer/config.json": found.config,
        "scheduler/scheduler_config.json": scheduler,
    }
    if latents:
        contents["model_index.json"] = {
            "_class_name": "DiTPipeline",
            "scheduler": ["diffusers", scheduler["_class_name"]],
            "transformer": ["diffusers", found.config["_class_name"]],
            "vae": ["diffusers", "AutoencoderKL"],
        }
    metadata = {"format": "pt"} | init_from.DIFFUSERS_METADATA
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    interop.write_state(weights, found.state, metadata)
    for name, content in contents.items():
        text = json.dumps({"_diffusers_version": _VERSION} | content, indent=2)
        write_bytes(folder / name, text.encode())
    write_bytes(folder / "README.md", card.encode())
    if not found.exact:
        logging.warning(
            "diffusers has other frequencies of timesteps than DiT: for equal outputs add the "
            "lines of %s",
            folder / "README.md",
        )


def _scheduler(process, config):
    """The ``scheduler_config.json`` of a noise process."""
    if isinstance(process, GaussianDiffusion):
        signal = np.append(1.0, process.alphas_bar)
        return {
            "_class_name": "DDIMScheduler",
            "num_train_timesteps": process.span,
            "trained_betas": (1 - signal[1:] / signal[:-1]).tolist(),
            "prediction_type": {"epsilon": "epsilon", "v": "v_prediction"}[process.prediction],
            "clip_sample": config.sampler.clip_x0,
        }
    if isinstance(process, Flow) and process.prediction == "velocity":
        return {
            "_class_name": "DPMSolverMultistepScheduler",
            "num_train_timesteps": 1000,
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": process.shift,
        }
    settings = config_lib.meaning(config)
    described = ", ".join(
        f"config.{name} = {settings[name]!r}"
        for name in ("process.name", "process.prediction")
        if name in settings
    )
    raise ValueError(
        f"its DiT has no scheduler for {described}, only for 'gaussian', and for 'flow' with "
        "prediction = 'velocity'"
    )
