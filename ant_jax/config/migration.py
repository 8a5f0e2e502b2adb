"""Configs of earlier versions, and how they are migrated."""

from collections.abc import Mapping
from typing import Any

# Settings that did not exist in earlier versions, with the value that does the same.
_BEFORE = {
    "data": {"exif": "ignore"},
    "model": {"num_heads": 0},
    "sample": {"spacing": "even"},
    "": {"init_facts": ""},
}

# Settings that this version has got since its first run, with the value that does the same, by
# group and component; "" for all components.
_SINCE = {
    ("parallel", ""): {"params": "replicated"},
    ("evaluation", ""): {"every": 0, "num_in_training": 0},
    ("sample", ""): {"labels": ()},
    ("optimizer", ""): {"decay_mask": ""},
    ("optimizer", "adamw"): {"b1": 0.9, "b2": 0.999, "eps": 1e-8},
    ("schedule", "cosine"): {"final": 0.0},
    ("sampler", ""): {"guidance_low": 0.0, "guidance_high": 1e9},
    ("method", ""): {
        **{"suppress": 1.0, "suppress_log_snr": -5.0, "curriculum_steps": 0},
        **{"pike": 0.0, "pike_noise": 1.0, "pike_blocks": 4, "pike_every": 100},
        **{"level_uncertainty": 0.0},
    },
    ("model", "dit"): {
        **{"norm": "layer", "qk_norm": False, "mlp": "gelu", "position": "sincos"},
        **{"routing": 1.0, "routing_power": 4.0, "routing_levels": 1000},
        "level_scale": 1000.0,
    },
}

# The new names of settings of earlier versions.
MOVED = {
    "optimizer.schedule": "schedule.name",
    "tensorboard": "log_to",
    "diffusion.timesteps": "process.timesteps",
    "diffusion.schedule": "process.schedule",
    "diffusion.variance": "process.variance",
    "diffusion.prediction": "process.prediction",
    "diffusion.clip_x0": "sampler.clip_x0",
    "diffusion.loss_weight": "loss_weight.name",
    "diffusion.p2_k": "loss_weight.k",
    "diffusion.p2_gamma": "loss_weight.gamma",
    "diffusion.min_snr_gamma": "loss_weight.gamma",
    "clusters.cost": "clusters.name",
    "clusters.only": "clusters.specialist",
    "method.linear_weights": "method.weights",
    "method.uncertainty_learning_rate": "method.learning_rate",
    "method.nash_update_every": "method.update_every",
    "method.nash_max_norm": "method.max_norm",
    "method.share_weighted": "method.weight_by_interval_size",
    "method.timesteps": "method.draw",
    "sample.sampler": "sampler.name",
    "sample.num_steps": "sampler.num_steps",
    "sample.spacing": "sampler.spacing",
    "sample.eta": "sampler.eta",
    "sample.guidance": "sampler.guidance",
    "sample.guidance_channels": "sampler.guidance_channels",
    "evaluation.inception": "evaluation.weights",
}

# Settings that belong to one component. Version 0.1 listed them for all components of the group.
_OWN = {
    "model": {
        "dit": ("depth", "heads", "patch"),
        "unet": (
            "channel_mult",
            "num_res_blocks",
            "attention_factors",
            "head_channels",
            "num_heads",
            "scale_shift_norm",
            "resblock_updown",
        ),
    },
    "data": {"digits": (), "folder": ("dir", "exif"), "tfds": ("dir", "builder")},
    "clusters": {"snr": (), "timestep": (), "random": (), "gradient": ("affinity",)},
    "loss_weight": {"none": (), "p2": ("k", "gamma"), "min_snr": ("gamma",)},
    "method": {
        "vanilla": (),
        "linear": ("weights",),
        "uncertainty": ("learning_rate",),
        "pcgrad": (),
        "nash": (),
    },
    "sampler": {"ddim": ("eta",), "ddpm": ()},
    "evaluation": {"": (), "digits": (), "inception": ("weights",)},
}


