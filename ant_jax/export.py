"""Exports the weights of a run, for other codes."""

import json
from pathlib import Path

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from ant_jax import config as config_lib
from ant_jax import init_from, interop, model_card, models, results
from ant_jax import workdir as workdir_lib
from ant_jax.config import ConfigError
from ant_jax.diffusion.flow import Flow
from ant_jax.diffusion.gaussian import GaussianDiffusion
from ant_jax.models import dit, dit_diffusers
from ant_jax.runtime import processes
from ant_jax.runtime.files import user_path, write_bytes
from ant_jax.workdir import Step

# The version that the test outputs are of.
_VERSION = "0.42.0"
_WEIGHTS, _CONFIG = "model.safetensors", "config.json"
_WITH_ANT_JAX = """\
`{weights}` has the weights, and `{config}` the settings of the run, whose paths are without their
folders. To draw samples:

```python
import json

import jax
from ant_jax import config as config_lib
from ant_jax import experiment, init_from

with open("FOLDER/{config}") as file:
    config = config_lib.from_json(json.load(file))
config.init_from = "FOLDER/{weights}"
{autoencoder}boundaries = {boundaries}
setup = experiment.build(config, {channels}, {classes}, boundaries)
params = jax.device_put(init_from.initial_params(config, setup))
denoise = experiment.denoiser(setup, params)
images, labels = next(experiment.draw_samples(config, setup, denoise, 16))
```

To train from these weights, set `--config.init_from=FOLDER/{weights}`, with the same network and
process.
"""
_AUTOENCODER = """\
config.autoencoder.weights = "AUTOENCODER"  # the file of its weights
"""
_WITH_DIFFUSERS = """\
```python
from diffusers import {classes}

{load}{frequencies}```
"""
_OF_PIXELS = """\
transformer = DiTTransformer2DModel.from_pretrained("FOLDER", subfolder="transformer")
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
    config: ConfigDict, workdir: str | Path, step: Step = None, layout: str = "published"
) -> Path:
    """Writes the EMA of a checkpoint into a folder that others can load, with a model card.

    The card, ``README.md``, says what was trained and how, and what ``--mode evaluate`` has
    measured of these weights; see `model_card.write`.

    Args:
      config: of the run.
      workdir: of the run.
      step: of the checkpoint, or "best"; the newest by default.
      layout: "published": ``model.safetensors`` with the names of the published code, and
        ``config.json``, the config of the run, whose paths lose their folders. A network without
        published code keeps its own names. The metadata of the weights hold the settings that do
        not follow from shapes, such as the number of attention heads. "diffusers": a folder that
        `DiTPipeline` of diffusers loads.

    Returns:
      The path of the folder.

    Raises:
      FileNotFoundError: if the workdir has no such checkpoint.
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
    folder = workdir / "weights" / f"{step:08d}"
    if layout == "diffusers":
        folder = folder.with_name(f"{folder.name}-diffusers")
        library, use = "diffusers", _write_for_diffusers(folder, config, setup, params)
    else:
        library, use = "ant-jax", _write_as_published(folder, config, setup, params)
    if processes.is_first():
        model_card.write(folder, config, workdir, step, setup, params, library, use)
    logging.info("the EMA of step %d: %s", step, folder)
    return folder


def _write_as_published(folder, config, setup, params):
    """Writes the weights and the config; returns how to use them."""
    settings = config_lib.meaning(config)
    weights = interop.to_torch(params, init_from.export_names(setup, settings))
    if processes.is_first():
        metadata = init_from.export_metadata(settings)
        interop.write_state(folder / _WEIGHTS, weights, metadata)
        content = json.dumps(_without_folders(config).to_dict(), indent=2)
        write_bytes(folder / _CONFIG, (content + "\n").encode())
    return _WITH_ANT_JAX.format(
        weights=_WEIGHTS,
        config=_CONFIG,
        autoencoder=_AUTOENCODER if config.autoencoder.name else "",
        channels=setup.image_shape[-1],
        classes=models.num_classes(setup.model),
        boundaries=setup.clusters.boundaries.tolist(),
    )


def _without_folders(config):
    """The config with the last part of each path: folders are of one machine, and private."""
    shared, flat = config_lib.from_json(config.to_dict()), config_lib.flatten(config)
    paths = [name for name in config_lib.per_process_settings(config) if type(flat[name]) is str]
    config_lib.update(shared, {name: Path(flat[name]).name for name in paths})
    return shared


def _write_for_diffusers(folder, config, setup, params):
    """Writes the network and its scheduler; returns how to use them."""
    try:
        if not isinstance(setup.model, dit.DiT):
            raise ValueError(f"only a 'dit', not config.model.name = {config.model.name!r}")
        scheduler = _scheduler(setup.process, config)
        flow = isinstance(setup.process, Flow)
        found = dit_diffusers.transformer(params, setup.model, setup.image_shape, flow)
    except ValueError as error:
        raise ConfigError(f"cannot export for diffusers: {error}") from error
    latents = bool(config.autoencoder.name)
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
    if processes.is_first():
        metadata = {"format": "pt"} | init_from.DIFFUSERS_METADATA
        weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
        interop.write_state(weights, found.state, metadata)
        for name, content in contents.items():
            text = json.dumps({"_diffusers_version": _VERSION} | content, indent=2)
            write_bytes(folder / name, text.encode())
    if not found.exact:
        logging.warning(
            "diffusers has other frequencies of timesteps than DiT: for equal outputs add the two "
            "lines in %s to the program that loads it",
            folder / "README.md",
        )
    return _WITH_DIFFUSERS.format(
        classes="AutoencoderKL, DiTPipeline" if latents else "DiTTransformer2DModel",
        load=(_OF_LATENTS if latents else _OF_PIXELS).format(scale=config.autoencoder.scale),
        frequencies="" if found.exact else _FREQUENCIES,
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
