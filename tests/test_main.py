import importlib.util
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import forked
import numpy as np
import pytest
import yaml
from PIL import Image

import ant_jax
from ant_jax import cli, evaluate, interop, sample
from ant_jax import workdir as workdir_lib
from ant_jax.config import file as config_file
from configs import digits
from experiments import presets

ROOT = Path(__file__).parents[1]
# Of the train step the same as the smallest preset's, which another test may have compiled.
SMALL = presets.PRESETS["smoke"].settings | {
    "num_steps": 14,
    "log_every": 7,
    "log_to": (),
    "checkpoint.every": 5,
    "sample.every": 10,
    "sampler.num_steps": 2,
    "sample.num": 23,
    "sample.batch_size": 16,
}


# The last of equal flags counts.
ONE_DEVICE = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=1"


def program(*command, **settings):
    """Runs Python as a user does, on one device."""
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": ONE_DEVICE},
        capture_output=True,
        text=True,
        timeout=200,
        **settings,
    )


def each_of(lines):
    """The exit status and the words of the program with each of these arguments."""
    return forked.run([["-m", "ant_jax.main", *each] for each in lines], devices=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("main") / "run"
    settings = [f"--config.{name}={value}" for name, value in SMALL.items()]
    return workdir, program(
        *("-m", "ant_jax.main"),
        "--config=configs/digits.py:nash",
        f"--workdir={workdir}",
        "--config.sampler.eta=1",
        *settings,
    )


MODES = {
    "sample": ["--step=10", "--config.sample.num=19"],
    "evaluate": [],
    "export": [],
    "report": [],
}


@pytest.fixture(scope="module")
def modes(trained):
    """The workdir after the other modes, and for each its exit status and standard error."""
    workdir, _ = trained
    lines = [[f"--workdir={workdir}", f"--mode={mode}", *more] for mode, more in MODES.items()]
    return workdir, dict(zip(MODES, each_of(lines), strict=True))


def test_training_reports_and_leaves_a_workdir_that_describes_itself(trained):
    workdir, result = trained
    assert result.returncode == 0, result.stderr
    for step in (7, 14):
        line = rf"step +{step}/14  loss \d+\.\d+  [\d.]+ steps/s  \d+ examples/s  ETA \d+s\n"
        assert re.search(line, result.stderr), result.stderr
    assert "nash; clusters by snr: t = 0.." in result.stderr
    assert "Traceback" not in result.stderr

    config = json.loads((workdir / "config.json").read_text())
    assert config["method"]["name"] == "nash"
    assert config["num_steps"] == 14 and config["sampler"]["eta"] == 1.0
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [7, 14]
    assert len(rows[0]["weights"]) == len(rows[0]["cluster_losses"]) == 2
    assert {"loss", "grad_norm", "smallest_cosine", "steps_per_second"} < rows[0].keys()
    assert sorted(os.listdir(workdir / "checkpoints")) == ["10", "14"]
    assert sorted(os.listdir(workdir / "samples")) == ["00000010.png", "00000014.png"]
    assert Image.open(workdir / "samples" / "00000014.png").size == (342, 104)


def test_a_workdir_is_sampled_without_naming_its_config(modes):
    workdir, ended = modes
    status, said = ended["sample"]
    assert status == 0, said
    with np.load(workdir / "samples" / "00000010.npz") as stored:
        assert stored["arr_0"].shape == (19, 8, 8, 1)
        assert stored["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(stored["arr_1"], np.arange(19) % 10)
    assert str(workdir / "samples" / "00000010.npz") in said


def test_a_workdir_is_evaluated(modes):
    workdir, ended = modes
    status, said = ended["evaluate"]
    assert status == 0, said
    values = json.loads((workdir / "evaluation" / "00000014.json").read_text())
    assert values["step"] == 14
    assert values["frechet_distance"] > values["real_frechet_distance"] > 0
    assert f"{values['frechet_distance']:.4f}" in said
    assert re.search(r"^frechet_distance +\d", said, re.M)


def test_a_workdir_is_reported_where_plotly_is_installed(modes):
    workdir, ended = modes
    status, said = ended["report"]
    if importlib.util.find_spec("plotly") is None:
        wrong = f"error: plotly is not installed: pip install -e '{ROOT}[report]'"
        assert status == 1 and said.splitlines()[-1].startswith(wrong)
        return
    assert status == 0, said
    assert said.splitlines()[-1] == f"report: {workdir / 'report.html'}"
    assert (workdir / "report.html").stat().st_size > 4e6


def test_a_workdir_s_weights_are_exported_with_their_figures(modes):
    workdir, ended = modes
    status, said = ended["export"]
    assert status == 0, said
    folder = workdir / "weights" / "00000014"
    state = interop.read_state(folder / "model.safetensors")
    assert state["blocks.0.attn.qkv.weight"].shape == (24, 8)
    _, front, card = (folder / "README.md").read_text().split("---\n", 2)
    figures = json.loads((workdir / "evaluation" / "00000014.json").read_text())
    (entry,) = yaml.safe_load(front)["model-index"]
    stated = {each["type"]: each["value"] for each in entry["results"][0]["metrics"]}
    assert stated == {name: figures[name] for name in stated}
    assert {"frechet_distance", "validation_loss"} < stated.keys()
    explained = Path("docs/metrics.md").read_text()
    assert {name for name in figures if f"`{name}`" not in explained} == {"made_from"}
    assert f"| frechet_distance | {figures['frechet_distance']:.6g} |" in card
    assert f"| nfe | {figures['nfe']} |" in card
    assert "| classes | 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 |" in card
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    config = json.loads((folder / "config.json").read_text())
    rate = f"learning rate {config['optimizer']['learning_rate']:g}"
    assert f"| optimizer | adamw, {rate}, warm-up " in card
    assert f"| loss | {last['loss']:.4g} at step 14 |" in card
    assert f"| {last['cluster_losses'][1]:.4g} | {last['weights'][1]:.4g} |" in card
    picture = (workdir / "evaluation" / "00000014.png").read_bytes()
    assert (folder / "samples.png").read_bytes() == picture
    assert str(workdir) not in card + (folder / "config.json").read_text()


# Command lines by what is said of them; FOLDER is an empty one.
MISTAKES = {
    "did you mean": ["--config.num_step=3"],
    "unknown setting config.optimizer.qq; did you mean config.optimizer.": [
        "--config.optimizer.qq=x"
    ],
    "unknown setting config.num_steps.x; did you mean config.num_steps?": [
        "--config.num_steps.x=3"
    ],
    "config.clusters.affinity; it belongs to config.clusters.name = 'gradient': --config.": [
        "--config=configs/digits.py",
        "--config.clusters.affinity=x.npz",
    ],
    "config.model.num_res_blocks; it belongs to config.model.name = 'unet'": [
        "--config.model.num_res_blocks=3"
    ],
    "config.loss_weight.gamma; it belongs to config.loss_weight.name = 'min_snr' or 'p2'": [
        "--config.loss_weight.gamma=3"
    ],
    "config.method.nash_max_norm; it is config.method.max_norm now": [
        "--config.method.nash_max_norm=3"
    ],
    "config.model is a group of settings: write --config.model.name=unet": ["--config.model=unet"],
    "config.evaluation is a group of settings: write --config.evaluation.features=digits": [
        "--config.evaluation=digits"
    ],
    "config.sample is a group of settings: write --config.sample.SETTING=VALUE": [
        "--config.sample=3"
    ],
    "--config: Could not parse ''": ["--config.=3"],
    "config.num_steps must be an integer >= 1, got '1.5'": ["--config.num_steps=1.5"],
    "config.num_steps must be an integer >= 1, got 'ten'": ["--config.num_steps", "ten"],
    "config.data.flip must be True or False, got 'maybe'": ["--config.data.flip=maybe"],
    "unknown flag --nonsense; --help lists the flags": ["--nonsense=3"],
    "unknown flag --workdr; did you mean --workdir?": ["--workdr=x"],
    "unknown flag --num_steps; write --config.num_steps=300": ["--num_steps", "300"],
    "unknown flag --width; write --config.model.width=8": ["--width=8"],
    "unknown flag --method; write --config.method.name=vanilla": ["--method=vanilla"],
    "unknown flag --ema_decays; did you mean --config.ema_decay?": ["--ema_decays=0"],
    "got 'ddpm'; its name here is 'gaussian'": ["--config.process.name=ddpm"],
    "got 'heun'; 'heun' is a config.sampler.name": ["--config.process.name=heun"],
    "a config cannot name ant_jax.mtl.graddrop: it is an aggregator for your own training loop, "
    "see docs/methods.md": ["--config.method.name=graddrop"],
    "--distributed finds no other processes, because this is neither a Cloud TPU slice nor a SLURM "
    "job: give --coordinator, --num_processes and --process_id instead": ["--distributed"],
    "config.num_steps must be an integer >= 1, got 0": ["--config.num_steps=0"],
    "error: --mode encode needs config.autoencoder.name": ["--mode=encode"],
    "--config=configs/digit.py: there is no such file; did you mean configs/digits.py?": [
        "--config=configs/digit.py"
    ],
    "--config=configs: it is a folder": ["--config=configs"],
    "--config=digit: there is no such file; did you mean configs/digits.py?": ["--config=digit"],
    "unknown argument 'mine.py:nash': write --config=mine.py:nash": ["mine.py:nash"],
    "unknown argument 'sample': write --mode=sample": ["sample"],
    "unknown argument 'x': write settings as --config.NAME=VALUE": ["x"],
    "names, all in docs/settings.md, or your own 'package.module:attribute', got 'nahs'; did": [
        "--config=configs/digits.py:nahs"
    ],
    "--mode=fly: value should be one of <train|sample": ["--mode=fly"],
    "--step=ten: it must be the step of a checkpoint, or 'best'": ["--mode=sample", "--step=ten"],
    "--step=-1: it must be the step": ["--mode=sample", "--step=-1"],
    "step=10: it is for --mode sample, evaluate and export": ["--step=10"],
    "layout=diffusers: it is for --mode export": ["--layout=diffusers"],
    "--workdir=: it is empty": ["--workdir="],
    "--workdir=FOLDER/a/b: FOLDER/a is not a folder": ["--workdir=FOLDER/a/b"],
    "~nobody-of-that-name/x: Could not determine home": ["--workdir=~nobody-of-that-name/x"],
    "--num_processes=0: 0 is not a positive integer": ["--num_processes=0"],
    "--process_id=-1: -1 is not a non-negative integer": ["--process_id=-1"],
    "misspelt.py: line 3: unknown setting config.model.widht; did you mean config.model.width?": [
        "--config=FOLDER/misspelt.py"
    ],
    "--config=FOLDER/misspelt.py:nash: its get_config takes no argument: write --config=FOLDER": [
        "--config=FOLDER/misspelt.py:nash"
    ],
    "the run in FOLDER/own: config.model.name 'not_here:Net' can't be imported: No module named "
    "'not_here'; run in its folder, or add that to PYTHONPATH": [
        "--workdir=FOLDER/own",
        "--mode=sample",
    ],
    # The run there has 1, as an integer.
    "config.optimizer.learning_rate: 1 there, 0.5 now": [
        "--workdir=FOLDER/run",
        "--mode=sample",
        "--config.optimizer.learning_rate=0.5",
    ],
}


MISSPELT = """from configs import digits
def get_config():
    config = digits.get_config(); config.model.widht = 3
    return config
"""


@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
    """What the program says of each mistake, and how it ends."""
    folder = tmp_path_factory.mktemp("workdir")
    (folder / "a").touch()
    config = digits.get_config()
    config.optimizer._fields["learning_rate"] = 1
    workdir_lib.save_config(config, folder / "run")
    own = digits.get_config()
    own.model._fields["name"] = "not_here:Net"
    workdir_lib.save_config(own, folder / "own")
    (folder / "misspelt.py").write_text(MISSPELT)
    # Python compiles the config file that it reads.
    content = lambda: {path for path in folder.rglob("*") if "__pycache__" not in path.parts}
    before = content()
    lines = [
        [each.replace("FOLDER", str(folder)) for each in with_workdir(arguments)]
        for arguments in MISTAKES.values()
    ]
    ended = each_of(lines)
    assert content() == before
    return {
        message: (status, text.replace(str(folder), "FOLDER"))
        for message, (status, text) in zip(MISTAKES, ended, strict=True)
    }


def with_workdir(arguments):
    given = any(each.startswith("--workdir") for each in arguments)
    return arguments if given else ["--workdir=FOLDER", *arguments]


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_is_one_clear_line(message, refusals):
    status, said = refusals[message]
    assert status == 1
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if message.lower() in line.lower()]
    assert len(line) < 300
    before, error, _ = said.rpartition("error: ")
    assert error and message.lower() in said[len(before) :].lower()
    assert len(said.splitlines()) <= 5


def test_the_console_command_is_the_same_program(tmp_path):
    script = tmp_path / "ant-jax"
    script.write_text("from ant_jax.command import run\nrun()")
    lines = ["--help"], ["--config=digit"], ["report"], ["--version"]
    ended = forked.run([[script, *each] for each in lines], 1)
    (_, helped), (_, refused), (_, reported), version = ended
    assert version == (0, f"ant-jax {ant_jax.__version__}\n")
    assert helped.startswith("Trains, samples, ") and "--workdir:" in helped
    assert "configs/folder64.py" in helped
    assert "did you mean configs/digits.py?" in refused
    assert "give the workdir of a run" in reported


NAMES = {
    "digits-nash-snr-0": ["--config.optimizer.learning_rate=0.003", "--config.num_steps=5"],
    "digits-nash-snr-3-learning_rate=0.01": [
        *("--config.seed=3", "--config.optimizer.learning_rate=0.01", "--config.log_every=5")
    ],
    "digits-nash-snr-0-num_steps=50-schedule=cosine": [
        *("--config.schedule.name=cosine", "--config.num_steps=50")
    ],
    "fashion-14-nash-snr-0": ["--config=configs/fashion.py:nash,snr,14"],
    "digits-nash-snr-0-data.batch_size=10-model=unet-model.width=32-process.schedule=linear": [
        *("--config.model.name=unet", "--config.model.width=32", "--config.data.batch_size=10"),
        "--config.process.schedule=linear",
    ],
    "digits-nash-snr-0-init_from=old-best": ["--config.init_from=runs/old/best"],
    "digits-nash-snr-0-init_from=a-learning_rate=0.01": [
        "--config.init_from=runs/a-learning_rate=0.01"
    ],
    "digits-nash-snr-0-frozen=block_0%2Fqkv": ["--config.optimizer.frozen=block_0/qkv"],
    # 207 bytes.
    f"folder64-nash-snr-0-dir={'고양이' * 19}고-151cb009": [
        *("--config=configs/folder64.py", f"--config.data.dir=data/{'고양이' * 28}")
    ],
    "folder64-nash-snr-0-dir=cats": [
        *("--config=configs/folder64.py", "--config.data.dir=data/cats")
    ],
}


class Flags(dict):
    """The flags of a command line that have only a config."""

    def __init__(self, config):
        super().__init__(config=types.SimpleNamespace(value=config))
        self.config = config


def test_runs_that_differ_have_workdirs_that_differ(tmp_path):
    script = tmp_path / "name.py"
    script.write_text(
        "import sys\nfrom ant_jax import cli\n"
        "cli.define_config()\ncli.parse_flags(sys.argv)\nprint(cli.usable_workdir(None))"
    )
    ended = forked.run([[script, *line] for line in NAMES.values()], devices=1)
    assert ended == [(0, f"runs/{name}\n") for name in NAMES]


def test_a_run_by_its_former_name_is_found(tmp_path, monkeypatch):
    config = digits.get_config("nash,snr")
    config.optimizer.learning_rate = 0.01
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.flags, "FLAGS", Flags(config))
    monkeypatch.setattr(cli.config_flags, "get_config_filename", lambda flag: config_file.DEFAULT)
    changes = {"optimizer.learning_rate": 0.01}
    monkeypatch.setattr(cli.config_flags, "get_override_values", lambda flag: changes)
    short = Path("runs/digits-nash-snr-0-learning_rate=0.01")
    former = Path("runs/digits-nash-snr-0-optimizer.learning_rate=0.01")
    assert cli.usable_workdir(None) == short
    former.mkdir(parents=True)
    assert cli.usable_workdir(None) == former
    short.mkdir()
    assert cli.usable_workdir(None) == short


