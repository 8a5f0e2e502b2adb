import csv
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import forked
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import app
from absl.testing import flagsaver
from PIL import Image

from ant_jax import config as config_lib
from ant_jax import experiment, mtl, settings
from ant_jax import workdir as workdir_lib
from ant_jax.config import ConfigError
from ant_jax.tasks import affinity
from ant_jax.train_step import TrainState
from configs import digits
from experiments import (
    auxiliary_tasks,
    comparisons,
    dynamics,
    landscape,
    presets,
    process_affinity,
    report,
    runner,
    table,
    task_affinity,
    transfer_gap,
)

ROOT = Path(__file__).parents[1]
SMOKE = presets.PRESETS["smoke"]
K = SMOKE.settings["clusters.k"]
# The last of equal flags counts.
ONE_DEVICE = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=1"


# With a network that is quick to compile; the task affinity once more, of a run that is there.
_SEVERAL = """
import sys
sys.path.append({1!r})
import pytest, tiny_runs
from absl import app, flags
from experiments import {0}
table._TIMED_ROUNDS = 1
tiny_runs.use_small_model(pytest.MonkeyPatch())
def main(argv):
    for each in [{0}]:
        each.main(argv)
    flags.FLAGS.workdir = f"{{flags.FLAGS.out}}/runs/vanilla-snr-seed=0"
    task_affinity.main(argv)
app.run(main)
"""


@pytest.fixture
def command(tmp_path):
    """Runs an experiment as a user does, or several one after the other, which share their runs.

    Returns the exit status and the output.
    """

    def run(*arguments):
        names = [each for each in arguments if not each.startswith("--")]
        options = [each for each in arguments if each.startswith("--")]
        program = ["-m", f"experiments.{names[0]}"]
        if len(names) > 1:
            program = [tmp_path / "several.py"]
            program[0].write_text(_SEVERAL.format(", ".join(names), str(ROOT / "tests")))
        program += [f"--out={tmp_path / 'out'}", *options]
        ((status, said),) = forked.run([program], devices=1, seconds=300)
        return status, said

    return run


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def check_picture(path):
    width, height = Image.open(path).size
    assert width > 500 and height > 300
    assert len(np.unique(np.asarray(Image.open(path)))) > 50


def numbers(rows, name):
    values = np.array([float(row[name]) for row in rows])
    assert np.isfinite(values).all(), name
    return values