def of_today(flat: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Settings by ``"group.name"`` of any version, under the names of this version.

    Args:
      flat: the settings.
      names: components by group, where the settings do not name them.
    """
    new = {MOVED.get(name, name): value for name, value in flat.items()}
    for (group, component), values in _SINCE.items():
        if component in ("", new.get(f"{group}.name", names.get(group))):
            new = {f"{group}.{name}": value for name, value in values.items()} | new
    # The first exports did not name the process.
    return {"process.name": "gaussian"} | new


def migrated(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config of this version that does the same as one of any version.

    If a config lacks groups, the result lacks them too, but for ``parallel`` and ``schedule``,
    which are newer than many runs; `config.validate` then names them.
    """
    new = dict(config)
    if "process" not in config and isinstance(config.get("diffusion"), Mapping):
        new = _from_first_version(config)
    if isinstance(tensorboard := new.pop("tensorboard", None), bool):
        new["log_to"] = ("tensorboard",) * tensorboard
    # The groups that are newer than many runs.
    new.setdefault("parallel", {})
    if isinstance(new.get("optimizer"), Mapping):
        # There was AdamW alone, and two schedules were a setting of it.
        new["optimizer"] = {"name": "adamw", **new["optimizer"]}
        if "schedule" in new["optimizer"]:
            new.setdefault("schedule", {"name": new["optimizer"].pop("schedule")})
    for (group, component), values in _SINCE.items():
        own = new.get(group)
        if isinstance(own, Mapping) and component in ("", own.get("name")):
            new[group] = values | dict(own)
    return new


def _from_first_version(config):
    old = {
        name: dict(value) if isinstance(value, Mapping) else value for name, value in config.items()
    }
    for group, values in _BEFORE.items():
        place = old if not group else old.get(group)
        if isinstance(place, dict):
            for name, value in values.items():
                place.setdefault(name, value)
    new: dict[str, Any] = {}

    def put(path, value):
        group, _, name = path.rpartition(".")
        (new.setdefault(group, {}) if group else new)[name] = value

    for group, values in old.items():
        if not isinstance(values, dict):
            put(group, values)
            continue
        for name, value in values.items():
            path = f"{group}.{name}"
            weight = old["diffusion"].get("loss_weight")
            if path.startswith("diffusion.p2_") and weight != "p2":
                continue
            if path == "diffusion.min_snr_gamma" and weight != "min_snr":
                continue
            put(MOVED.get(path, path), value)
    _convert(new)
    for group, own in _OWN.items():
        values = new.get(group, {})
        key = "features" if group == "evaluation" else "name"
        if values.get(key) in own:
            others = {name for names in own.values() for name in names} - {*own[values[key]]}
            new[group] = {name: value for name, value in values.items() if name not in others}
    return new


def _convert(new):
    """Converts values whose form has changed."""
    new.setdefault("process", {})["name"] = "gaussian"
    data = new.get("data", {})
    if str(data.get("name")).startswith("tfds:"):
        data["name"], data["builder"] = "tfds", data["name"].removeprefix("tfds:")
    new.setdefault("evaluation", {}).setdefault("metrics", ())
    method = new.get("method", {})
    weights = method.get("weights")
    if isinstance(weights, str):
        method["weights"] = tuple(float(part) for part in weights.split(",") if part)
    if method.get("name") != "nash":
        # Only Nash-MTL had these settings.
        method |= {"update_every": 1, "max_norm": 0.0}
    if method.get("name") == "vanilla" or method.get("draw") == "stratified":
        # Vanilla ignored the setting and drew uniformly.
        method["draw"] = "auto"
    bound = method.get("max_norm")
    if method.get("update_every") == 1 and isinstance(bound, int | float) and bound >= 1:
        # The norm of an exact solution is k^-1/2, so such a bound had no effect.
        method["max_norm"] = 0.0
