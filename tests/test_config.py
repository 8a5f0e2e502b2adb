import importlib
import json
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from ant_jax import builders, config_file, evaluate, experiment, train
from ant_jax import config as config_lib
from ant_jax import workdir as workdir_lib
from ant_jax.init_from import initial_params
from ant_jax.latents import dataset
from configs import digits

CONFIGS = sorted(
    path.stem for path in Path(digits.__file__).parent.glob("*.py") if path.stem != "__init__"
)


OWN_PLACES = (
    ("data", "dir"),
    ("autoencoder", "latents"),
    ("autoencoder", "weights"),
    ("evaluation", "inception"),
)


def changed(argument="nash", **settings):
    """The default config with some settings changed; names have __ for the dot."""
    config = digits.get_config(argument).unlock()
    for name, value in settings.items():
        group, _, leaf = name.rpartition("__")
        node = config[group] if group else config
        # Past ml_collections, which would convert the value or refuse its type.
        node._fields[leaf] = value
    return config


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
    pieces = experiment.build(config, channels=1, num_classes=10)
    state = jax.eval_shape(lambda: experiment.new_state(config, pieces))
    batch = {
        "image": jax.ShapeDtypeStruct((config.data.batch_size, 8, 8, 1), np.uint8),
        "label": jax.ShapeDtypeStruct((config.data.batch_size,), np.int32),
    }
    after, metrics = jax.eval_shape(experiment.training_step(config, pieces), state, batch)
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert shapes(after) == shapes(state)
    assert metrics["cluster_losses"].shape == metrics["weights"].shape == (config.clusters.k,)


@pytest.mark.parametrize("method", ["vanilla", "linear", "uncertainty", "pcgrad", "nash"])
@pytest.mark.parametrize("clusters", ["", ",snr", ",timestep"])
def test_the_argument_chooses_method_and_clusters(method, clusters):
    config = digits.get_config(method + clusters)
    config_lib.validate(config)
    assert config.method.name == method
    assert config.clusters.cost == (clusters[1:] or "snr")


def test_the_default_config_has_every_setting_and_explains_its_choices():
    assert config_lib.flatten(digits.get_config()).keys() == config_lib.RULES.keys()
    source = Path(digits.__file__).read_text()
    for name, rule in config_lib.RULES.items():
        if rule.allowed.startswith("one of '"):
            (line,) = re.findall(rf"^ .*\b{name.replace('.', '[.]')} = .*", source, re.M)
            comments = source[: source.index(line) + len(line)].splitlines()[-4:]
            for value in re.findall("'(.*?)'", rule.allowed):
                assert f'"{value}"' in " ".join(comments).partition("#")[2], (name, value)


