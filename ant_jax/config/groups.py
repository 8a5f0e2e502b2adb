"""The groups of settings: those at the top of a config, and ``config.NAME``."""

from typing import NamedTuple

from ant_jax.config import shared_settings
from ant_jax.diffusion.samplers import SampleOptions
from ant_jax.settings import Affects


class Group(NamedTuple):
    """A group of settings.

    Attributes:
      name: ``config.NAME``; "" for settings at the top.
      common: dataclass of the settings that all components share.
      folder: package of the components; "" if the group has none.
      makes: "module:attribute" of the type that a component returns.
      given: arguments of components that the program gives.
      affects: what a setting affects if it has no mark of its own.
      in_step: whether the compiled step depends on these settings.
      key: the setting that names the component.
      key_affects: what that setting affects, if it is more than ``affects``.
      none: the value of ``key`` that means no component.
      default: the default of ``key``.
    """

    name: str
    common: type | None = None
    folder: str = ""
    makes: str = ""
    given: tuple[str, ...] = ()
    affects: Affects = Affects.PARAMETERS
    in_step: bool = False
    key: str = "name"
    key_affects: Affects = Affects.NOTHING
    none: str | None = None
    default: str = ""


_BOTH = Affects.PARAMETERS | Affects.SAMPLES
GROUPS = (
    Group("", shared_settings.Training, in_step=True),
    Group("", shared_settings.Loop),
    Group(
        "data",
        shared_settings.Data,
        "ant_jax.data",
        "ant_jax.data:Source",
        ("split",),
        default="digits",
    ),
    Group(
        "process",
        None,
        "ant_jax.diffusion",
        "ant_jax.diffusion:Process",
        ("loss_weight",),
        _BOTH,
        in_step=True,
        # Processes share names of predictions, and give the network other noise levels.
        key_affects=Affects.MEANING,
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
        shared_settings.Model,
        "ant_jax.models",
        "flax.linen:Module",
        ("channels", "num_classes", "learned_variance", "dtype", "parent", "name"),
        Affects.MEANING,
        in_step=True,
        default="dit",
    ),
    Group("autoencoder", shared_settings.Autoencoder),
    Group(
        "clusters",
        shared_settings.Clusters,
        "ant_jax.tasks.clusterings",
        "ant_jax.tasks.clusterings:Clusters",
        ("log_snr", "k"),
        default="snr",
    ),
    Group(
        "method",
        shared_settings.Method,
        "ant_jax.mtl",
        "ant_jax.mtl:Weighting",
        ("k", "seed"),
        in_step=True,
        default="nash",
    ),
    Group(
        "optimizer",
        shared_settings.Optimizer,
        "ant_jax.optimizers",
        "ant_jax.optimizers:Optimizer",
        ("learning_rate", "weight_decay", "mask"),
        in_step=True,
        default="adamw",
    ),
    Group(
        "schedule",
        None,
        "ant_jax.schedules",
        "collections.abc:Callable",
        ("learning_rate", "num_steps"),
        in_step=True,
        default="constant",
    ),
    Group("parallel", shared_settings.Parallel, affects=Affects.NOTHING, in_step=True),
    Group("checkpoint", shared_settings.Checkpoints, affects=Affects.NOTHING),
    Group(
        "sampler",
        SampleOptions,
        "ant_jax.diffusion.samplers",
        "ant_jax.diffusion.samplers:Sampler",
        affects=Affects.SAMPLES,
        default="ddim",
    ),
    Group("sample", shared_settings.Samples, affects=Affects.SAMPLES),
    Group(
        "evaluation",
        shared_settings.Evaluation,
        "ant_jax.evaluation.features",
        "ant_jax.evaluation:Extractor",
        ("training",),
        affects=Affects.MEASUREMENTS,
        key="features",
        none="",
        default="digits",
    ),
)