def test_every_experiment_at_its_smallest(command, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    # One after the other in one process, which saves compiling what they share.
    status, said = command(
        *("task_affinity", "transfer_gap", "table", "dynamics", "demo"), "--preset=smoke"
    )
    assert status == 0, said[-3000:]
    check_affinity(out / "task_affinity")
    check_affinity_of_a_workdir(out, said)
    check_gap(out / "transfer_gap")
    check_table(out / "table")
    check_dynamics(out / "dynamics")
    check_field(out, monkeypatch)
    check_picture(out / "demo.png")
    with_report = importlib.util.find_spec("plotly") is not None
    assert (out / "demo.html").exists() == with_report
    assert ("\nreport: " if with_report else "\nno report: plotly is not installed") in said
    assert (out / "demo.md").read_text().count("\n") == 2 + 2 * SMOKE.measurements
    # Nothing is left to do, and the plan says so.
    with flagsaver.as_parsed(preset="smoke", out=str(out), dry_run="true"):
        table.main(["table"])
    plan = capsys.readouterr().out
    assert "task affinity: 1 runs, 0 of them to do, 0 steps" in plan
    assert "learning rates: 6 runs, 0 of them to do, 0 steps" in plan
    assert "comparison: 4 runs, 0 of them to do, 0 steps" in plan


def check_affinity_of_a_workdir(out, said):
    """The file says what it was measured with."""
    workdir = out / "runs" / "vanilla-snr-seed=0"
    check_picture(workdir / "affinity.png")
    # Twice before.
    assert said.count("compile first") == 3
    made_from = affinity.made_from(workdir / "affinity.npz")
    assert made_from["model.width"] == 8 and made_from["data.name"] == "digits"


@pytest.mark.parametrize(
    "setting, value, said",
    [
        ("model.width", 64, ""),
        ("model.width", 16, "config.model.width: 64 there, 16 here"),
        ("process.schedule", "linear", "another noise process"),
    ],
)
def test_an_affinity_is_for_its_process_network_and_data(setting, value, said, tmp_path, caplog):
    config = digits.get_config("nash,gradient")
    config.clusters.affinity = str(tmp_path / "affinity.npz")
    with (tmp_path / "affinity.npz").open("wb") as file:
        log_snr = config_lib.build_process(config).log_snr(np.arange(1000))
        made_from = experiment.behind_affinity(config)
        affinity.save(file, np.eye(3), np.array([0, 500, 999]), 1000, log_snr, made_from)
    config_lib.update(config, {setting: value})
    if setting == "process.schedule":
        with pytest.raises(ConfigError, match=f"affinity.npz.* {said}"):
            experiment.build(config, 1, 10)
        return
    experiment.build(config, 1, 10)
    assert said in caplog.text and bool(said) == bool(caplog.text)


def test_the_affinity_of_a_config_trains_that_config(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("from configs.digits_flow import get_config")
    monkeypatch.setattr(task_affinity, "measure", lambda preset, out: (preset, out))
    monkeypatch.setattr(task_affinity, "write_report", lambda preset, out, found: made.append(out))
    made = []
    given = {"config": str(tmp_path / "mine.py"), "out": str(tmp_path)}
    # As if these had been parsed too.
    given |= {"preset": "digits", "dry_run": "false", "workdir": ""}
    with flagsaver.as_parsed(**given):
        task_affinity.main(["task_affinity"])
        preset = presets.PRESETS["smoke"]._replace(config=task_affinity._read, settings={})
        (run,) = task_affinity.plan(preset)
    assert run.config.process.name == "flow" and run.config.method.name == "vanilla"
    assert made == [tmp_path]


def check_field(out, monkeypatch):
    """The runs are those of the table before."""
    monkeypatch.setattr(runner.train, "train", lambda *_: pytest.fail("trained"))
    # It compiles each step, as in the table before.
    times = dict.fromkeys(("vanilla", "nash"), 1.0)
    monkeypatch.setattr(table, "time_steps", lambda *_: times)
    methods = [each for each in comparisons.field() if each.label in ("vanilla", "nash")]
    with flagsaver.as_parsed(preset="smoke", out=str(out), dry_run="false"):
        table.compare_tuned(SMOKE, out, methods, (3e-3, 6e-3), "field", table.draw_field)
    check_picture(out / "table" / "field.png")
    rows = read(out / "table" / "field.csv")
    assert {row["setting"] for row in rows} == {"vanilla", "nash"}


def test_any_number_of_panels_can_be_drawn(tmp_path):
    rows = [{"step": step, "frechet_distance": 1 / step} for step in (1, 2)]
    results = {"one": [{"rows": rows, "diverged": ""}]}
    for count in (1, 7):
        table.draw(results, {f"panel {i}": ["one"] for i in range(count)}, tmp_path / "a.png")
        check_picture(tmp_path / "a.png")
    of_processes = {f"{name}: vanilla": results["one"] for name in ("flow", "EDM")}
    table.draw_processes(of_processes, tmp_path / "b.png")
    check_picture(tmp_path / "b.png")


def test_the_field_has_every_method(tmp_path, capsys):
    with flagsaver.as_parsed(preset="field", out=str(tmp_path), dry_run="true"):
        table.main(["table"])
    count = len(settings.names_in(mtl, mtl.Weighting))
    assert f"comparison: {3 * count} runs" in capsys.readouterr().out
    assert "mgda" in {each.method for each in comparisons.field()}


def test_affinities_of_processes_are_compared_at_equal_log_snrs(tmp_path, capsys):
    with flagsaver.as_parsed(preset="digits", out=str(tmp_path), dry_run="true"):
        process_affinity.main(["process_affinity"])
    assert "vanilla training: 12 runs" in capsys.readouterr().out
    where = process_affinity.LOG_SNR
    for name in process_affinity.PROCESSES:
        run = process_affinity.runs_of(presets.PRESETS["digits"], name)[0]
        process = config_lib.build_process(run.config)
        found = process.log_snr(process.at_log_snr(where))
        np.testing.assert_allclose(found, where, atol=0.1)
    gap = np.abs(where[:, None] - where)
    falls = np.stack([np.exp(-gap), np.exp(-gap), np.exp(-gap) - 0.1])
    process_affinity.write_tables({"one": falls[:2], "other": falls[2:]}, tmp_path)
    lines = (tmp_path / "table.md").read_text().splitlines()
    cells = {line.split("|")[1].strip(): line.split("|")[2:] for line in lines if line}
    assert [float(cell) for cell in cells["one, two seeds"][:2]] == [0, 1]
    assert [float(cell) for cell in cells["one and other"][:2]] == [0.1, 1]
    assert float(cells["one"][0].split()[0]) == -1
    report.save_figure(
        process_affinity.draw({"one": falls[:2], "other": falls[2:]}), tmp_path / "a.png"
    )
    check_picture(tmp_path / "a.png")


def test_a_palette_makes_curves_smaller_and_looks_the_same(tmp_path):
    for palette in (False, True):
        figure, ax = report.plt.subplots()
        for i, colour in enumerate(report.plt.color_sequences["tab10"]):
            ax.plot([0, 1], [i, 9 - i], color=colour)
            ax.fill_between([0, 1], [i, 9 - i], [i + 2, 11 - i], color=colour, alpha=0.15)
        report.save_figure(figure, tmp_path / f"{palette}.png", palette)
    plain, small = (Image.open(tmp_path / f"{each}.png") for each in (False, True))
    off = np.abs(np.subtract(plain.convert("RGB"), small.convert("RGB"), dtype=float))
    assert off.mean() < 0.5 and np.percentile(off, 99) < 12
    size = lambda palette: (tmp_path / f"{palette}.png").stat().st_size
    assert size(True) < size(False) / 2


def test_all_processes_are_compared_alike(tmp_path, capsys):
    with flagsaver.as_parsed(preset="processes", out=str(tmp_path), dry_run="true"):
        table.main(["table"])
    assert "comparison: 105 runs" in capsys.readouterr().out
    compared = comparisons.processes()
    assert len({each.against for each in compared}) == 5
    for each in compared:
        config = presets.make_config(
            presets.PRESETS["digits"], each.method, each.clusters, 0, each.settings
        )
        sampler = config_lib.build(config, "sampler")
        assert sampler.calls(config.sampler.num_steps) in (49, 50)


def test_fashion_compares_three_processes_on_14x14(tmp_path, capsys):
    with flagsaver.as_parsed(preset="fashion", out=str(tmp_path), dry_run="true"):
        table.main(["table"])
    plan = capsys.readouterr().out
    assert "learning rates: 81 runs, 81 of them to do, 162000 steps" in plan
    assert "comparison: 27 runs, 27 of them to do, 108000 steps" in plan
    assert "in total on two CPU cores" in plan


def check_affinity(folder):
    check_picture(folder / "affinity.png")
    matrix = affinity.load(folder / "affinity.npz", 40)
    assert matrix.shape == (40, 40)
    np.testing.assert_allclose(matrix, matrix.T)
    rows = read(folder / "rank_correlation.csv")
    assert [int(row["seed"]) for row in rows] == list(SMOKE.seeds)
    assert (np.abs(numbers(rows, "log-SNR")) <= 1).all()
    # Even a network that has hardly trained has neighbours that agree.
    assert (numbers(rows, "timestep") < 0).all()
    assert {row["gap in"] for row in read(folder / "affinity_by_gap.csv")} == {
        "timestep",
        "log-SNR",
    }


def check_gap(folder):
    check_picture(folder / "transfer_gap.png")
    rows = read(folder / "transfer_gap.csv")
    assert {row["method"] for row in rows} == {"vanilla", "nash"}
    assert len(rows) == 2 * len(SMOKE.seeds) * K
    gap = numbers(rows, "multi-task distance") - numbers(rows, "mixed distance")
    np.testing.assert_allclose(numbers(rows, "gap"), gap, atol=1e-6)
    loss = numbers(rows, "multi-task loss") - numbers(rows, "specialist loss")
    np.testing.assert_allclose(numbers(rows, "loss gap"), loss, atol=1e-9)
    assert (gap != 0).any()
    assert "Positive means negative transfer" in (folder / "table.md").read_text()


def check_table(folder):
    check_picture(folder / "core.png")
    rows = read(folder / "core.csv")
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    assert settings == ["vanilla", "nash, snr", "nash, gradient", comparisons.FIXED]
    assert len(rows) == len(settings) * len(SMOKE.seeds) * SMOKE.measurements
    assert (numbers(rows, "frechet_distance") > 0).all()
    assert (numbers(rows, "validation_loss") > 0).all()
    chosen = json.loads((folder / "chosen.json").read_text())
    assert len(chosen["nash_weights"]) == K
    assert set(chosen["learning_rates"]) == {"vanilla", "nash, snr", comparisons.FIXED}
    tuned_as = dict(
        zip(settings, ["vanilla", "nash, snr", "nash, snr", comparisons.FIXED], strict=True)
    )
    for row in rows:
        rate = chosen["learning_rates"][tuned_as[row["setting"]]]
        config = json.loads((folder.parent / "runs" / row["run"] / "result.json").read_text())
        assert config["config"]["optimizer.learning_rate"] == rate
    lines = (folder / "core.md").read_text().splitlines()
    assert len([line for line in lines if line.startswith("| ")]) == 2 + len(settings)


def check_dynamics(folder):
    for name in ("vanilla", "nash"):
        check_picture(folder / f"{name}.png")
    rows = read(folder / "dynamics.csv")
    cosines = np.stack([numbers(rows, f"cosine {i} {i + 1}") for i in range(K - 1)])
    assert (np.abs(cosines) <= 1 + 1e-6).all()
    shares = numbers(rows, "conflict")
    assert ((shares >= 0) & (shares <= 1)).all()


def test_bad_arguments_fail_at_once(command, tmp_path):
    status, said = command("task_affinity", "--preset=digit")
    assert status and "error: --preset=digit: must be one of smoke, digits, imagenet64" in said
    status, said = command("task_affinity", "--dryrun")
    assert status and said.endswith("error: unknown flag --dryrun; did you mean --dry_run?\n")
    assert not (tmp_path / "out").exists()


def test_a_file_is_no_folder_for_the_output():
    with (
        flagsaver.as_parsed(preset="smoke", out=__file__),
        # Which ends the program with its message, as above.
        pytest.raises(app.UsageError, match=r"--out=.* is not a folder"),
    ):
        task_affinity.main(["task_affinity"])


@pytest.mark.parametrize(
    "flag, value", [("preset", "smoke"), ("dry_run", "true"), ("workers", "2")]
)
def test_a_command_without_presets_refuses_them(flag, value):
    with (
        flagsaver.as_parsed(**{flag: value}),
        pytest.raises(app.UsageError, match=f"this command has no --{flag}"),
    ):
        landscape.main(["landscape"])


def test_ctrl_c_is_quiet_from_the_first_import_on():
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.argv[0] = '-m'; import experiments; signal.raise_signal(signal.SIGINT)"
    )
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "", "")