BAD = {
    # clusters and weights
    "config.clusters.cost = 'gradient' needs config.clusters.affinity": {
        "clusters__cost": "gradient"
    },
    "config.clusters.only = 5 must be below config.clusters.k = 5": {"clusters__only": 5},
    "config.method.linear_weights must be '' or k numbers >= 0": {
        "method__linear_weights": "1,x,1,1,1"
    },
    "config.method.linear_weights = '1,1' needs": {
        "method__linear_weights": "1,1",
        "method__name": "linear",
    },
    "config.method.linear_weights = '1,1,1,1,1' needs": {"method__linear_weights": "1,1,1,1,1"},
    "config.method.share_weighted = True needs clusters": {
        "method__share_weighted": True,
        "method__name": "vanilla",
    },
    "config.method.cosines = True needs clusters": {"method__cosines": True, "clusters__only": 0},
    # an unknown name
    "unknown setting config.num_step; did you mean config.num_steps?": {"num_step": 1},
    "did you mean config.optimizer.learning_rate?": {"optimizer__learning_rat": 1.0},
    # a wrong type
    "config.num_steps must be an integer >= 1 and <= 2147483647, got '3'": {"num_steps": "3"},
    "config.num_steps must be an integer >= 1 and <= 2147483647, got True": {"num_steps": True},
    "config.num_steps must be an integer >= 1 and <= 2147483647, got 1.5": {"num_steps": 1.5},
    "config.ema_decay must be a number >= 0 and <= 1, got False": {"ema_decay": False},
    "config.optimizer.learning_rate must be a number > 0, got '3'": {
        "optimizer__learning_rate": "3"
    },
    "config.data.flip must be True or False, got 1": {"data__flip": 1},
    "config.data.name must be digits, folder, tfds:BUILDER, or your own": {"data__name": None},
    # out of range
    "config.num_steps must be an integer >= 1 and <= 2147483647, got 0": {"num_steps": 0},
    "config.seed must be an integer >= 0 and <= 1073741823, got -1": {"seed": -1},
    "config.optimizer.learning_rate must be a number > 0, got 0": {"optimizer__learning_rate": 0},
    "learning_rate must be a number > 0, got nan": {"optimizer__learning_rate": float("nan")},
    "config.label_dropout must be a number >= 0 and <= 1, got 1.1": {"label_dropout": 1.1},
    "config.model.patch must be one of 1, 2, 4, 8, got 3": {"model__patch": 3},
    "config.data.name must be digits, folder, tfds:BUILDER, or your own 'package.module": {
        "data__name": "mnist"
    },
    "config.method.name must be one of 'vanilla', 'linear', ": {"method__name": "nahs"},
    "config.clusters.cost must be one of 'snr', 'timestep'": {"clusters__cost": "uniform"},
    "config.diffusion.timesteps must be an integer >= 1 and <= 10000, got 200000": {
        "diffusion__timesteps": 200_000
    },
    # impossible together
    "config.data.exif = 'apply' needs config.data.name = 'folder'": {"data__exif": "apply"},
    "config.clusters.k = 9 must not exceed config.diffusion.timesteps = 8": {
        "clusters__k": 9,
        "diffusion__timesteps": 8,
        "sample__num_steps": 8,
    },
    "config.sample.num_steps = 50 must not exceed config.diffusion.timesteps = 49": {
        "diffusion__timesteps": 49
    },
    "config.model.channel_mult must be numbers > 0 and <= 64 as '(1, 2)', got ()": {
        "model__channel_mult": ()
    },
    "config.model.attention_factors must be integers >= 1 as '(2, 4)', got (2, 0)": {
        "model__attention_factors": (2, 0)
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
    "config.method.timesteps = 'uniform' with config.method.name = 'nash' needs config.method."
    "gradient_form = 'masked'": {"method__timesteps": "uniform"},
    "config.sample.spacing: num_steps = 300 must be below 1000 timesteps and divide them": {
        "sample__num_steps": 300,
        "sample__spacing": "ldm",
    },
    "config.sample.spacing: the sections of spacing '10,20' have 30 steps": {
        "sample__spacing": "10,20"
    },
    "config.sample.guidance = 2.0 needs config.model.conditional = True": {
        "sample__guidance": 2.0,
        "model__conditional": False,
    },
    "config.sample.guidance = 2.0 needs": {"sample__guidance": 2.0, "label_dropout": 0.0},
    "config.evaluation.features = 'digits' can't judge config.data.name = 'tfds:cifar10'": {
        "data__name": "tfds:cifar10"
    },
    "True and 0 < config.label_dropout < 1, which train": {
        "sample__guidance": 2.0,
        "label_dropout": 1,
    },
    "config.optimizer.weight_decay = 400.0 times config.optimizer.learning_rate = 0.003 must be": {
        "optimizer__weight_decay": 400.0
    },
    "config.method.linear_weights must be '' or k numbers >= 0 as '0.3,0.7', not all 0, got": {
        "method__name": "linear",
        "method__linear_weights": "0,0,0,0,0",
    },
    "config.ema_decay must be a number >= 0 and <= 1, got inf": {"ema_decay": float("inf")},
    "config.sample.guidance must be a number >= 0 and <= 1000, got inf": {
        "sample__guidance": float("inf")
    },
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_setting_is_named_with_what_is_allowed(message):
    with pytest.raises(config_lib.ConfigError, match=re.escape(message)):
        config_lib.validate(changed(**BAD[message]))


@pytest.mark.parametrize("name", config_lib.RULES)
def test_a_missing_setting_is_named(name):
    config = digits.get_config().unlock()
    group, _, leaf = name.rpartition(".")
    del (config[group] if group else config)[leaf]
    with pytest.raises(config_lib.ConfigError, match=f"missing setting config.{name}"):
        config_lib.validate(config)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("vanilla", {"method__timesteps": "uniform"}),
        ("uncertainty", {"method__timesteps": "uniform"}),
        ("nash", {"method__timesteps": "uniform", "method__gradient_form": "masked"}),
        ("nash", {"num_steps": 99}),
        ("nash", {"model__conditional": False}),
        ("nash", {"optimizer__learning_rate": 1, "ema_decay": 0, "label_dropout": 1}),
        ("nash", {"data__name": "tfds:cifar10", "evaluation__features": ""}),
    ],
)
def test_what_works_is_allowed(method, settings):
    config_lib.validate(changed(method, **settings))


def _reference(config):
    # Not Inception itself.
    config.evaluation.features = "digits"
    config.data.name = "digits"
    evaluate.judging(config, ["frechet"])


# How what a path setting names is opened.
OPENERS = {
    "data.dir": lambda config: dataset.open_images(config, ""),
    "autoencoder.weights": dataset.open_codec,
    "autoencoder.latents": lambda config: dataset.open_latents(config, ""),
    "init_from": lambda config: initial_params(config, None),
    "clusters.affinity": lambda config: builders.build_method(config, np.zeros(1000)),
    "evaluation.inception": evaluate.judging,
    "evaluation.reference": _reference,
    "evaluation.samples": lambda config: evaluate._of_file(config, Path()),
}