def test_names_of_components_are_known_before_the_other_settings():
    line = ["main", "--config=x", "--config.model.name=unet", "-config.method.name", "nash", "--a"]
    line += [
        "--config.model.width=3",
        "--config.data.name=ant_jax.data:folder",
        "--workdir=config.no.name=1",
    ]
    names = cli.names_in([*line, "--config.model.name=dit"])
    assert names == {"model.name": "dit", "method.name": "nash", "data.name": "ant_jax.data:folder"}
    config = config_file.read(config_file.DEFAULT, names)
    assert (
        config.model.name == "dit"
        and config.data.name == "ant_jax.data:folder"
        and "dir" in config.data
    )
    assert config.num_steps == digits.get_config().num_steps


def test_a_workdir_s_components_are_known_whatever_its_name(tmp_path):
    workdir = str(tmp_path / "my runs/a --config b")
    config = digits.get_config()
    config.sampler.name = "heun"
    os.makedirs(workdir)
    workdir_lib.save_config(config, workdir)
    last = f"--workdir={workdir}"
    for given in (["-workdir", workdir], [last], ["--workdir=other", last]):
        found, names = cli._names_of_run(["main", *given, "--config.sampler.churn=40"])
        assert found == workdir and names["sampler.name"] == "heun"
        assert cli._names_of_run(["main", *given, "--config", "x"]) == (None, {})


@pytest.mark.parametrize("mode", [sample.sample, evaluate.evaluate])
def test_a_workdir_without_a_run_is_named(mode, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=f"no run in {tmp_path}: give its --workdir, or"):
        mode(digits.get_config(), tmp_path)
    assert os.listdir(tmp_path) == []
