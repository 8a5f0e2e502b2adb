"""Evaluations during training, and the best checkpoint."""

import json
import os
import signal

import jax
import numpy as np
import pytest
from tiny_runs import STEPS, assert_same_state, lines, tiny

import ant_jax
from ant_jax import evaluate, experiment, export, hooks, init_from, measuring, sample
from ant_jax import train as trainer
from ant_jax.config import ConfigError
from ant_jax.evaluation import Metric
from ant_jax.report import runs
from ant_jax.runtime import checkpoint
from ant_jax.runtime.lock import InUseError
from ant_jax.sampling import cache
from experiments import runner

pytestmark = pytest.mark.usefixtures("small_model")
# What `scripted` measures, in turn.
SCRIPT = []
VALUES = [5.0, 3.0, 4.0]
AT = [3, 6, STEPS]


def scripted() -> Metric:
    def measure(samples, reference):
        return {"scripted": SCRIPT.pop(0), "loss": 99.0, "real_scripted": 1.0}

    return Metric(measure, lowest_is_best="scripted")


class Killed(Exception):
    pass


@pytest.fixture(autouse=True)
def script():
    SCRIPT[:] = VALUES


def evaluated(**settings):
    return tiny(
        **{
            "evaluation__every": 3,
            "evaluation__metrics": ("test_evaluation_in_training:scripted", "label_accuracy"),
            "checkpoint__keep": 1,
        }
        | settings
    )


def best_of(workdir):
    (step,) = checkpoint.checkpoint_steps(workdir / "best")
    return step, checkpoint.read_record(workdir / "best")["best"]["value"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, small_model):
    """A run that nothing has interrupted, and its last state."""
    SCRIPT[:] = VALUES
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, trainer.train(evaluated(), workdir)


def test_evaluations_change_nothing_but_the_log(whole, tmp_path):
    workdir, state = whole
    assert_same_state(trainer.train(tiny(), tmp_path), state)
    plain, rows = lines(tmp_path), lines(workdir)
    own = ("scripted", "label_accuracy", "validation_loss", "validation_cluster_losses")
    figures = [{name: row.pop(name) for name in own if name in row} for row in rows]
    assert rows == plain
    assert [row["step"] for row, found in zip(rows, figures, strict=True) if found] == AT
    for step, value in zip(AT, VALUES, strict=True):
        found = figures[step - 1]
        assert found["scripted"] == value and 0 <= found["label_accuracy"] <= 1
        assert len(found["validation_cluster_losses"]) == 2
        assert np.mean(found["validation_cluster_losses"]) == pytest.approx(
            found["validation_loss"], rel=0.5
        )
        said = json.loads((workdir / "evaluation" / f"{step:08d}.json").read_text())
        assert found.items() <= said.items() and said["num_samples"] == 11
    assert list((workdir / "drawn").iterdir()) == []


def test_the_figures_are_those_of_the_mode(whole):
    workdir, _ = whole
    path = workdir / "evaluation" / f"{STEPS:08d}.json"
    before = path.read_text()
    # As if a device that does not repeat every bit had found other parameters.
    params = json.loads(before)["made_from"]["params"]
    path.write_text(before.replace(params, "others"))
    SCRIPT[:] = VALUES[-1:]
    evaluate.evaluate(evaluated(), workdir)
    assert path.read_text() == before and len(list(path.parent.glob("*.json"))) == len(AT)


def test_experiments_measure_nothing_twice(whole, monkeypatch):
    workdir, _ = whole
    drawn = lambda config, *_: config.sample.seed
    monkeypatch.setattr(evaluate, "evaluate", drawn)
    kept = runner._figures(evaluated(), workdir, STEPS)
    assert kept["step"] == STEPS and kept["scripted"] == VALUES[-1]
    assert runner._figures(evaluated(sample__seed=7), workdir, STEPS) == 7
    assert runner._figures(evaluated(evaluation__split=""), workdir, STEPS) == 0


def test_the_best_is_kept_where_its_checkpoint_is_not(whole, tmp_path):
    workdir, _ = whole
    assert checkpoint.checkpoint_steps(workdir / "checkpoints") == [STEPS]
    assert best_of(workdir) == (6, 3.0)
    reported = runs.read(workdir)
    assert reported.best == (6, "scripted", 3.0)
    assert [each.has_best for each in reported.measured] == [True]
    at_six = trainer.train(tiny(num_steps=6), tmp_path)
    run = ant_jax.load_run(workdir, "best")
    assert run.step == 6 and ant_jax.load_run(workdir).step == STEPS
    assert_same_state(run.params, jax.device_get(at_six.ema_params))
    other = tiny(init_from=str(workdir / "best"))
    found = init_from.initial_params(other, experiment.build(other, 1, 10))
    assert_same_state(found, run.params)
    other.init_from = str(tmp_path / "best")
    with pytest.raises(ConfigError, match=f"no best checkpoint in {tmp_path}: training keeps one"):
        init_from.initial_params(other, experiment.build(other, 1, 10))
    np.testing.assert_array_equal(run.metrics["step"][~np.isnan(run.metrics["scripted"])], AT)
    assert sample.sample(evaluated(), workdir, "best").name == "00000006.npz"
    assert export.export(evaluated(), workdir, "best").name == "00000006"
    with pytest.raises(FileNotFoundError, match=f"no best checkpoint in {tmp_path}: training"):
        sample.sample(tiny(), tmp_path, "best")


