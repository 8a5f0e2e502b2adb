"""The settings that all components of a group share: the fields of a dataclass for each group."""

import dataclasses
import re
from typing import Annotated, Literal

from ant_jax.runtime import boards
from ant_jax.settings import (
    Affects,
    Check,
    Integer,
    Number,
    OneOf,
    Path,
    Pattern,
    PerProcess,
    Traced,
)

# Each network knows its own facts; see `ant_jax.models`.
_INIT_FACT = re.compile("[a-z_]+(=[1-9][0-9]{0,5})?")


@dataclasses.dataclass(frozen=True)
class Training:
    """Settings of the train step.

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
    """Settings of the training loop.

    Attributes:
      init_from: initial parameters: the workdir of another run, for its newest EMA, WORKDIR/best
        for its best one, or a .safetensors, .pt, .pth or .ckpt file of published weights. "" for
        random ones.
      init_facts: facts that a file of published weights does not contain, joined by commas;
        ``FACTS`` in ``models/NAME_weights.py`` lists them. A file of ``--mode export`` needs none.
      log_every: steps between two lines of the log.
      log_to: where metrics and grids of samples go, beside ``metrics.jsonl`` and ``samples/``:
        "tensorboard", if TensorFlow is installed, and "wandb", Weights & Biases.
      profile_steps: number of steps to trace, from the 10th on, into WORKDIR/profile.
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
    log_to: Annotated[
        tuple,
        Check(
            lambda names: all(name in boards.NAMES for name in names),
            "'tensorboard', 'wandb', '(\"tensorboard\", \"wandb\")', or ()",
        ),
        Affects.NOTHING,
    ] = ("tensorboard",)
    profile_steps: Annotated[int, Integer(0, 1000), Affects.NOTHING] = 0


@dataclasses.dataclass(frozen=True)
class Data:
    """What all data sources share.

    Attributes:
      split: of the source; of a folder its subfolder, or "" if it has none.
      image_size: side in pixels.
      crop: how images of another size are cropped.
      flip: mirror half of the images.
      replace_unreadable: use the next image instead of a damaged one; otherwise the run stops.
      batch_size: over all devices; a multiple of their number and of k.
      num_workers: processes that decode images in advance.
    """

    split: str = "train"
    image_size: Annotated[int, Integer(1)] = 8
    crop: Literal["none", "center", "random"] = "none"
    flip: bool = False
    # A run that stopped at a damaged image may go on with True.
    replace_unreadable: Annotated[bool, Affects.NOTHING] = False
    batch_size: Annotated[int, Integer(1)] = 120
    num_workers: Annotated[int, Integer(0, 1024), Affects.NOTHING, PerProcess()] = 0


