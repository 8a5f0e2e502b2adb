import copy
import importlib
import importlib.util
import json
import pickle
import re
import sys
from pathlib import Path

import jax
import ml_collections
import numpy as np
import pytest
from tiny_runs import changed

from ant_jax import (
    compiled_step,
    dataset,
    evaluate,
    experiment,
    measuring,
    mtl,
    settings,
    state_layout,
    train,
)
from ant_jax import config as config_lib
from ant_jax import workdir as workdir_lib
from ant_jax.config import file as config_file
from ant_jax.init_from import initial_params
from configs import digits

_spec = importlib.util.spec_from_file_location(
    "settings_page", Path(__file__).parents[1] / "docs" / "settings.py"
)
settings_page = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(settings_page)

CONFIGS = sorted(
    path.stem for path in Path(digits.__file__).parent.glob("*.py") if path.stem != "__init__"
)


OWN_PLACES = (
    ("data", "dir"),
    ("autoencoder", "latents"),
    ("autoencoder", "weights"),
    ("evaluation", "weights"),
)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_file_is_valid(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    # What lies in a place of one's own has to be named.
    for _ in OWN_PLACES:
        try:
            config_lib.validate(config)
        except config_lib.ConfigError as error:
            group, setting = re.search(r"needs config\.(\w+)\.(\w+) = ", str(error)).groups()
            assert (group, setting) in OWN_PLACES
            config[group][setting] = "place"
    config_lib.validate(config)


@pytest.mark.parametrize("method", ["vanilla", "nash"])
def test_the_default_network_takes_a_train_step(method, monkeypatch):
    """As shapes alone: the tests that train make it smaller."""
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    config = digits.get_config(method)
    setup = experiment.build(config, channels=1, num_classes=10)
    state = jax.eval_shape(lambda: state_layout.new_state(config, setup))
    batch = {
        "image": jax.ShapeDtypeStruct((config.data.batch_size, 8, 8, 1), np.uint8),
        "label": jax.ShapeDtypeStruct((config.data.batch_size,), np.int32),
    }
    after, metrics = jax.eval_shape(compiled_step.training_step(config, setup), state, batch)
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert shapes(after) == shapes(state)
    assert metrics["cluster_losses"].shape == metrics["weights"].shape == (config.clusters.k,)


@pytest.mark.parametrize("method", ["vanilla", "linear", "uncertainty", "pcgrad", "nash"])
@pytest.mark.parametrize("clusters", ["", ",snr", ",timestep"])
def test_the_argument_chooses_method_and_clusters(method, clusters):
    config = digits.get_config(method + clusters)
    config_lib.validate(config)
    assert config.method.name == method
    assert config.clusters.name == (clusters[1:] or "snr")


def components():
    for group in config_lib.GROUPS:
        if group.folder:
            module, _, attribute = group.makes.partition(":")
            makes = getattr(importlib.import_module(module), attribute)
            folder = importlib.import_module(group.folder)
            for name in settings.names_in(folder, makes):
                yield pytest.param(group, settings.resolve(folder, name, makes), id=name)


@pytest.mark.parametrize(("group", "component"), list(components()))
def test_every_setting_of_a_component_is_described_and_has_a_possible_default(group, component):
    described = settings_page.described(component)
    for name, setting in settings.settings_of(component, group.given, group.affects).items():
        assert described[name]
        assert setting.problem(setting.default) is None


def test_the_page_of_all_settings_is_that_of_the_code():
    assert settings_page.PATH.read_text() == settings_page.page()


BAD = {
    # clusters and weights
    "config.clusters.name = 'gradient' needs config.clusters.affinity": {
        "clusters__name": "gradient"
    },
    "config.clusters.specialist = 5 must be below config.clusters.k = 5": {
        "clusters__specialist": 5
    },
    "config.method.weights must be ": {"method__name": "linear", "method__weights": (1, "x")},
    "unknown setting config.method.weights": {"method__weights": (1.0,) * 5},
    "config.method.weight_by_interval_size = True needs tasks": {
        "method__weight_by_interval_size": True,
        "method__name": "vanilla",
    },
    "config.method.cosines = True needs tasks": {
        "method__cosines": True,
        "clusters__specialist": 0,
    },
    # an unknown name
    "unknown setting config.num_step; did you mean config.num_steps?": {"num_step": 1},
    "did you mean config.optimizer.learning_rate?": {"optimizer__learning_rat": 1.0},
    # a wrong type
    "config.num_steps must be an integer >= 1, got '3'": {"num_steps": "3"},
    "config.num_steps must be an integer >= 1, got True": {"num_steps": True},
    "config.num_steps must be an integer >= 1, got 1.5": {"num_steps": 1.5},
    "config.ema_decay must be a number >= 0 and <= 1, got False": {"ema_decay": False},
    "config.optimizer.learning_rate must be a number > 0, got '3'": {
        "optimizer__learning_rate": "3"
    },
    "config.data.flip must be True or False, got 1": {"data__flip": 1},
    "missing setting config.data.name": {"data__name": None},
    # out of range
    "config.num_steps must be an integer >= 1, got 0": {"num_steps": 0},
    "config.seed must be an integer >= 0 and <= 1073741823, got -1": {"seed": -1},
    "config.optimizer.learning_rate must be a number > 0, got 0": {"optimizer__learning_rate": 0},
    "learning_rate must be a number > 0, got nan": {"optimizer__learning_rate": float("nan")},
    "config.label_dropout must be a number >= 0 and <= 1, got 1.1": {"label_dropout": 1.1},
    "config.model.patch must be one of 1, 2, 4, 8, got 3": {"model__patch": 3},
    "config.data.name must be one of 'arrays', 'digits', ": {"data__name": "mnist"},
    "package.module:attribute', got 'nahs'; did you mean 'nash'?": {"method__name": "nahs"},
    "config.clusters.name must be one of 'gradient', ": {"clusters__name": "uniform"},
    # of an earlier version
    "unknown setting config.method.nash_max_norm; it is config.method.max_norm now": {
        "method__nash_max_norm": 1.0
    },
    "config.process.timesteps must be an integer >= 1 and <= 10000, got 200000": {
        "process__timesteps": 200_000
    },
    # impossible together
    "unknown setting config.data.exif": {"data__exif": "apply"},
    "config.clusters.k = 9 must not exceed config.process.timesteps = 8": {
        "clusters__k": 9,
        "process__timesteps": 8,
        "sampler__num_steps": 8,
    },
    "config.sampler.num_steps = 50 must not exceed config.process.timesteps = 49": {
        "process__timesteps": 49
    },
    "config.model.channel_mult must be numbers > 0 and <= 64 as '(1, 2)', got ()": {
        "model__name": "unet",
        "model__channel_mult": (),
    },
    "config.model.attention_factors must be integers >= 1 as '(2, 4)', got (2, 0)": {
        "model__name": "unet",
        "model__attention_factors": (2, 0),
    },
    "config.optimizer.frozen must be a regular expression, or '' for none, got 'block_('": {
        "optimizer__frozen": "block_("
    },
    "config.autoencoder.batch_size must be a power of 2 of at most 1024, got 48": {
        "autoencoder__batch_size": 48
    },
    "config.autoencoder.name = 'KL-f8' needs config.autoencoder.latents = DIR": {
        "autoencoder__name": "KL-f8",
        "autoencoder__weights": "vae.pt",
    },
    "config.autoencoder.name = 'KL-f8' needs config.autoencoder.weights = PATH": {
        "autoencoder__name": "KL-f8",
        "autoencoder__latents": "latents",
    },
    "config.sampler.spacing: num_steps = 300 must be below 1000 timesteps and divide them": {
        "sampler__num_steps": 300,
        "sampler__spacing": "ldm",
    },
    "config.sampler.spacing: the sections of spacing '10,20' have 30 steps": {
        "sampler__spacing": "10,20"
    },
    "config.sampler.spacing: spacing must be 'even', 'karras' or 'log_snr', got 'ldm'": {
        "process__name": "flow",
        "sampler__spacing": "ldm",
    },
    "config.sampler: churn_low = 2.0 must be below churn_high = 1.0": {
        "sampler__name": "heun",
        "sampler__churn_low": 2.0,
        "sampler__churn_high": 1.0,
    },
    "config.sampler.guidance_low = 2.0 must be below config.sampler.guidance_high = 1.0": {
        "sampler__guidance_low": 2.0,
        "sampler__guidance_high": 1.0,
    },
    "config.model.routing_levels = 1000 must be config.process.timesteps = 60": {
        "process__timesteps": 60,
        "model__routing": 0.8,
    },
    "config.process: a loss weight multiplies the squared error of the noise: it needs loss": {
        "process__name": "flow",
        "loss_weight__name": "p2",
    },
    "config.sampler.guidance = 2.0 needs config.model.conditional = True": {
        "sampler__guidance": 2.0,
        "model__conditional": False,
    },
    "config.sampler.guidance = 2.0 needs": {"sampler__guidance": 2.0, "label_dropout": 0.0},
    "config.evaluation.features = 'digits' can't evaluate config.data.name = 'tfds'": {
        "data__name": "tfds"
    },
    "True and 0 < config.label_dropout < 1, which train": {
        "sampler__guidance": 2.0,
        "label_dropout": 1,
    },
    "config.optimizer.weight_decay = 400.0 times config.optimizer.learning_rate = 0.003 must be": {
        "optimizer__weight_decay": 400.0
    },
    "config.method.weights must be () or k numbers >= 0 as '(0.3, 0.7)', not all 0, got": {
        "method__name": "linear",
        "method__weights": (0.0,) * 5,
    },
    "config.ema_decay must be a number >= 0 and <= 1, got inf": {"ema_decay": float("inf")},
    "config.sampler.guidance must be a number >= 0 and <= 1000, got inf": {
        "sampler__guidance": float("inf")
    },
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_setting_is_named_with_what_is_allowed(message):
    with pytest.raises(config_lib.ConfigError, match=re.escape(message)):
        config_lib.validate(changed(**BAD[message]))


VARIANTS = [
    {},
    {
        "data__name": "folder",
        "loss_weight__name": "p2",
        "model__name": "unet",
        "clusters__name": "gradient",
        "method__name": "linear",
        "sampler__name": "ddpm",
        "evaluation__features": "inception",
    },
    {
        "data__name": "tfds",
        "loss_weight__name": "min_snr",
        "method__name": "uncertainty",
        "evaluation__features": "",
    },
]
# Every setting, and components with which there is such a one.
EVERY = {
    name: variant
    for variant in reversed(VARIANTS)
    for name in config_lib.settings_of_config(changed(**variant))
}


@pytest.mark.parametrize("name", EVERY)
def test_a_missing_setting_is_named(name):
    config = changed(**EVERY[name]).unlock()
    group, _, leaf = name.rpartition(".")
    del (config[group] if group else config)[leaf]
    with pytest.raises(config_lib.ConfigError, match=f"missing setting config.{name}"):
        config_lib.validate(config)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("vanilla", {"method__draw": "uniform"}),
        ("uncertainty", {"method__draw": "uniform"}),
        ("nash", {"method__draw": "uniform", "method__gradient_form": "masked"}),
        ("nash", {"num_steps": 99}),
        ("nash", {"model__conditional": False}),
        ("nash", {"optimizer__learning_rate": 1, "ema_decay": 0, "label_dropout": 1}),
        ("nash", {"data__name": "tfds", "data__builder": "cifar10", "evaluation__features": ""}),
    ],
)
def test_what_works_is_allowed(method, settings):
    config_lib.validate(changed(method, **settings))