def test_a_finished_run_neither_evaluates_nor_reports_again(whole, monkeypatch, caplog):
    workdir, state = whole
    monkeypatch.setattr(measuring, "build", lambda *_: pytest.fail("evaluates"))
    before = (workdir / "metrics.jsonl").read_bytes()
    with caplog.at_level("INFO", logger="absl"):
        again = trainer.train(evaluated(), workdir, callback=lambda *_: pytest.fail("reports"))
    assert_same_state(again, state)
    assert (workdir / "metrics.jsonl").read_bytes() == before
    assert "nothing is evaluated now: config.evaluation.every = 3 evaluates while" in caplog.text
    assert "is not as it was written" not in caplog.text


def test_a_run_that_goes_on_keeps_the_figures_of_its_last_step(tmp_path):
    """Step 4 is not due any more: it is no multiple of 3. A figure that is not finite is null."""
    figures = lambda: {row["step"]: row["scripted"] for row in lines(tmp_path) if "scripted" in row}
    SCRIPT[:] = [float("nan"), np.float32(2), 4.0]
    trainer.train(evaluated(num_steps=4), tmp_path)
    assert figures() == {3: None, 4: 2.0} and best_of(tmp_path) == (4, 2.0)
    trainer.train(evaluated(num_steps=6), tmp_path)
    assert figures() == {3: None, 4: 2.0, 6: 4.0}


# Where runs are killed, and how many values are left to measure. Step 3 has no checkpoint, step 6
# has one.
KILLS = [
    (hooks.Reports, "write", 2),
    (experiment, "draw_samples", 2),
    (hooks.Evaluations, "_keep", 1),
    (checkpoint.Checkpointer, "wait", 1),
    (hooks.Reports, "write", 1),
]


def test_kills_cost_neither_the_best_nor_a_line_nor_a_second_measurement(
    whole, tmp_path, monkeypatch
):
    for place, name, left in KILLS:
        original = getattr(place, name)

        def kill(*arguments, left=left, original=original):
            of_others = isinstance(arguments[0], checkpoint.Checkpointer) and (
                arguments[0].directory.name != "best"
            )
            if len(SCRIPT) == left and not of_others:
                raise Killed
            return original(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(place, name, kill)
            with pytest.raises(Killed):
                trainer.train(evaluated(), tmp_path)
    assert_same_state(trainer.train(evaluated(), tmp_path), whole[1])
    assert SCRIPT == [] and lines(tmp_path) == lines(whole[0])
    assert best_of(tmp_path) == best_of(whole[0])


def test_a_signal_ends_an_evaluation_and_the_next_start_goes_on_with_it(
    whole, tmp_path, monkeypatch, caplog
):
    draw, drawn = experiment.draw_samples, []

    def signalled(*arguments):
        for batch in draw(*arguments):
            drawn.append(len(batch[0]))
            if len(drawn) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(experiment, "draw_samples", signalled)
    assert int(trainer.train(evaluated(), tmp_path).step) == 3
    assert checkpoint.checkpoint_steps(tmp_path / "checkpoints") == [3]
    assert [row["step"] for row in lines(tmp_path)] == [1, 2]
    assert_same_state(trainer.train(evaluated(), tmp_path), whole[1])
    assert drawn == [8, 3] * 3 and lines(tmp_path) == lines(whole[0])


def test_what_cannot_be_evaluated_is_said_and_training_goes_on(tmp_path, monkeypatch, caplog):
    caplog.set_level("WARNING")
    real = experiment.draw_samples
    with monkeypatch.context() as patch:

        def draw(*arguments):
            yield next(real(*arguments))
            raise FloatingPointError("samples 8..10 are not finite")

        patch.setattr(experiment, "draw_samples", draw)
        state = trainer.train(evaluated(num_steps=3), tmp_path)
    assert int(state.step) == 3 and "no figures: step 3: samples 8.." in caplog.text
    assert list((tmp_path / "drawn").iterdir()) == []
    assert not {"scripted", "validation_loss"} & lines(tmp_path)[-1].keys()

    def locked(*_):
        raise InUseError("another job draws the same samples")

    monkeypatch.setattr(cache, "job_lock", locked)
    trainer.train(evaluated(num_steps=6), tmp_path)
    assert "no figures: another job draws" in caplog.text
    assert not (tmp_path / "best").exists()


IMPOSSIBLE = {
    "every = 3 evaluates during training: there is nothing to measure by: set": {
        "evaluation__features": "",
        "evaluation__split": "",
    },
    "every = 3 evaluates .* 'inception' .*weights.*or set config.evaluation.every to 0": {
        "evaluation__features": "inception"
    },
    "every = 3 draws samples from the run: set config.evaluation.samples = ''": {
        "evaluation__samples": "some.npz"
    },
    "num_in_training = 1: metrics need 2 samples": {"evaluation__num_in_training": 1},
    "every = 3 evaluates .*split = .validation.: .*: digits has no split .validation.": {
        "evaluation__split": "validation"
    },
}


@pytest.mark.parametrize("message", IMPOSSIBLE)
def test_an_evaluation_that_cannot_work_is_refused_before_the_first_step(message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        trainer.train(evaluated(**IMPOSSIBLE[message]), tmp_path)
    assert os.listdir(tmp_path) == []