@dataclasses.dataclass(frozen=True)
class Model:
    """What all networks share.

    Attributes:
      conditional: whether the network gets the class label.
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

    ``--mode encode`` encodes the images of ``config.data``. Training reads these latents. Samples
    are decoded.

    Attributes:
      name: one of the autoencoders of LDM, "KL-f4-small" for a first try, or "" for diffusion in
        pixels.
      weights: its .safetensors, .pt, .pth or .ckpt file.
      latents: folder of the latents.
      scale: factor that gives the latents about unit variance: 0.18215 for KL-f8.
      batch_size: number of images to encode or decode at a time, a power of 2.
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
    """What all clusterings share.

    Attributes:
      k: number of tasks.
      specialist: train on this task alone, from 0; -1 for all tasks.
    """

    k: Annotated[int, Integer(1)] = 5
    specialist: Annotated[int, Integer(-1)] = -1


@dataclasses.dataclass(frozen=True)
class Method:
    """What all methods share: the draw of noise levels, and wrappers around the method.

    Attributes:
      draw: "stratified": batch_size / k examples in each task; "uniform": over all noise levels (a
        method that needs the Gram matrix then needs gradient_form = "masked"); "auto": uniform for
        vanilla, stratified for the other methods.
      suppress: factor by which levels near pure noise are drawn less often than others of their
        task (SpeeD: 5); 1 for none.
      suppress_log_snr: log-SNR below which levels are suppressed.
      curriculum_steps: steps of each stage of a curriculum: it begins with the noisiest task, and
        each stage adds the next one; 0 for none.
      pike: rate at which tasks with long gradients get more of the batch (PiKE), which is drawn
        stratified; the right value depends on the scale of the loss; 0 for equal shares.
      pike_noise: factor of the variance of a task's gradient, which lowers its share.
      pike_blocks: number of blocks of the batch, divided by k; every task keeps 2.
      pike_every: number of steps from one change of the shares to the next.
      gradient_form: how the k gradients are computed: "vmap", "scan" (less memory; on a CPU far too
        slow for a network with convolutions) or "masked" (for any draw).
      cosines: log the cosines between task gradients, also with a method that does not need them.
      weight_by_interval_size: multiply each task loss by k times the share of its interval in the
        noise levels. linear then equals vanilla in expectation.
      update_every: number of steps from one renewal of the weights to the next.
      max_norm: bound on the norm of the combined gradient, from the Gram matrix; 0 for none.
      level_uncertainty: learning rate of a learned weight of each noise level, inside the tasks
        (EDM2); try 0.01; 0 for none.
    """

    draw: Literal["auto", "stratified", "uniform"] = "auto"
    suppress: Annotated[float, Number(1)] = 1.0
    suppress_log_snr: float = -5.0
    curriculum_steps: Annotated[int, Integer(0)] = 0
    pike: Annotated[float, Number(0)] = 0.0
    pike_noise: Annotated[float, Number(0)] = 1.0
    pike_blocks: Annotated[int, Integer(2)] = 4
    pike_every: Annotated[int, Integer(1)] = 100
    gradient_form: Literal["vmap", "scan", "masked"] = "vmap"
    cosines: bool = False
    weight_by_interval_size: Annotated[bool, Traced()] = False
    update_every: Annotated[int, Integer(1)] = 1
    max_norm: Annotated[float, Number(0)] = 0.0
    level_uncertainty: Annotated[float, Number(0)] = 0.0


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """What all optimizers of the combined gradient share.

    Attributes:
      learning_rate: the value after the warm-up, from which ``config.schedule`` goes on.
      warmup_steps: steps in which the learning rate rises from 0.
      weight_decay: times the learning rate: the share of each parameter that a step removes.
      decay_mask: regular expression for the parameters that decay, such as "kernel" for the weights
        of layers without their biases; "" for all.
      clip_norm: bound on the norm of the combined gradient; 0 for none.
      frozen: regular expression for parameters that do not change, such as "embedding|block_0/".
      nonfinite: what to do at a step whose loss or gradient is not finite.
      microbatches: number of parts into which a batch is split, to save memory; on CPUs it may save
        time too.
    """

    learning_rate: Annotated[float, Number(above=0), Traced()] = 1e-3
    warmup_steps: Annotated[int, Integer(0)] = 100
    weight_decay: Annotated[float, Number(0)] = 0.0
    decay_mask: Pattern = ""
    clip_norm: Annotated[float, Number(0)] = 0.0
    frozen: Pattern = ""
    # A run that stopped at such a step may go on with "skip".
    nonfinite: Annotated[Literal["stop", "skip"], Affects.NOTHING] = "stop"
    microbatches: Annotated[int, Integer(1)] = 1


@dataclasses.dataclass(frozen=True)
class Parallel:
    """How devices share the work.

    Attributes:
      params: "replicated": every device holds all parameters; "sharded": every device holds its
        part of each parameter, for networks that are larger than one device.
    """

    params: Literal["replicated", "sharded"] = "replicated"


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """When checkpoints are saved, and which are kept.

    Attributes:
      every: steps between two checkpoints; the last step is always saved.
      keep: how many of the newest checkpoints are kept.
      keep_period: also keep the checkpoints whose step is a multiple of this; 0 for none.
    """

    every: Annotated[int, Integer(1)] = 500
    keep: Annotated[int, Integer(1)] = 2
    keep_period: Annotated[int, Integer(0)] = 0


@dataclasses.dataclass(frozen=True)
class Samples:
    """Which samples are drawn, and when.

    Attributes:
      seed: of the samples.
      every: steps between two grids of samples during training; 0 for none.
      num: number of samples of ``--mode sample`` and ``--mode evaluate``.
      labels: of the classes to draw, in turn; () for all classes.
      batch_size: number of samples drawn at a time, and of held-out images measured at a time.
    """

    # JAX keeps the last 32 bits of a seed.
    seed: Annotated[int, Integer(0, 2**32 - 1)] = 0
    every: Annotated[int, Integer(0), Affects.NOTHING] = 1000
    num: Annotated[int, Integer(1)] = 1797
    labels: Annotated[
        tuple,
        Check(
            lambda labels: all(type(label) is int and label >= 0 for label in labels),
            "classes as '3' or '(3, 5)', or ()",
        ),
    ] = ()
    batch_size: Annotated[int, Integer(1), Affects.NOTHING] = 600


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How samples are evaluated, and when during training.

    Attributes:
      every: steps between two evaluations during training, which keep the best checkpoint; the last
        step is always evaluated; 0 for none.
      num_in_training: number of samples of an evaluation during training; 0 for
        ``config.sample.num``.
      reference: .npz file of images, statistics or both, such as a reference batch of ADM; "" for
        the training data. Statistics of the training data are cached in ~/.cache/ant_jax.
      samples: .npz file of samples to evaluate, in random order; "" to draw them from the run.
      split: of held-out images for the validation losses; "" for none.
      metrics: names in ``ant_jax.evaluation.metrics``, or your own as "package.module:attribute":
        '("frechet", "mine:spread")'. () for all metrics of that folder.
    """

    every: Annotated[int, Integer(0), Affects.NOTHING] = 0
    num_in_training: Annotated[int, Integer(0), Affects.NOTHING] = 0
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