def _reference(config):
    # Not Inception itself.
    config_lib.update(config, {"evaluation.features": "digits", "data.name": "digits"})
    measuring.build(config, ["frechet"])


# How what a path setting names is opened.
OPENERS = {
    "data.dir": lambda config: dataset.open_images(config, ""),
    "autoencoder.weights": dataset.open_codec,
    "autoencoder.latents": lambda config: dataset.open_latents(config, ""),
    "init_from": lambda config: initial_params(config, None),
    "clusters.affinity": lambda config: experiment.build_clusters(
        config, config_lib.build_process(config)
    ),
    "evaluation.weights": measuring.build,
    "evaluation.reference": _reference,
    "evaluation.samples": lambda config: evaluate._of_file(config, Path()),
}


def test_every_path_has_an_opener():
    paths = {
        name
        for name, variant in EVERY.items()
        if config_lib.settings_of_config(changed(**variant))[name].per_process
    }
    assert set(OPENERS) == paths - {"data.num_workers"}


@pytest.mark.parametrize("name", OPENERS)
def test_a_tilde_is_the_home_in_every_path(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("file", "_/latents.json"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(b"neither weights nor images")
    settings = {
        "data__name": "folder",
        "autoencoder__name": "KL-f4-small",
        "clusters__name": "gradient",
        "evaluation__features": "inception",
    }

    def complaint(path):
        config = changed(**settings, **{name.replace(".", "__"): path})
        with pytest.raises((ValueError, OSError)) as error:
            OPENERS[name](config)
        return str(error.value).replace("~", str(tmp_path))

    path = "" if name == "autoencoder.latents" else "/file"
    # That of a file that is there, but not what it should be.
    assert complaint(f"~{path}") == complaint(f"{tmp_path}{path}")


@pytest.mark.parametrize("name", OPENERS)
@pytest.mark.parametrize("path", ["~nobody-of-that-name/x", "a\0b"])
def test_a_path_that_can_be_none_is_refused(name, path):
    with pytest.raises(config_lib.ConfigError, match=f"config.{name} must be a path; .* got "):
        config_lib.validate(changed(**EVERY[name] | {name.replace(".", "__"): path}))


CONFIG_FILES = {
    "there is no such file; did you mean {folder}/config.py?": ("confg.py", None),
    "it is a folder": ("", None),
    "SyntaxError: invalid syntax (config.py, line 2)": ("config.py", "x = 1\n1 +"),
    "line 2: ModuleNotFoundError: No module named 'nothing'": ("config.py", "\nimport nothing"),
    "it has no function get_config": ("config.py", "get_config = 3"),
    "line 2: KeyError: 'boom'": ("config.py", "def get_config():\n  raise KeyError('boom')"),
    "line 4: config.num_steps must be of type int, got 'x'": (
        "config.py",
        "from configs import digits\ndef get_config():\n  config = digits.get_config()\n"
        "  config.num_steps = 'x'",
    ),
    "its get_config takes no argument: write --config={folder}/config.py": (
        "config.py:argument",
        "def get_config(): pass",
    ),
    "get_config must return an ml_collections.ConfigDict, not a NoneType": (
        "config.py:argument",
        "def get_config(argument): pass",
    ),
}


@pytest.mark.parametrize("words", CONFIG_FILES)
def test_a_file_that_is_no_config_is_one_line(words, tmp_path):
    name, content = CONFIG_FILES[words]
    (tmp_path / "config.py").write_text(content or "")
    with pytest.raises(config_lib.ConfigError) as error:
        config_file.read(str(tmp_path / name))
    assert str(error.value) == words.format(folder=tmp_path)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_read_wherever_the_program_is_started(name, tmp_path, monkeypatch):
    path = Path(digits.__file__).with_name(f"{name}.py").resolve()
    monkeypatch.chdir(tmp_path)
    # As in a program that was not started here.
    monkeypatch.setattr(sys, "path", [each for each in sys.path if (path.parents[1] != Path(each))])
    for module in [each for each in sys.modules if each.partition(".")[0] == "configs"]:
        monkeypatch.delitem(sys.modules, module)
    config = config_file.read(f"{path}:pcgrad,timestep")
    assert (config.method.name, config.clusters.name) == ("pcgrad", "timestep")


def test_a_tilde_is_the_home_in_the_name_of_a_config(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text("from configs.digits import get_config")
    assert config_file.read("~/mine.py:linear").method.name == "linear"


SURPRISES = {
    "config.sampler.clip_x0 = True clips latents": {
        "autoencoder__name": "KL-f8",
        "autoencoder__latents": "latents",
    },
    "config.optimizer.warmup_steps = 100 is at least config.num_steps = 100: the learning": {
        "num_steps": 100
    },
    "config.optimizer.decay_mask = 'kernel' has no effect: config.optimizer.weight_decay = 0": {
        "optimizer__decay_mask": "kernel"
    },
    "config.optimizer.name = 'schedule_free' averages the parameters instead of lowering the": {
        "optimizer__name": "schedule_free",
        "schedule__name": "cosine",
    },
    "config.checkpoint.keep_period = 700 is no multiple of config.checkpoint.every = 500": {
        "checkpoint__keep_period": 700
    },
    "config.method.update_every = 3000 is at least": {"method__update_every": 3000},
    "config.label_dropout = 1 leaves no label": {"label_dropout": 1},
    "config.profile_steps = 2 begins at step 10, and config.num_steps = 9": {
        "profile_steps": 2,
        "num_steps": 9,
        "optimizer__warmup_steps": 0,
    },
    "config.autoencoder.latents = 'latents' is not used: config.autoencoder.name = ''": {
        "autoencoder__latents": "latents"
    },
}


@pytest.mark.parametrize("words", SURPRISES)
def test_what_surprises_is_said_once(words):
    (line,) = config_lib.warnings_of(changed(**SURPRISES[words]), training=True)
    assert line.startswith(words)
    drawing = "clip_x0" in words
    assert len(config_lib.warnings_of(changed(**SURPRISES[words]), training=False)) == drawing


@pytest.mark.parametrize("name", CONFIGS)
def test_no_config_file_surprises(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    assert config_lib.warnings_of(config, training=True) == []


REFUSED_BY_EVALUATION = {
    "config.evaluation.split = 'validation': config.data.name = 'digits': digits has no split": {
        "evaluation__split": "validation"
    },
    "config.evaluation.features = 'inception' needs the path of the weights: pt_inception": {
        "evaluation__features": "inception"
    },
    "config.evaluation.metrics must be one of 'frechet', ": {"evaluation__metrics": ("freche",)},
    "config.evaluation.metrics: 'inception_score' needs the output 'logits', but "
    "config.evaluation.features = 'digits' has only 'features', 'labels', 'pixels'": {
        "evaluation__metrics": ("frechet", "inception_score")
    },
    "config.evaluation.features = 'inception' finds no weights: there is no such file as '~/": {
        "evaluation__features": "inception",
        "evaluation__weights": "~/none",
    },
    "config.evaluation.features = 'digits' evaluates grey images of 8x8 pixels": {
        "data__image_size": 16
    },
}


@pytest.mark.parametrize("words", REFUSED_BY_EVALUATION)
def test_what_evaluation_will_refuse_is_said_before_training(words, caplog, tmp_path):
    config = changed(**REFUSED_BY_EVALUATION[words])
    with pytest.raises(config_lib.ConfigError, match=re.escape(words)):
        evaluate.evaluate(config, tmp_path / "no run")
    train._look_ahead(config, 1)
    assert f"--mode evaluate will refuse this: {words}" in caplog.text
    caplog.clear()
    train._look_ahead(changed(evaluation__features="", evaluation__split=""), 1)
    train._look_ahead(changed(), 1)
    assert not caplog.text


HOSTILE = [
    *(None, True, [1], {}, b"1", "", "3", "0,0", "nan", "~", "a\0b", "(", "\udc80", "x" * 9999),
    *(-1, 0, 1, 2, 3, 7, 1000, 2**31, 2**32, 2**63, 2**64, 10**400),
    *(-0.0, 0.5, 1.5, 1e-300, 1e39, 1e308, float("nan"), float("inf"), -float("inf")),
    *((), (1,), (0, 1), (1, 2), (2**63,), (True,), ("1",), (float("nan"), 1), (1,) * 99),
    *(np.int64(3), np.float32(0.5), np.float64(0.5), np.bool_(True), np.str_("dit")),
]


@pytest.mark.parametrize("name", EVERY)
def test_any_value_is_refused_by_name_or_recorded_as_it_is(name):
    # Few timesteps, so that clusters are found at once.
    config = changed(**EVERY[name], process__timesteps=20, sampler__num_steps=10)
    group, _, leaf = name.rpartition(".")
    for value in HOSTILE:
        (config[group] if group else config)._fields[leaf] = value
        try:
            config_lib.validate(config)
            loaded = config_lib.from_json(json.loads(json.dumps(config.to_dict())))
            assert loaded.to_dict() == config.to_dict()
            config_lib.validate(loaded)
            config_lib.warnings_of(config, training=True)
            if not (config.autoencoder.name or config.clusters.name == "gradient"):
                setup = experiment.build(config, 1, 10)
                experiment.check_batch(config, setup)
        except config_lib.ConfigError as error:
            # Perhaps by what it does not fit.
            assert "config." in str(error) and "\n" not in str(error)


FREE = {
    "log_every": 7,
    "log_to": (),
    "profile_steps": 3,
    "checkpoint__keep": 5,
    "sampler__guidance": 2.0,
    "evaluation__features": "",
    "data__num_workers": 2,
    "autoencoder__weights": "/elsewhere/vae.pt",
    "model__remat": "blocks",
    "model__attention": "cudnn",
    "num_steps": 5000,
}
FIXED = {
    "seed": 1,
    "data__batch_size": 250,
    "data__name": "tfds",
    "model__width": 32,
    "clusters__k": 4,
    "method__name": "linear",
    "optimizer__learning_rate": 0.1,
    "ema_decay": 0.9,
    "process__timesteps": 100,
    "optimizer__frozen": "output",
    "init_from": "other",
}


@pytest.mark.parametrize("name", FREE)
def test_a_restart_may_change_what_does_not_touch_the_parameters(name):
    config_lib.check_same(changed(), changed(**{name: FREE[name]}), "w")


@pytest.mark.parametrize("name", FIXED)
def test_a_restart_may_not_change_the_run(name):
    old, new = digits.get_config("nash"), changed(**{name: FIXED[name]})
    dotted = name.replace("__", ".")
    was = config_lib.flatten(old)[dotted]
    words = f"config.{dotted}: {was!r} there, {FIXED[name]!r} now"
    with pytest.raises(config_lib.ConfigError, match=re.escape(words)) as error:
        config_lib.check_same(old, new, "workdir")
    assert "the run in workdir" in str(error.value)
    assert str(error.value).count(" there, ") == 1


def test_the_number_of_steps_is_part_of_a_run_whose_learning_rate_depends_on_it():
    settings = {"schedule__name": "cosine"}
    with pytest.raises(config_lib.ConfigError, match=r"config.num_steps: 3000 there, 5000 now"):
        config_lib.check_same(changed(**settings), changed(**settings, num_steps=5000), "w")


def test_settings_that_only_one_of_them_has_differ():
    with pytest.raises(config_lib.ConfigError, match=r"config.new: 'not set' there, 1 now"):
        config_lib.check_same(changed(), changed(new=1), "w")


WORDS = {
    "model.name": {"unet": "unet", "mine:Net": "mine:Net", "mine.a:Net": "mine.a:Net"},
    "data.builder": {"cifar10": "cifar10", "resized/64x64": "resized%2F64x64"},
    "data.split": {"train[:90%]": "train[:90%]", "train[:12.5%]": "train[:12.5%]"},
    "optimizer.frozen": {"qkv": "qkv", "block_0/qkv": "block_0%2Fqkv", r".*\.b": r".*\.b"},
    "data.dir": {"": "", "data/cats": "cats", "cats.zip": "cats", "data/best": "data-best"},
    "init_from": {
        "runs/a/best": "a-best",
        "a.safetensors": "a",
        "runs/a-learning_rate=0.01": "a-learning_rate=0.01",
        "runs/a-model.width=8": "a-model.width=8",
    },
    "model.channel_mult": {(1, 2): "1,2"},
    "optimizer.learning_rate": {0.01: "0.01", 1: "1"},
}


def test_other_values_are_other_words_for_the_name_of_a_folder():
    config = config_lib.default_config(data="tfds", model="unet")
    for name, words in WORDS.items():
        for value, word in words.items():
            assert config_lib.in_words(config, {name: value}) == [f"{name}={word}"]


def test_a_workdir_describes_itself(tmp_path):
    assert workdir_lib.load_config(tmp_path) is None
    config = digits.get_config()
    workdir_lib.save_config(config, tmp_path / "run")
    loaded = workdir_lib.load_config(tmp_path / "run")
    assert loaded == config
    config_lib.validate(loaded)
    config_lib.check_same(loaded, config, tmp_path)


def test_a_run_of_an_older_version_goes_on_as_it_began():
    """A setting that is newer than this file needs a line in `config.migration`."""
    settings = json.loads((Path(__file__).parent / "data" / "config.json").read_text())
    read = config_lib.from_json(settings)
    config_lib.validate(read)
    config_lib.check_same(read, digits.get_config(), "w")
    assert read.log_to == ("tensorboard",)
    assert config_lib.from_json(settings | {"tensorboard": False}).log_to == ()
    # What is there is left as it is.
    settings["data"] |= {"name": "folder", "exif": "apply"}
    assert config_lib.from_json(settings).data.exif == "apply"


MISFITS = {
    "config.model: width must be a multiple of heads (5)": {"model__heads": 5},
    "config.data.image_size = 10 must be a multiple of 4 for this config.model: 8 or 12, for": {
        "data__image_size": 10
    },
    "config.data.image_size = 10 must be a multiple of 8 for this config.model: 8 or 16, for": {
        "data__image_size": 10,
        "model__name": "unet",
        "model__channel_mult": (1, 1, 1, 1),
    },
    "config.model: attention_factors must be among [1, 2], not 4": {
        "model__name": "unet",
        "model__attention_factors": (4,),
    },
    "config.data.image_size = 12 must be divisible by 8, the factor of the autoencoder 'KL-f8'": {
        "data__image_size": 12,
        "autoencoder__name": "KL-f8",
        "autoencoder__weights": "vae.pt",
        "autoencoder__latents": "latents",
    },
    "config.sample.labels = (3, 10) must be classes of the network: 0 to 9": {
        "sample__labels": (3, 10)
    },
    "config.sample.labels = (3,) needs a network that gets labels, by config.model.conditional": {
        "sample__labels": (3,),
        "model__conditional": False,
        "label_dropout": 0.0,
    },
    "config.sampler.guidance_channels = 5 must not exceed the 1 channels": {
        "sampler__guidance_channels": 5
    },
    "config.data.batch_size = 120 images of 100000x100000x1 take": {"data__image_size": 100_000},
    "config.sample.batch_size = 1000000000 images of 8x8x1 take": {"sample__batch_size": 10**9},
    "config.process: the weights of P2(k=1e+30, gamma=5.0) are all 0 in float32": {
        "loss_weight__name": "p2",
        "loss_weight__k": 1e30,
        "loss_weight__gamma": 5.0,
    },
    "config.optimizer.frozen = 'blocks' matches none of the parameters": {
        "optimizer__frozen": "blocks"
    },
    "config.optimizer.frozen = '.' matches all of the parameters": {"optimizer__frozen": "."},
}


@pytest.mark.parametrize("message", MISFITS)
def test_settings_that_fit_no_network_are_named(message):
    config = changed(**MISFITS[message])
    with pytest.raises(config_lib.ConfigError, match=re.escape(message)):
        experiment.build(config, 1, 10)


OWN = """
from typing import NamedTuple
from ant_jax.mtl import Weighting, linear
from ant_jax.data import digits

def pull(k: int, strength: float = 0.5) -> Weighting:
    return linear(k)

def needs(k: int, strength: float) -> Weighting:
    return linear(k)

def none(k: int) -> Weighting:
    return 3

def taken(k: int, max_norm: float = 7.0) -> Weighting:
    return linear(k)

def unresolved(k: int, a: "Nothing" = 1) -> Weighting:
    return linear(k)

def column(k: int) -> Weighting:
    return linear(k)._replace(weigh=lambda stats, state: (stats.counts[:, None], state))

def stateless(k: int) -> Weighting:
    return linear(k)._replace(weigh=lambda stats, state: stats.counts)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_parts.py").write_text(OWN)
    (tmp_path / "broken_parts.py").write_text("1 +")
    monkeypatch.syspath_prepend(tmp_path)


def test_a_component_of_ones_own_has_its_settings(own):
    config = digits.get_config("linear")
    config_lib.update(config, {"method.name": "own_parts:pull", "method.strength": 2})
    config_lib.validate(config)
    assert config.method.strength == 2.0 and "weights" not in config.method
    config_lib.update(config, {"method.name": "own_parts:needs"})
    with pytest.raises(
        config_lib.ConfigError, match=r"missing setting config\.method\.strength: a n"
    ):
        config_lib.validate(config)
    config.method.strength = 0.25
    config_lib.validate(config)
    assert config_lib.build(config, "method", k=3, seed=0).k == 3


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("own_parts:none", "makes int, not Weighting: see docs/adding.md"),
        ("own_parts:taken", "has an argument max_norm, which is a setting of all of config.method"),
        ("own_parts:unresolved", "name 'Nothing' is not defined"),
        ("broken_parts:f", "can't be imported: SyntaxError: invalid syntax"),
        ("own_parts:column", r"weigh of own_parts.column .* \(k,\) = \(5,\) .* got .* \(5, 1\)"),
        ("own_parts:stateless", r"weigh of own_parts.stateless must .* and a state, got 1 value"),
    ],
)
def test_a_faulty_component_of_ones_own_is_one_line(name, words, own):
    config = digits.get_config("linear")
    with pytest.raises(config_lib.ConfigError, match=f"config.method.name .*{words}") as error:
        config_lib.update(config, {"method.name": name})
        # Wrappers would fail where they use what it returns.
        config_lib.update(config, {"method.update_every": 2, "method.max_norm": 1.0})
        experiment.build(config, channels=1, num_classes=10)
    assert "\n" not in str(error.value)


def test_a_setting_of_the_same_name_is_not_carried_over_where_it_means_something_else():
    config = config_lib.default_config(loss_weight="min_snr")
    config_lib.update(config, {"loss_weight.name": "p2", "model.width": 32})
    assert config.loss_weight.gamma == 1.0
    config_lib.update(config, {"model.name": "unet"})
    assert config.model.width == 32 and "depth" not in config.model


COPIES = {
    "itself": lambda config: config,
    "a copy": copy.deepcopy,
    "a resolved copy": lambda config: config.copy_and_resolve_references(),
    "pickled": lambda config: pickle.loads(pickle.dumps(config)),
    "of JSON": lambda config: config_lib.from_json(json.loads(json.dumps(config.to_dict()))),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_group_gets_the_settings_of_a_component_that_is_assigned(copied):
    config = copied(digits.get_config("vanilla"))
    assert config == digits.get_config("vanilla")
    config.method.name = "nash"
    config.model.name = "unet"
    assert "max_norm" in config.method and "depth" not in config.model
    config_lib.validate(config)
    assert config != digits.get_config("vanilla")
    assert config.is_locked and config.model.is_locked
    with pytest.raises(config_lib.ConfigError, match="got 'nahs'; did you mean 'nash'"):
        config.method.name = "nahs"
    assert config.method.name == "nash"


@pytest.mark.parametrize("kind", [dict, ml_collections.ConfigDict, ml_collections.FrozenConfigDict])
def test_a_group_can_be_assigned(kind):
    config = config_lib.default_config()
    config.model = kind(config_lib.default_config(model="unet").model.to_dict())
    assert config == config_lib.default_config(model="unet")
    config.model.name = "dit"
    assert config == config_lib.default_config() and config.model.is_locked


def test_a_plain_config_is_updated():
    config = ml_collections.ConfigDict(config_lib.default_config().to_dict())
    config_lib.update(config, {"model.num_res_blocks": 1, "model.name": "unet"})
    assert config.model.num_res_blocks == 1
    config_lib.validate(config)


def test_a_required_setting_has_a_type():
    config = config_lib.default_config(method=f"{__name__}:needs_a_path")
    with pytest.raises(config_lib.ConfigError, match="path must be of type str, got 3"):
        config.method.path = 3


def needs_a_path(k: int, path: str) -> mtl.Weighting:
    return mtl.linear(k)


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("num_stepz", 3, "unknown setting config.num_stepz; did you mean config.num_steps?"),
        ("model.widht", 3, "unknown setting config.model.widht; did you mean config.model.width?"),
        ("modle.width", 3, "unknown setting config.modle.width; did you mean config.model.width?"),
        ("num_steps.x", 3, "unknown setting config.num_steps.x; did you mean config.num_steps?"),
        ("num_steps", "many", "config.num_steps must be of type int, got 'many'"),
        ("model", "unet", "config.model is a group of settings: set config.model.name"),
        ("sample", 3, "config.sample is a group of settings: set config.sample.SETTING"),
    ],
)
def test_a_wrong_change_is_one_line(setting, value, words):
    config = digits.get_config()
    with pytest.raises(config_lib.ConfigError) as error:
        config_lib.update(config, {setting: value})
    assert str(error.value) == words
    group, _, leaf = setting.rpartition(".")
    if group in ("", "model"):
        with pytest.raises(config_lib.ConfigError) as error:
            setattr(config[group] if group else config, leaf, value)
        assert str(error.value) == words
    assert config == digits.get_config()


def test_reading_a_setting_that_is_not_there_is_one_line_too():
    config = digits.get_config("nash")
    with pytest.raises(config_lib.ConfigError, match=r"config.method.c; .* 'cagrad': --config"):
        _ = config.method.c
    assert not hasattr(config, "nothing") and config.get("nothing", 3) == 3
    with pytest.raises(config_lib.ConfigError, match=r"no dot: write config\.method\.name instead"):
        config["method.name"] = "vanilla"