def test_every_path_has_an_opener():
    paths = [name for name, rule in config_lib.RULES.items() if rule is config_lib._PATH]
    assert list(OPENERS) == paths


@pytest.mark.parametrize("name", OPENERS)
def test_a_tilde_is_the_home_in_every_path(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("file", "_/latents.json"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(b"neither weights nor images")
    settings = {
        "data__name": "folder",
        "autoencoder__name": "KL-f4-small",
        "clusters__cost": "gradient",
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
    with pytest.raises(config_lib.ConfigError, match=f"config.{name} must be a path, .* got "):
        config_lib.validate(changed(**{name.replace(".", "__"): path}))


CONFIG_FILES = {
    "there is no such file; did you mean {folder}/config.py?": ("confg.py", None),
    "it is a folder": ("", None),
    "SyntaxError: invalid syntax (config.py, line 2)": ("config.py", "x = 1\n1 +"),
    "line 2: ModuleNotFoundError: No module named 'nothing'": ("config.py", "\nimport nothing"),
    "it has no function get_config": ("config.py", "get_config = 3"),
    "line 2: KeyError: 'boom'": ("config.py", "def get_config():\n  raise KeyError('boom')"),
    "TypeError: get_config() takes 0 positional arguments but 1 was given": (
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
    assert (config.method.name, config.clusters.cost) == ("pcgrad", "timestep")


def test_a_tilde_is_the_home_in_the_name_of_a_config(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text("from configs.digits import get_config")
    assert config_file.read("~/mine.py:linear").method.name == "linear"


SURPRISES = {
    "config.diffusion.clip_x0 = True clips latents": {
        "autoencoder__name": "KL-f8",
        "autoencoder__latents": "latents",
    },
    "config.sample.eta = 0.5 is of 'ddim', and config.sample.sampler = 'ddpm'": {
        "sample__eta": 0.5,
        "sample__sampler": "ddpm",
    },
    "config.optimizer.warmup_steps = 100 is as long as config.num_steps = 100: the learning": {
        "num_steps": 100
    },
    "config.checkpoint.keep_period = 700 is no multiple of config.checkpoint.every = 500": {
        "checkpoint__keep_period": 700
    },
    "config.method.nash_update_every = 3000 is as long as": {"method__nash_update_every": 3000},
    "config.label_dropout = 1 leaves no label": {"label_dropout": 1},
    "config.profile_steps = 2 begins at step 10, and config.num_steps = 9": {
        "profile_steps": 2,
        "num_steps": 9,
        "optimizer__warmup_steps": 0,
    },
    "config.autoencoder.latents = 'latents' is not used: config.autoencoder.name = ''": {
        "autoencoder__latents": "latents"
    },
    "config.clusters.affinity = 'a.npz' is not used: config.clusters.cost = 'snr'": {
        "clusters__affinity": "a.npz"
    },
}


@pytest.mark.parametrize("words", SURPRISES)
def test_what_surprises_is_said_once(words):
    (line,) = config_lib.surprises(changed(**SURPRISES[words]), training=True)
    assert line.startswith(words)
    drawing = any(word in words for word in ("clip_x0", "sample."))
    assert len(config_lib.surprises(changed(**SURPRISES[words]), training=False)) == drawing


@pytest.mark.parametrize("name", CONFIGS)
def test_no_config_file_surprises(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    assert config_lib.surprises(config, training=True) == []


UNJUDGEABLE = {
    "config.evaluation.split = 'validation': config.data.name = 'digits', split = 'validation'": {
        "evaluation__split": "validation"
    },
    "config.evaluation.features = 'inception' needs the path of the weights: pt_inception": {
        "evaluation__features": "inception"
    },
    "config.evaluation.features = 'inception' finds no weights: there is no such file as '~/": {
        "evaluation__features": "inception",
        "evaluation__inception": "~/none",
    },
    "config.evaluation.features = 'digits' judges grey images of 8x8 pixels": {
        "data__image_size": 16
    },
}


@pytest.mark.parametrize("words", UNJUDGEABLE)
def test_what_evaluation_will_refuse_is_said_before_training(words, caplog, tmp_path):
    config = changed(**UNJUDGEABLE[words])
    with pytest.raises(config_lib.ConfigError, match=re.escape(words)):
        evaluate.evaluate(config, tmp_path / "no run")
    train._look_ahead(config)
    assert f"--mode evaluate will refuse this: {words}" in caplog.text
    caplog.clear()
    train._look_ahead(changed(evaluation__features="", evaluation__split=""))
    train._look_ahead(changed())
    assert not caplog.text


HOSTILE = [
    *(None, True, [1], {}, b"1", "", "3", "0,0", "nan", "~", "a\0b", "(", "\udc80", "x" * 9999),
    *(-1, 0, 1, 2, 3, 7, 1000, 2**31, 2**32, 2**63, 2**64, 10**400),
    *(-0.0, 0.5, 1.5, 1e-300, 1e39, 1e308, float("nan"), float("inf"), -float("inf")),
    *((), (1,), (0, 1), (1, 2), (2**63,), (True,), ("1",), (float("nan"), 1), (1,) * 99),
    *(np.int64(3), np.float32(0.5), np.float64(0.5), np.bool_(True), np.str_("dit")),
]


@pytest.mark.parametrize("name", config_lib.RULES)
def test_any_value_is_refused_by_name_or_recorded_as_it_is(name):
    # Few timesteps, so that clusters are found at once.
    config = changed(diffusion__timesteps=20, sample__num_steps=10)
    group, _, leaf = name.rpartition(".")
    for value in HOSTILE:
        (config[group] if group else config)._fields[leaf] = value
        try:
            config_lib.validate(config)
            loaded = config_lib.from_json(json.loads(json.dumps(config.to_dict())))
            assert loaded == config
            config_lib.validate(loaded)
            config_lib.surprises(config, training=True)
            if not (config.autoencoder.name or config.clusters.cost == "gradient"):
                pieces = experiment.build(config, 1, 10)
                experiment.check_batch(config, pieces.method)
        except config_lib.ConfigError as error:
            # Perhaps by what it does not fit.
            assert "config." in str(error) and "\n" not in str(error)


FREE = {
    "log_every": 7,
    "tensorboard": False,
    "profile_steps": 3,
    "checkpoint__keep": 5,
    "sample__guidance": 2.0,
    "evaluation__features": "",
    "data__num_workers": 2,
    "data__dir": "/elsewhere",
    "autoencoder__weights": "/elsewhere/vae.pt",
    "model__remat": "blocks",
    "model__attention": "cudnn",
    "num_steps": 5000,
}
FIXED = {
    "seed": 1,
    "data__batch_size": 250,
    "data__name": "tfds:mnist",
    "model__width": 32,
    "clusters__k": 4,
    "method__name": "linear",
    "optimizer__learning_rate": 0.1,
    "ema_decay": 0.9,
    "diffusion__timesteps": 100,
    "model__channel_mult": (1, 1),
    "model__attention_factors": (1, 2),
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
    settings = {"optimizer__schedule": "cosine"}
    with pytest.raises(config_lib.ConfigError, match=r"config.num_steps: 3000 there, 5000 now"):
        config_lib.check_same(changed(**settings), changed(**settings, num_steps=5000), "w")


def test_settings_that_only_one_of_them_has_differ():
    with pytest.raises(config_lib.ConfigError, match=r"config.new: 'not set' there, 1 now"):
        config_lib.check_same(changed(), changed(new=1), "w")


def test_a_workdir_describes_itself(tmp_path):
    assert workdir_lib.load_config(tmp_path) is None
    config = digits.get_config()
    workdir_lib.save_config(config, tmp_path / "run")
    loaded = workdir_lib.load_config(tmp_path / "run")
    assert loaded == config
    assert loaded.model.channel_mult == (1, 2)
    config_lib.validate(loaded)
    config_lib.check_same(loaded, config, tmp_path)


def test_a_run_of_an_older_version_goes_on_as_it_began():
    """A setting that is newer than this file needs a line in `config.BEFORE`."""
    settings = json.loads((Path(__file__).parent / "data" / "config.json").read_text())
    read = config_lib.from_json(settings)
    config_lib.validate(read)
    config_lib.check_same(read, digits.get_config(), "w")
    # What is there is left as it is.
    settings["data"]["exif"] = "apply"
    assert config_lib.from_json(settings).data.exif == "apply"


MISFITS = {
    "config.model: width must be a multiple of heads (5)": {"model__heads": 5},
    "config.data.image_size = 10 gives the network sides of 10, which must be divisible by 4": {
        "data__image_size": 10
    },
    "config.data.image_size = 10 gives the network sides of 10, which must be divisible by 8": {
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
    "config.sample.guidance_channels = 5 must not exceed the 1 channels": {
        "sample__guidance_channels": 5
    },
    "config.data.batch_size = 120 images of 100000x100000x1 take": {"data__image_size": 100_000},
    "config.sample.batch_size = 100000000000 images of 8x8x1 take": {"sample__batch_size": 10**11},
    "config.diffusion: P2(k=1e+30, gamma=5.0) has no weight that float32 can hold": {
        "diffusion__loss_weight": "p2",
        "diffusion__p2_k": 1e30,
        "diffusion__p2_gamma": 5.0,
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
