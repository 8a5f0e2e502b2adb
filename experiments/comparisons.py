"""What `experiments.table` compares: the settings of each of its comparisons."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ant_jax import mtl, settings
from experiments import runner
from experiments.presets import METHODS, Preset, make_config
from experiments.runner import Run

# The first seed of the half-length runs that choose the learning rate. No compared run has such a
# seed.
TUNING_SEED = 1000
# Smaller than the norm of every gradient of these runs, so clipping normalises all of them.
_NORMALISE = {"optimizer.clip_norm": 1e-2}


class Setting(NamedTuple):
    """One line of the table.

    Attributes:
      label: its name.
      method: the method in the config.
      clusters: the clusters in the config.
      settings: changes of the preset's config, by ``"group.name"``.
      tuned_as: label of the setting whose learning rate it uses.
      against: label of the setting that it is compared with.
    """

    label: str
    method: str
    clusters: str
    settings: dict[str, Any]
    tuned_as: str
    against: str = "vanilla"


VANILLA = Setting("vanilla", "vanilla", "snr", {}, "vanilla")
CLUSTERS = ("timestep", "snr", "gradient")
FIXED = "linear, Nash's mean weights"
# Noise processes and predictions. Each sample takes 50 calls of the network; Heun's method calls it
# 49 times in 25 steps.
_EULER = {"sampler.name": "ddim", "sampler.num_steps": 50}
_HEUN = {"sampler.name": "heun", "sampler.num_steps": 25, "sampler.spacing": "karras"}
PROCESSES = {
    "DDPM epsilon": _EULER,
    "DDPM v": _EULER | {"process.prediction": "v"},
    "flow": _EULER | {"process.name": "flow"},
    "flow logit-normal": _EULER | {"process.name": "flow", "process.density": "logit_normal"},
    "EDM": _HEUN | {"process.name": "edm"},
}
# The three with the smallest distances in `field`.
PROCESS_METHODS = ("uncertainty", "nash", "imtl_g")
CHANGED_METHODS = ("vanilla", "uncertainty", "nash")


def core(affinity: Path) -> list[Setting]:
    """The settings of the comparison, except `fixed_setting`, which needs Nash's weights first."""
    clustered = [
        Setting(
            f"{method}, {clusters}",
            method,
            clusters,
            {"clusters.affinity": str(affinity)} if clusters == "gradient" else {},
            f"{method}, snr",
        )
        for clusters in CLUSTERS
        for method in METHODS
    ]
    shares = [
        Setting(
            f"{method}, snr, shares",
            method,
            "snr",
            {"method.weight_by_interval_size": True},
            f"{method}, snr, shares",
        )
        for method in ("linear", "uncertainty", "pcgrad")
    ]
    normalised = Setting("vanilla, normalised", "vanilla", "snr", _NORMALISE, "vanilla, normalised")
    return [VANILLA, *clustered, *shares, normalised]


def field() -> list[Setting]:
    """Vanilla, and every method of `ant_jax.mtl` on SNR clusters with its default settings."""
    methods = [name for name in settings.names_in(mtl, mtl.Weighting) if name != "vanilla"]
    return [VANILLA, *(Setting(name, name, "snr", {}, name) for name in methods)]


def processes(
    names: Sequence[str] = tuple(PROCESSES),
    methods: Sequence[str] = PROCESS_METHODS,
    clusterings: Sequence[str] = ("snr", "timestep"),
) -> list[Setting]:
    """Processes of `PROCESSES` x vanilla and methods x clusters, with the rates of SNR clusters."""
    found = []
    for name in names:
        change, vanilla = PROCESSES[name], f"{name}: vanilla"
        found.append(Setting(vanilla, "vanilla", "snr", change, vanilla, vanilla))
        found += [
            Setting(
                f"{name}: {method}, {clusters}",
                method,
                clusters,
                change,
                f"{name}: {method}, snr",
                vanilla,
            )
            for method in methods
            for clusters in clusterings
        ]
    return found


def fixed_setting(weights: Sequence[float]) -> Setting:
    """Linear with fixed weights."""
    rounded = tuple(float(f"{weight:.4g}") for weight in weights)
    return Setting(FIXED, "linear", "snr", {"method.weights": rounded}, FIXED)


def runs_of(preset: Preset, setting: Setting, rate: float | None) -> list[Run]:
    """The runs of a setting, one per seed; the rate None means the preset's learning rate."""
    changes = dict(setting.settings)
    if rate is not None:
        changes["optimizer.learning_rate"] = rate
    return [
        runner.make_run(preset, setting.method, setting.clusters, seed, changes)
        for seed in preset.seeds
    ]


def tuning_runs(preset: Preset, grid: tuple[float, ...], setting: Setting) -> list[Run]:
    """Half-length runs for each rate, with other seeds; none if it uses another setting's rate."""
    if setting.tuned_as != setting.label:
        return []
    return [
        runner.make_run(
            preset,
            setting.method,
            setting.clusters,
            TUNING_SEED + i,
            setting.settings
            | {"optimizer.learning_rate": rate, "num_steps": full_length(preset) // 2},
            measurements=1,
        )
        for rate in grid
        for i in range(len(preset.seeds))
    ]


def full_length(preset: Preset) -> int:
    """Number of steps of a run of the core."""
    return make_config(preset, "vanilla", "snr", seed=0).num_steps


def ablations(preset: Preset) -> list[Setting]:
    """The settings of the ablations, each with the setting that it is compared with."""

    def group(name, methods, change, clusters="snr", against="snr: vanilla"):
        return [
            Setting(
                f"{name}: {method}",
                method,
                clusters,
                change,
                "vanilla" if method == "vanilla" else f"{method}, snr",
                against.format(method=method),
            )
            for method in methods
        ]

    found = group("snr", ("vanilla", *METHODS), {})
    for k in (2, 8):
        found += group(f"k = {k}", ("uncertainty", "pcgrad", "nash"), {"clusters.k": k})
    found += group("k = 20", ("nash",), {"clusters.k": 20})
    # Random clusters have equal sizes, so evenly spaced intervals are the fair comparison.
    found += group("timestep", ("uncertainty", "nash"), {}, "timestep")
    found += group("random", ("uncertainty", "nash"), {}, "random", "timestep: {method}")
    found += group(
        "renewed every 25", ("nash",), {"method.update_every": 25, "method.max_norm": 1.0}
    )
    for name, change in changes(preset).items():
        found += group(name, CHANGED_METHODS, change, against=f"{name}: vanilla")
    return found


def changes(preset: Preset) -> dict[str, dict[str, Any]]:
    """Changes of the loss, the noise schedule, the model and the length, by name."""
    narrow = make_config(preset, "vanilla", "snr", seed=0).model.width // 2
    return {
        "P2": {"loss_weight.name": "p2"},
        "Min-SNR": {"loss_weight.name": "min_snr"},
        "linear schedule": {"process.schedule": "linear"},
        "half the width": {"model.width": narrow},
        "unconditional": {"model.conditional": False, "sampler.guidance": 1.0},
        "three times as long": {"num_steps": 3 * full_length(preset)},
    }
