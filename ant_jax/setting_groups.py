"""The groups of settings: those at the top of a config, and ``config.NAME``.

The fields of a dataclass are the settings that do not depend on a component. `GROUPS` says which
groups there are, and in which folder the components of each are.
"""

import dataclasses
import re
from typing import Annotated, Literal, NamedTuple

from ant_jax.diffusion.samplers import SampleOptions
from ant_jax.settings import Affects, Check, Integer, Number, OneOf, Path, PerProcess, Traced

# Which of them a network knows is its own affair; see `ant_jax.models`.
_INIT_FACT = re.compile("[a-z_]+(=[1-9][0-9]{0,5})?")


def _is_pattern(text):
    try:
        re.compile(text)
    except re.error:
        return False
    return True


@dataclasses.dataclass(frozen=True)
class Training:
    """What the steps do.

    Attributes:
      seed: of the parameters, the order of the data, noise levels and noise.
      num_steps: steps of training.
      ema_decay: decay of the moving average of the parameters, ramped up from 0.1.
      label_dropout: share of the labels that are dropped, for classifier-free guidance.
    """

    # PCGrad adds 2**30 to it, on the device in 32 bits.
    seed: Annotated[int, Integer(0, 2**30 - 1), Traced()] = 0
    num_steps: Annotated[int, Integer(1)] = 3000
    ema_decay: Annotated[float, Number(0, 1)] = 0.999
    label_dropout: Annotated[float, Number(0, 1)] = 0.1


@dataclasses.dataclass(frozen=True)
class Loop:
    """What happens around the steps.

    Attributes:
      init_from: parameters to begin with: the EMA of another run's workdir, or a .safetensors, .pt,
        .pth or .ckpt file of published weights. "" for fresh ones.
      init_facts: what such a file doesn't tell, unless ``--mode export`` wrote it, joined by
        commas; the network's module lists what it may be.
      log_every: steps between two lines of the log.
      tensorboard: whether to write for it, where TensorFlow is installed.
      profile_steps: trace so many steps, from the 10th on, into WORKDIR/profile.
    """

    init_from: Path = ""
    init_facts: Annotated[
        str,
        Check(
            lambda text: not text or all(map(_INIT_FACT.fullmatch, text.split(","))),
            "'' or facts such as 'heads_first,num_heads=4', joined by commas",
        ),
    ] = ""
    log_every: Annotated[int, Integer(1), Affects.NOTHING] = 100
    tensorboard: Annotated[bool, Affects.NOTHING] = True
    profile_steps: Annotated[int, Integer(0, 1000), Affects.NOTHING] = 0


@dataclasses.dataclass(frozen=True)
class Data:
    """The images, whatever their source.

    Attributes:
      split: of the source; of a folder the subfolder of the split, "" if there is none.
      image_size: side in pixels; images of another size need a crop.
      crop: how images of another size are cut.
      flip: mirror half of the images.
      replace_unreadable: replace damaged images by the next one; else the run fails there.
      batch_size: over all devices; each device's share must be a multiple of k.
      num_workers: processes that decode images ahead of time.
    """

    split: str = "train"
    image_size: Annotated[int, Integer(1)] = 8
    crop: Literal["none", "center", "random"] = "none"
    flip: bool = False
    replace_unreadable: bool = False
    batch_size: Annotated[int, Integer(1)] = 120
    num_workers: Annotated[int, Integer(0, 1024), Affects.NOTHING, PerProcess()] = 0


@dataclasses.dataclass(frozen=True)
class Model:
    """What all networks share.

    Attributes:
      conditional: on the class label.
      dtype: of activations; "bfloat16" on GPU and TPU.
    """

    conditional: Annotated[bool, Affects.PARAMETERS | Affects.SAMPLES] = True
    dtype: Annotated[Literal["float32", "bfloat16"], Affects.PARAMETERS | Affects.SAMPLES] = (
        "float32"
    )