def test_help_lists_the_flags(command):
    _, listed = command("landscape", "--help")
    assert "--out:" in listed and "--preset:" not in listed
    _, listed = command("dynamics", "--help")
    assert "dry_run:" in listed and "Size of the experiment: smoke, digits, " in listed


def test_a_tilde_is_the_home_in_the_name_of_the_output(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with flagsaver.as_parsed(preset="smoke", out="~/here"):
        assert runner.choose(["demo"], presets.PRESETS)[1] == tmp_path / "here"
    with (
        flagsaver.as_parsed(preset="smoke", out="~nobody-of-that-name/here"),
        pytest.raises(app.UsageError, match=r"--out=~nobody-of-that-name/here: "),
    ):
        runner.choose(["demo"], presets.PRESETS)


@pytest.mark.parametrize("preset", presets.PRESETS.values(), ids=presets.PRESETS)
def test_every_planned_config_is_valid(preset, tmp_path):
    preset = preset._replace(seeds=preset.seeds[:2])
    plans = [
        task_affinity.plan(preset),
        *transfer_gap.plan(preset),
        *dynamics.plan(preset).values(),
    ]
    settings = [*comparisons.core(tmp_path / "affinity.npz"), comparisons.fixed_setting(np.ones(5))]
    for setting in settings:
        plans += [comparisons.tuning_runs(preset, (1e-3, 1e-2), setting)]
        plans += [comparisons.runs_of(preset, setting, 1e-2)]
    plans += [
        comparisons.runs_of(preset, setting, None) for setting in comparisons.ablations(preset)
    ]
    runs = [run for plan in plans for run in plan]
    for run in runs:
        config_lib.validate(run.config)
        assert len(run.name) < 200 and "/" not in run.name
    # One name, one config: whoever shares a name shares the run.
    configs = {}
    for run in runs:
        config_lib.check_same(configs.setdefault(run.name, run.config), run.config, run.name)
    compared = {setting.label for setting in comparisons.ablations(preset)}
    assert {setting.against for setting in comparisons.ablations(preset)} <= compared


def result(values, step=100, **more):
    rows = [
        {"step": step * (i + 1), "frechet_distance": value, "validation_loss": 1.0}
        for i, value in enumerate(values)
    ]
    return {"name": "run", "diverged": "", "rows": rows} | more


def test_means_and_deviations_over_seeds():
    assert report.mean_and_deviation([1.0, 2.0, 3.0], 2) == "2.00 +- 1.00"
    assert report.mean_and_deviation([2.5], 1) == "2.5"


def test_steps_to_reach_a_distance_are_interpolated():
    group = [result([8.0, 2.0, 1.0]), result([4.0, 1.0, 0.5])]
    # 4 lies half way between 8 and 2 on a logarithmic scale; the second begins there.
    assert table._steps_to_reach(group, 4.0) == f"<= {(150 + 100) / 2:.0f}"
    assert table._steps_to_reach(group[:1], 4.0) == "150"
    assert table._steps_to_reach(group, 0.7) == "1 of 2 reach it"


def test_the_best_mean_over_seeds_chooses_the_learning_rate(tmp_path, monkeypatch):
    preset = SMOKE._replace(seeds=(0, 1, 2))
    distances = {
        ("vanilla", 3e-3): [4.0, 5.0, 6.0],
        ("vanilla", 6e-3): [1.0, 9.0, 8.0],  # the best seed, but not the best mean
        ("nash", 3e-3): [4.0, 5.0, 6.0],
        ("nash", 6e-3): [3.0, 2.0, 7.0],
    }

    def execute(runs, out, title=""):
        found = []
        for run in runs:
            assert run.config.seed >= comparisons.TUNING_SEED
            key = run.config.method.name, run.config.optimizer.learning_rate
            found.append(result([distances[key][run.config.seed - comparisons.TUNING_SEED]]))
        return found

    monkeypatch.setattr(table.runner, "execute", execute)
    settings = [each for each in comparisons.core(tmp_path) if each.label in table._SMOKE]
    chosen = table.choose_rates(preset, tmp_path, (3e-3, 6e-3), settings)
    # Gradient clusters take the rate of the SNR clusters.
    assert chosen == {"vanilla": 3e-3, "nash, snr": 6e-3}


def test_a_diverged_run_is_the_worst_of_a_grid_and_named_in_the_table(tmp_path, monkeypatch):
    diverged = result([], diverged="loss nan")
    assert table.quality(diverged) == np.inf
    monkeypatch.setattr(table, "_conflicts", lambda *_: "")
    results = {"vanilla": [result([2.0, 1.0])], "other": [diverged]}
    table.write_report(results, dict.fromkeys(results, "vanilla"), {}, tmp_path, "core")
    assert "| other   | diverged: run" in (tmp_path / "core.md").read_text()


@pytest.mark.parametrize(
    "more, told",
    [
        (
            {"group_frechet_distance": 3.0, "real_nearest_train_distance": 0.5},
            "(300): in groups 0.25, nearest 0.500, copies 0.010, label accuracy 0.980.",
        ),
        ({}, "(300): distance 0.25, label accuracy 0.980."),
    ],
)
def test_the_table_has_the_figures_of_real_images(more, told, tmp_path, monkeypatch):
    monkeypatch.setattr(table, "_conflicts", lambda *_: "")
    real = {"real_frechet_distance": 0.25, "classifier_test_accuracy": 0.98}
    measured = result([2.0])
    measured["rows"][0] |= real | more | {"real_num_samples": 300}
    table.write_report({"vanilla": [measured]}, {"vanilla": "vanilla"}, {}, tmp_path, "core")
    assert f"Held-out real images {told}" in (tmp_path / "core.md").read_text()


def test_groups_share_a_step_and_keep_every_worker_busy():
    runs = [runner.make_run(SMOKE, "vanilla", "snr", seed) for seed in range(4)]
    runs += [runner.make_run(SMOKE, "nash", "snr", seed) for seed in range(2)]
    names = lambda groups: [{run.name for run in group} for group in groups]
    assert names(runner._groups(runs, 1)) == [
        {run.name for run in runs[:4]},
        {run.name for run in runs[4:]},
    ]
    # Among two workers there are about six setup, of one step each.
    more = [runner.make_run(SMOKE, "vanilla", "snr", seed) for seed in range(12)]
    split = runner._groups(more, 2)
    assert list(map(len, split)) == [2] * 6
    assert set.union(*names(split)) == {run.name for run in more}


@pytest.mark.parametrize(
    "count, shares", [(2, [[3, 4, 5], [6, 7, 8, 9]]), (7, [[i] for i in range(3, 10)])]
)
def test_workers_share_the_cores(count, shares):
    assert runner._shares(list(range(3, 10)), count) == shares
    # More workers than cores.
    assert runner._shares([3], count) == [[3]] * count


@pytest.mark.parametrize("workers, said", [(None, None), ("1", None), ("2", "false")])
def test_runs_that_share_a_gpu_do_not_reserve_its_memory(workers, said, monkeypatch):
    name = "XLA_PYTHON_CLIENT_PREALLOCATE"
    # So that it is not set at the end either.
    monkeypatch.setenv(name, "")
    monkeypatch.delenv(name)
    monkeypatch.setattr(runner.app, "run", lambda main, flags_parser: main([]))
    found = []
    with flagsaver.as_parsed(**({"workers": workers} if workers else {"preset": "smoke"})):
        runner.start(lambda argv: found.append(os.environ.get(name)))
    assert found == [said]


def test_a_run_that_is_stopped_is_not_finished(tmp_path, monkeypatch):
    """Even one of which nothing is measured."""
    run = runner.make_run(SMOKE, "vanilla", "snr", 0, measurements=0)
    state = TrainState(np.int32(3), *[None] * 4)
    monkeypatch.setattr(runner.train, "train", lambda config, workdir: state)
    with pytest.raises(runner.Stopped, match="vanilla-snr-seed=0 stopped at step 3"):
        runner.execute([run], tmp_path)
    assert not (runner.folder(run, tmp_path) / "result.json").exists()


def test_a_run_that_diverges_at_once_is_a_result(tmp_path, monkeypatch):
    run = runner.make_run(SMOKE, "vanilla", "snr", 0)

    def diverge(config, workdir):
        workdir_lib.save_config(config, workdir)
        (workdir / "metrics.jsonl").touch()
        raise FloatingPointError("step 1: loss nan")

    monkeypatch.setattr(runner.train, "train", diverge)
    for _ in range(2):
        (found,) = runner.execute([run], tmp_path)
        assert found["diverged"] == "step 1: loss nan" and not found["rows"]
    with pytest.raises(RuntimeError, match="vanilla-snr-seed=0: step 1: loss nan"):
        runner.finished([run], tmp_path)


def test_the_result_of_an_earlier_version_is_kept(tmp_path, monkeypatch):
    """It lacks settings that are newer, and has others by their former names."""

    def train(config, workdir):
        raise FloatingPointError("trained")

    monkeypatch.setattr(runner.train, "train", train)
    run = runner.make_run(SMOKE, "vanilla", "snr", 0, measurements=0)
    workdir = runner.folder(run, tmp_path)
    workdir.mkdir(parents=True)
    before = runner.made_from(run)
    del before["optimizer.name"], before["optimizer.decay_mask"], before["optimizer.b1"]
    before["optimizer.schedule"] = before.pop("schedule.name")
    result = {"config": before, "rows": [], "diverged": ""}
    (workdir / "result.json").write_text(json.dumps(result))
    assert runner.execute([run], tmp_path) == [result]
    before["optimizer.schedule"] = "cosine"
    (workdir / "result.json").write_text(json.dumps(result))
    assert runner.execute([run], tmp_path)[0]["diverged"] == "trained"


@pytest.mark.parametrize("measurements, count", [(0, 0), (1, 1)])
def test_what_evaluations_share_is_made_before_the_first_run(
    measurements, count, tmp_path, monkeypatch
):
    made = []

    def stop(config, workdir):
        assert len(made) == count
        raise runner.Stopped

    monkeypatch.setattr(runner.measuring, "build", made.append)
    monkeypatch.setattr(runner.train, "train", stop)
    runs = [runner.make_run(SMOKE, "vanilla", "snr", seed, None, measurements) for seed in range(2)]
    with pytest.raises(runner.Stopped):
        runner.execute(runs, tmp_path)


def test_an_impossible_run_fails_before_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(runner.train, "train", lambda *_: pytest.fail("came too late"))
    good = runner.make_run(SMOKE, "vanilla", "snr", 0)
    bad = runner.make_run(SMOKE, "nash", "snr", 0, {"clusters.k": 7})
    with pytest.raises(
        ConfigError, match=r"run nash-snr-clusters.k=7-seed=0: .*must be divisible by .*7 tasks"
    ):
        runner.execute([good, bad], tmp_path)


def test_what_is_kept_is_made_anew_from_another_source(tmp_path):
    path = tmp_path / "folder" / "kept.json"
    made = iter(range(9))
    for source, value in (("a", 0), ("a", 0), ("b", 1), ("b", 1)):
        assert runner.kept(path, {"from": source, "steps": (1, 2)}, lambda: next(made)) == value


def test_runs_side_by_side_in_processes(tmp_path, monkeypatch):
    """What a large plan does on CPUs: pickled runs, a core each, and results measured anew."""
    monkeypatch.setattr(runner, "_WORTH_A_PROCESS", 0)
    core = min(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    monkeypatch.setattr(runner, "_cores", lambda: [core, core])
    monkeypatch.setenv("XLA_FLAGS", ONE_DEVICE)
    # The losses of all held-out images are the slowest here.
    kept = {name: each for name, each in SMOKE.settings.items() if "model." not in name}
    settings = kept | {"num_steps": 2, "evaluation.split": "", "model.name": "tiny_runs:Model"}
    preset = SMOKE._replace(settings=settings)
    runs = [runner.make_run(preset, "vanilla", "snr", seed, measurements=1) for seed in (0, 1)]
    first, second = runner.execute(runs, tmp_path)
    assert [row["step"] for row in first["rows"]] == [2]
    assert first["rows"] != second["rows"]
    # Other samples are measured again; nothing is trained again.
    saved = (runner.folder(runs[0], tmp_path) / "checkpoints" / "2").stat().st_mtime_ns
    monkeypatch.undo()
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    other = runs[0].config.copy_and_resolve_references()
    other.sample.seed = 5
    (again,) = runner.execute([runs[0]._replace(config=other)], tmp_path)
    assert again["rows"][0]["frechet_distance"] != first["rows"][0]["frechet_distance"]
    assert saved == (runner.folder(runs[0], tmp_path) / "checkpoints" / "2").stat().st_mtime_ns


def test_a_worker_that_was_asked_to_stop_begins_nothing_more(monkeypatch):
    monkeypatch.setattr(runner, "_asked", False)
    assert runner._call(abs, -1) == 1
    with pytest.raises(runner.Stopped, match="stopped on request"):
        runner._call(signal.raise_signal, signal.SIGTERM)
    with pytest.raises(runner.Stopped, match="asked to stop"):
        runner._call(abs, -1)


def test_a_run_that_fails_is_named(tmp_path, monkeypatch):
    run = runner.make_run(SMOKE, "vanilla", "snr", 0)

    def fail(config, workdir):
        raise OSError("No space left on device")

    monkeypatch.setattr(runner.train, "train", fail)
    with pytest.raises(OSError, match=r"run vanilla-snr-seed=0 in .*No space left on device"):
        runner.execute([run], tmp_path)


def test_the_landscape_draws_every_method_it_is_given(tmp_path, capsys):
    landscape.write(tmp_path, ["linear", "mgda"], steps=50)
    with Image.open(tmp_path / "landscape.png") as picture:
        assert picture.width > 400
    rows = read(tmp_path / "landscape.csv")
    assert [row["method"] for row in rows] == ["linear"] * 3 + ["mgda"] * 3
    assert "on the Pareto set" in capsys.readouterr().out


def test_the_gradients_of_the_landscape_are_opposed_on_the_pareto_set():
    point = jnp.array([0.0, landscape.PARETO_Y])
    first, second = np.asarray(jax.jit(jax.jacrev(landscape.task_losses))(point), float)
    cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
    assert cosine < -0.999
    assert (jax.jit(landscape.task_losses)(point) > 0).all()


AUXILIARY = auxiliary_tasks.Size(seeds=2, steps=2, labelled=20, held_out=10, others=20, batch=10)


def test_the_auxiliary_tasks_write_a_table_and_compute_nothing_twice(tmp_path, monkeypatch, capsys):
    def run(method, tasks, size):
        accuracy = np.random.default_rng(len(tasks)).random((3, size.seeds))
        if method is methods["slgrad"]:
            accuracy[1] = 1
        return {"validation": accuracy.tolist(), "test": accuracy.tolist(), "seconds": 1.0}

    methods = auxiliary_tasks.methods()
    assert methods.keys() >= {"vanilla", "upgrad", "graddrop", "rep_mtl"}
    compared = {name: methods[name] for name in ("linear", "slgrad")}
    monkeypatch.setattr(auxiliary_tasks, "run", run)
    auxiliary_tasks.write(tmp_path, compared, AUXILIARY)
    check_picture(tmp_path / "auxiliary_tasks.png")
    rows = read(tmp_path / "auxiliary_tasks.csv")
    assert [row["method"] for row in rows[::2]] == ["single task", "linear", "slgrad"] * 3
    assert {row["learning rate"] for row in rows if row["method"] == "slgrad"} == {"0.003"}
    table = capsys.readouterr().out
    assert "harmful: digit, random labels, noise" in table
    # The best is first.
    assert table.count("|\n| slgrad      | 100.0 ± 0.0 |") == 3
    monkeypatch.setattr(auxiliary_tasks, "run", lambda *_: pytest.fail("again"))
    auxiliary_tasks.write(tmp_path, compared, AUXILIARY)
    assert capsys.readouterr().out == table


def test_the_auxiliary_tasks_train_all_rates_and_seeds():
    method = auxiliary_tasks.methods()["slgrad"]
    found = auxiliary_tasks.run(method, auxiliary_tasks.GROUPS["all"], AUXILIARY)
    for part in ("validation", "test"):
        accuracy = np.array(found[part])
        assert accuracy.shape == (len(auxiliary_tasks.LEARNING_RATES), AUXILIARY.seeds)
        assert (accuracy > 0).all() and len(np.unique(accuracy)) > 1


def test_the_labelled_images_are_of_all_classes_and_the_others_have_no_label():
    data = auxiliary_tasks.data_of(0, AUXILIARY)
    examples, labels = data.examples, data.examples.targets["digit"]
    assert len(examples.images) == 40 and len(data.validation[1]) == 1497 - 40
    assert (np.bincount(labels[:20]) == 2).all() and (np.bincount(labels[10:20]) == 1).all()
    np.testing.assert_array_equal(examples.labelled, np.arange(40) < 20)
    for order, labelled in ((data.order, 20), (data.order_held_out, 10)):
        assert order.shape == (2, 20)
        assert (order[:, :10] < labelled).all() and (order[:, 10:] >= 20).all()
    params = jax.tree.map(lambda leaf: leaf[0], auxiliary_tasks.init_params(2))
    losses = jax.jit(
        lambda: auxiliary_tasks.example_losses(
            params, auxiliary_tasks.trunk(params, examples), examples, ("digit", "parity")
        )
    )()
    np.testing.assert_array_equal(losses > 0, [examples.labelled, np.ones(40, bool)])


def test_all_ways_to_a_gradient_of_the_auxiliary_tasks_agree():
    tasks = auxiliary_tasks.GROUPS["all"]
    params = jax.tree.map(lambda leaf: leaf[0], auxiliary_tasks.init_params(2))
    data = auxiliary_tasks.data_of(0, AUXILIARY)
    examples = jax.tree.map(lambda leaf: leaf[data.order[0]], data.examples)
    by = auxiliary_tasks.aggregated
    ways = [
        auxiliary_tasks.weighted(mtl.linear),
        by(lambda k: mtl.combine(mtl.linear(k))),
        by(lambda k: mtl.combine(mtl.linear(2 * k)), parts=2),
    ]

    @jax.jit
    def gradients(params, examples):
        started = [way.start(tasks, 0, params) for way in ways]
        return [gradient(params, examples, None, 0, state)[0] for state, gradient in started]

    first, *others = gradients(params, examples)
    for other in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), first, other)
