"""The model card of exported weights: what they are, how they were trained, what was measured."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import yaml
from ml_collections import ConfigDict

import ant_jax
from ant_jax import config as config_lib
from ant_jax import experiment, models, results
from ant_jax import workdir as workdir_lib
from ant_jax.runtime import logs
from ant_jax.runtime.files import write_bytes
from ant_jax.settings import Affects

# Figures that do not depend on the weights.
_OF_THE_REFERENCE = ("real_", "num_", "classifier_", "nfe")
_LOSS_OF = "held-out images"
_PICTURE = "samples.png"
_CLASSES = 20  # that are named, at most
_CARD = """\
---
{front}---
# {name}

{lead}

| | |
| --- | --- |
{facts}

| task | noise levels | log-SNR | loss at step {logged} | weight at step {logged} |
| --- | --- | --- | --- | --- |
{tasks}

## Measured

{measured}{picture}
## Use

{use}"""
_NOTHING = """\
Nothing was measured at this step. These commands measure it and export again, with the workdir of
the run:

```shell
python -m ant_jax.main --workdir WORKDIR --mode evaluate --step {step}
python -m ant_jax.main --workdir WORKDIR --mode export --step {step}
```
"""
_REMARK = """

`nfe` counts the calls of the network for a sample. `real_` marks figures of held-out images in the
place of samples. `validation_loss` is the mean loss on held-out images, without loss weights.
"""


class _Result(NamedTuple):
    """A result of ``--mode evaluate``: its file, its figures, and the settings behind them."""

    path: Path
    figures: dict[str, Any]
    settings: dict[str, Any]


def write(
    folder: Path,
    config: ConfigDict,
    workdir: Path,
    step: int,
    setup: experiment.Setup,
    params: Any,
    library: str,
    use: str,
) -> None:
    """Writes ``README.md``, and ``samples.png`` if the workdir has a grid of these samples.

    The front matter is that of model hubs, without a license, which the user chooses. All figures
    are those of the workdir: its log, and the results of ``--mode evaluate`` for these weights.

    Args:
      folder: of the exported files.
      config: of the run.
      workdir: of the run.
      step: of the checkpoint.
      setup: what the config describes.
      params: the exported weights.
      library: the name of the library that loads the folder.
      use: Markdown that shows how to load it.
    """
    known = workdir_lib.recorded(workdir)
    measured = _results(workdir, step, results.digest(params))
    picture = _picture(workdir, step, measured)
    shown = ""
    if picture is not None:
        path, words = picture
        write_bytes(folder / _PICTURE, path.read_bytes())
        shown = f"\n![{words}]({_PICTURE})\n"
    logged = _logged(workdir, step)
    name = workdir.absolute().name
    card = _CARD.format(
        front=yaml.safe_dump(_front(config, setup, name, library, measured), sort_keys=False),
        name=name,
        lead=_lead(config, setup, step),
        facts="\n".join(
            f"| {name} | {fact} |"
            for name, fact in _facts(config, known, setup, params, logged).items()
        ),
        logged=logged.get("step", "?"),
        tasks="\n".join(_tasks(setup, logged)),
        measured=_table(measured) if measured else _NOTHING.format(step=step),
        picture=shown,
        use=use,
    )
    write_bytes(folder / "README.md", card.encode())


def _results(workdir, step, digest):
    """The results for these weights, also those of a file of their samples."""
    found = []
    for path in sorted((workdir / "evaluation").glob("*.json"), key=lambda each: each.stem):
        made_from = results.made_from(path)
        if made_from is None:
            continue
        try:
            origin = made_from.get("samples_made_from") or made_from
            if (origin["step"], origin["params"]) != (step, digest):
                continue
            settings = origin["settings"] | made_from["settings"]
        # Not a file of ours.
        except (AttributeError, KeyError, TypeError):
            continue
        content = json.loads(path.read_text())
        figures = {name: content[name] for name in content if name not in ("made_from", "step")}
        found.append(_Result(path, figures, settings))
    return found


def _picture(workdir, step, measured):
    """The file of a grid of samples of these weights, and what it shows; None if there is none."""
    pictures = {
        result.path.with_suffix(".png"): f"The first of {_drawn(result)}"
        for result in measured
        if "num_samples" in result.figures
    }
    pictures[workdir / "samples" / f"{step:08d}.png"] = "Samples"
    return next(((path, words) for path, words in pictures.items() if path.is_file()), None)


def _logged(workdir, step):
    """The last line of the log up to a step, and the seconds of training until it; {} for none."""
    path = workdir / "metrics.jsonl"
    columns = logs.columns(path) if path.exists() else {}
    before = np.flatnonzero(columns.get("step", np.zeros(0)) <= step)
    if not len(before):
        return {}
    line = {name: values[before[-1]] for name, values in columns.items()}
    return line | {"step": int(line["step"]), "seconds": logs.seconds(columns)[before[-1]]}


def _front(config, setup, name, library, measured):
    # Of other sources the name says nothing, and their folder is private.
    data = config.data.get("builder", "digits" if config.data.name == "digits" else "")
    front = {
        "library_name": library,
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["ant-jax", "jax", "diffusion", config.process.name, config.model.name],
    }
    if data:
        front["datasets"] = [data]
    entries = [
        {
            "task": {"type": "unconditional-image-generation"},
            "dataset": {"name": data or config.data.name, "type": data or config.data.name},
            "metrics": [
                {"type": figure, "value": value, "name": f"{figure}, {_of(figure, result)}"}
                for figure, value in result.figures.items()
                if type(value) in (int, float) and not figure.startswith(_OF_THE_REFERENCE)
            ],
        }
        for result in measured
    ]
    if entries:
        front["model-index"] = [{"name": name, "results": entries}]
    return front


def _of(figure, result):
    """What a figure was measured on, in words."""
    return _LOSS_OF if figure == "validation_loss" else _drawn(result)


def _drawn(result):
    name, steps, guidance = (
        result.settings[f"sampler.{each}"] for each in ("name", "num_steps", "guidance")
    )
    labels = result.settings.get("sample.labels", ())
    of = f" of class {' and '.join(map(str, labels))}" if labels else ""
    samples = result.figures["num_samples"]
    return f"{samples} samples{of}, {name}, {steps} steps, guidance {guidance:g}"


def _lead(config, setup, step):
    height, width, channels = setup.image_shape
    classes = models.num_classes(setup.model)
    return (
        f"A {'class-conditional' if classes else 'unconditional'} diffusion model "
        f"({config.process.name}, {config.model.name}) of {height} x {width} x {channels} "
        f"{'latents' if config.autoencoder.name else 'images'}, trained with ant-jax. The weights "
        f"are the moving average (EMA) of the parameters after step {step} of {config.num_steps}."
    )


def _facts(config, known, setup, params, logged):
    """The rows of the table of facts."""
    facts, given = known["facts"], known["given"]
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    side, k = config.data.image_size, len(setup.clusters.boundaries) - 1
    counts = {"num_images": "images", "num_classes": "classes"}
    counts = [f"{facts[name]:,} {word}" for name, word in counts.items() if facts.get(name)]
    images = [f"split {config.data.split!r}"] if config.data.split else []
    images += [*counts, f"{side} x {side} pixels"]
    optimizer = config.optimizer
    rate = f"learning rate {optimizer.learning_rate:g}", f"warm-up {optimizer.warmup_steps} steps"
    rows = {
        "process": _component(config, "process"),
        "loss weight": _component(config, "loss_weight"),
        "network": _component(config, "model", f"{size:,} parameters"),
        "data": _component(config, "data", *images, without=("split", "image_size", "batch_size")),
        "method": _component(config, "method"),
        "clusters": _component(config, "clusters", f"{k} tasks", without=("k",)),
        "optimizer": _component(
            config, "optimizer", *rate, without=("learning_rate", "warmup_steps")
        ),
        "schedule": _component(config, "schedule"),
        "training": f"batches of {config.data.batch_size}, EMA decay {config.ema_decay}, label "
        f"dropout {config.label_dropout}, seed {config.seed}",
    }
    for row, name in (("data", "source"), ("method", "weighting")):
        if name in given:
            rows[row] = ", ".join([f"{given[name]}, given from Python", *counts * (row == "data")])
    if facts.get("classes"):
        rows["classes"] = _classes(facts["classes"])
    if config.autoencoder.name:
        rows["autoencoder"] = f"{config.autoencoder.name}, latents times {config.autoencoder.scale}"
    if config.init_from:
        path = Path(config.init_from)
        best = path.name == "best"
        rows["started from"] = f"the best step of {path.parent.name}" if best else path.name
    if logged:
        rows["loss"] = f"{logged['loss']:.4g} at step {logged['step']}"
    if np.isfinite(logged.get("seconds", np.nan)):
        rows["time"] = f"{logged['seconds']:,.1f} s of training steps until step {logged['step']}"
    rows["exported with"] = f"ant-jax {ant_jax.__version__}, jax {jax.__version__}"
    return rows


def _classes(names):
    """The first names, each behind its label if that is not the name."""
    shown = [name if name == str(i) else f"{i} {name}" for i, name in enumerate(names[:_CLASSES])]
    return ", ".join([*shown, "..."] if len(names) > _CLASSES else shown)


def _component(config: ConfigDict, group: str, *facts: str, without: Sequence[str] = ()) -> str:
    """The component of a group, the facts, and its settings that affect the parameters.

    Paths are left out, and so are settings at their default, if all components of the group share
    them or if they switch nothing on.
    """
    flat, key = config_lib.flatten(config), f"{group}.name"
    shared = config_lib.common(config, group)
    words = [flat[key], *facts]
    for full_name, setting in config_lib.settings_of_config(config).items():
        of, _, name = full_name.rpartition(".")
        value = flat[full_name]
        if of != group or full_name == key or name in without or setting.per_process:
            continue
        usual = value == setting.default and (name in shared or not value)
        if setting.affects & Affects.PARAMETERS and not usual:
            words.append(f"{name} = {value}")
    return ", ".join(words)


def _tasks(setup: experiment.Setup, logged: Mapping[str, Any]) -> list[str]:
    """A row of the table for each task."""
    number = lambda name, i: f"{logged[name][i]:.4g}" if name in logged else "not recorded"
    ends = experiment.task_ends(setup)
    rows = []
    for i in range(len(setup.clusters.boundaries) - 1):
        levels = f"{np.diff(setup.clusters.boundaries)[i]} at random", ""
        if ends is not None:
            low, last, snr_low, snr_last = (each[i] for each in ends)
            levels = f"{low:.4g} .. {last:.4g}", f"{snr_low:.1f} .. {snr_last:.1f}"
        row = (i, *levels, number("cluster_losses", i), number("weights", i))
        rows.append(f"| {' | '.join(map(str, row))} |")
    return rows


def _table(measured: Sequence[_Result]) -> str:
    """The figures of ``--mode evaluate``, a column for each result."""
    columns = []
    for result in measured:
        samples = "num_samples" in result.figures
        column = {"measured on": _drawn(result) if samples else _LOSS_OF}
        if samples:
            column["seed of the samples"] = result.settings["sample.seed"]
            column["features"] = result.settings["evaluation.features"]
        alone = {k: v for k, v in result.figures.items() if not isinstance(v, list)}
        columns.append(column | alone)
    names = dict.fromkeys(name for each in columns for name in each)
    text = lambda value: f"{value:.6g}" if isinstance(value, float) else str(value)
    head, *rows = [[name, *(text(each.get(name, "")) for each in columns)] for name in names]
    rows = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + _REMARK