def _variants():
    from ant_jax.latents import autoencoder

    return ("", *autoencoder.VARIANTS)


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """Diffusion in the latents of an autoencoder.

    ``--mode encode`` makes latents of the images that ``config.data`` describes; training reads
    them; samples are decoded.

    Attributes:
      name: of one of LDM's autoencoders, "KL-f4-small" for trying out, or "" for diffusion in
        pixels.
      weights: its .safetensors, .pt, .pth or .ckpt file.
      latents: the folder of the latents.
      scale: factor that gives them about unit variance: 0.18215 for KL-f8.
      batch_size: images encoded or decoded at a time, a power of 2.
    """

    name: Annotated[str, OneOf(*_variants()), Affects.PARAMETERS | Affects.SAMPLES] = ""
    weights: Annotated[Path, Affects.NOTHING] = ""
    latents: Annotated[Path, Affects.NOTHING] = ""
    scale: Annotated[float, Number(above=0), Affects.PARAMETERS | Affects.SAMPLES] = 1.0
    batch_size: Annotated[
        int,
        Check(
            lambda value: 1 <= value <= 1024 and value.bit_count() == 1,
            "a power of 2 of at most 1024",
        ),
        Affects.NOTHING,
    ] = 32


@dataclasses.dataclass(frozen=True)
class Clusters:
    """How the noise levels form tasks, by whichever costs.

    Attributes:
      k: number of tasks.
      specialist: train on this task alone, from 0; -1 for all tasks.
    """

    k: Annotated[int, Integer(1)] = 5
    specialist: Annotated[int, Integer(-1)] = -1


@dataclasses.dataclass(frozen=True)
class Method:
    """What all methods share: how tasks are drawn, and wrappers around the method.

    Attributes:
      draw: "stratified": batch_size / k examples in each task; "uniform": over all noise levels,
        which methods with a Gram matrix can only do with gradient_form = "masked"; "auto": uniform
        for vanilla, else stratified.
      gradient_form: how k gradients are found: by "vmap", "scan" (less memory) or "masked" (the
        general form).
      cosines: report those of the task gradients whatever the method.
      weight_by_interval_size: multiply task losses by k times their share of the noise levels
        before the method sees them: linear then is vanilla in expectation.
      update_every: renew the weights at every so many-th step.
      max_norm: bound on the norm of the combined gradient, by the Gram matrix; 0 for none.
    """

    draw: Literal["auto", "stratified", "uniform"] = "auto"
    gradient_form: Literal["vmap", "scan", "masked"] = "vmap"
    cosines: bool = False
    weight_by_interval_size: Annotated[bool, Traced()] = False
    update_every: Annotated[int, Integer(1)] = 1
    max_norm: Annotated[float, Number(0)] = 0.0


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW on the combined gradient.

    Attributes:
      learning_rate: its highest value.
      warmup_steps: linear, from 0.
      schedule: "constant", or "cosine" to 0 at num_steps.
      weight_decay: of AdamW.
      clip_norm: of the combined gradient; 0 for no clipping.
      frozen: parameters to leave as they are: a pattern such as "embedding|block_0/".
      nonfinite: "stop" or "skip" at a step whose loss or gradient is not finite.
      microbatches: the batch is worked off in so many parts.
    """

    learning_rate: Annotated[float, Number(above=0), Traced()] = 1e-3
    warmup_steps: Annotated[int, Integer(0)] = 100
    schedule: Literal["constant", "cosine"] = "constant"
    weight_decay: Annotated[float, Number(0)] = 0.0
    clip_norm: Annotated[float, Number(0)] = 0.0
    frozen: Annotated[str, Check(_is_pattern, "a regular expression, or '' for none")] = ""
    # A run that has stopped at a loss that is not finite may go on and skip it.
    nonfinite: Annotated[Literal["stop", "skip"], Affects.NOTHING] = "stop"
    microbatches: Annotated[int, Integer(1)] = 1


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """When checkpoints are saved, and which are kept.

    Attributes:
      every: steps; the last step is always saved.
      keep: newest checkpoints.
      keep_period: keep each checkpoint at a multiple of this; 0 for none.
    """

    every: Annotated[int, Integer(1)] = 500
    keep: Annotated[int, Integer(1)] = 2
    keep_period: Annotated[int, Integer(0)] = 0


@dataclasses.dataclass(frozen=True)
class Samples:
    """Which samples are drawn, and when.

    Attributes:
      seed: another one draws other samples from the same run.
      every: steps between grids of samples while training; 0 for none.
      num: how many ``--mode sample`` and ``--mode evaluate`` draw.
      batch_size: samples drawn at a time.
    """

    # A larger one would draw the samples of its last 32 bits.
    seed: Annotated[int, Integer(0, 2**32 - 1)] = 0
    every: Annotated[int, Integer(0), Affects.NOTHING] = 1000
    num: Annotated[int, Integer(1)] = 1797
    batch_size: Annotated[int, Integer(1), Affects.NOTHING] = 600


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What samples are compared with.

    Attributes:
      reference: an .npz of images, statistics or both, as ADM's reference batches; "" for the
        training data, whose statistics are kept in ~/.cache/ant_jax.
      samples: an .npz of samples to evaluate, not sorted by class; "" to draw them.
      split: held-out images for validation losses; "" for none.
      metrics: names of metrics of ``ant_jax.evaluation.metrics``, or "package.module:attribute" of
        your own, as '("frechet", "mine:spread")'; () for all of that folder.
    """

    reference: Path = ""
    samples: Path = ""
    split: str = "test"
    metrics: Annotated[
        tuple,
        Check(
            lambda names: all(isinstance(name, str) for name in names),
            "names of metrics as '(\"frechet\",)', or ()",
        ),
    ] = ()


class Group(NamedTuple):
    """A group of settings.

    Attributes:
      name: ``config.NAME``; "" for settings at the top.
      common: dataclass of the settings that do not depend on the component.
      folder: package in which components are looked for; "" if the group names none.
      makes: "module:attribute", what a component gives.
      given: arguments of components that the program gives.
      affects: what the settings affect unless they say otherwise.
      in_step: whether the compiled step is made of them.
      key: the setting that names the component.
      none: its value where there is no component.
      default: its default.
    """

    name: str
    common: type | None = None
    folder: str = ""
    makes: str = ""
    given: tuple[str, ...] = ()
    affects: Affects = Affects.PARAMETERS
    in_step: bool = False
    key: str = "name"
    none: str | None = None
    default: str = ""


_BOTH = Affects.PARAMETERS | Affects.SAMPLES
GROUPS = (
    Group("", Training, in_step=True),
    Group("", Loop),
    Group("data", Data, "ant_jax.data", "ant_jax.data:Source", ("split",), default="digits"),
    Group(
        "process",
        None,
        "ant_jax.diffusion",
        "ant_jax.diffusion:Process",
        ("loss_weight",),
        _BOTH,
        in_step=True,
        default="gaussian",
    ),
    Group(
        "loss_weight",
        None,
        "ant_jax.diffusion.loss_weights",
        "ant_jax.diffusion.loss_weights:LossWeight",
        in_step=True,
        none="none",
        default="none",
    ),
    Group(
        "model",
        Model,
        "ant_jax.models",
        "flax.linen:Module",
        ("channels", "num_classes", "learned_variance", "dtype", "parent", "name"),
        Affects.MEANING,
        in_step=True,
        default="dit",
    ),
    Group("autoencoder", Autoencoder),
    Group(
        "clusters",
        Clusters,
        "ant_jax.tasks.clusterings",
        "ant_jax.tasks.clusterings:Clusters",
        ("log_snr", "k"),
        default="snr",
    ),
    Group(
        "method",
        Method,
        "ant_jax.mtl",
        "ant_jax.mtl:Weighting",
        ("k", "seed"),
        in_step=True,
        default="nash",
    ),
    Group("optimizer", Optimizer, in_step=True),
    Group("checkpoint", Checkpoints, affects=Affects.NOTHING),
    Group(
        "sampler",
        SampleOptions,
        "ant_jax.diffusion.samplers",
        "ant_jax.diffusion.samplers:Sampler",
        affects=Affects.SAMPLES,
        default="ddim",
    ),
    Group("sample", Samples, affects=Affects.SAMPLES),
    Group(
        "evaluation",
        Evaluation,
        "ant_jax.evaluation.features",
        "ant_jax.evaluation:Extractor",
        affects=Affects.MEASUREMENTS,
        key="features",
        none="",
        default="digits",
    ),
)
