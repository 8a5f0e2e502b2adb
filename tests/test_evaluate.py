import json
import os
import re
import shutil

import evaluated_run
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluated_run import configured, features

from ant_jax import config as config_lib
from ant_jax import (
    data,
    evaluate,
    evaluation,
    measuring,
    results,
    sample,
    sampling,
    train,
)
from ant_jax.config import ConfigError
from ant_jax.runtime import progress
from ant_jax.runtime.lock import InUseError
from ant_jax.sampling import cache

# pytest looks for fixtures among the names of a module.
network, run, workdir = evaluated_run.network, evaluated_run.run, evaluated_run.workdir


@pytest.fixture
def draws(monkeypatch):
    """Numbers of the first samples that are drawn, and a number of batches to stop at."""

    class Draws(list):
        end = None

    seen = Draws()
    draw_samples = evaluate.experiment.draw_samples

    def watched(config, setup, apply_fn, num, start, stop):
        if len(seen) == seen.end:
            raise KeyboardInterrupt
        seen.append(start)
        yield from draw_samples(config, setup, apply_fn, num, start, stop)

    monkeypatch.setattr(evaluate.experiment, "draw_samples", watched)
    return seen


def kept(workdir):
    return sorted(path.name for path in (workdir / "drawn").glob("*/*"))


def stopped(do, config, workdir, draws, after):
    draws.clear()
    draws.end = after
    with pytest.raises(KeyboardInterrupt):
        do(config, workdir)
    draws.end = None
    assert kept(workdir) == [f"{8 * i:08d}.npz" for i in range(after)]
    draws.clear()


def result_of(path):
    """What a mode leaves; the time stamps of an .npz don't count."""
    if path.suffix == ".json":
        return path.read_text()
    with np.load(path) as stored:
        return {name: stored[name].tolist() for name in stored.files}


@pytest.mark.parametrize(
    ("do", "result"),
    [(evaluate.evaluate, "evaluation/00000005.json"), (sample.sample, "samples/00000005.npz")],
)
def test_drawing_goes_on_where_it_was_killed(do, result, run, workdir, draws, tmp_path):
    config = configured(tmp_path)
    whole = shutil.copytree(run, tmp_path / "whole")
    do(config, whole)
    assert draws == [0, 8, 16] and kept(whole) == []

    stopped(do, config, workdir, draws, 2)
    assert not (workdir / result).exists()
    do(config, workdir)
    assert draws == [16]
    assert result_of(workdir / result) == result_of(whole / result)
    grid = (workdir / result).with_suffix(".png")
    assert grid.read_bytes() == (whole / result).with_suffix(".png").read_bytes()
    assert list((workdir / "drawn").iterdir()) == []


def test_what_is_killed_after_drawing_draws_nothing_again(workdir, draws, tmp_path, monkeypatch):
    config = configured(tmp_path)
    # A result that can't be written is no reason to lose hours.
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(evaluate, "_write", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        evaluate.evaluate(config, workdir)
    assert len(kept(workdir)) == 3
    evaluate.evaluate(config, workdir)
    assert draws == [0, 8, 16] and kept(workdir) == []


def test_a_damaged_file_and_those_after_it_are_drawn_again(workdir, draws, tmp_path):
    config = configured(tmp_path)
    expected = evaluate.evaluate(config, shutil.copytree(workdir, tmp_path / "whole"))
    stopped(evaluate.evaluate, config, workdir, draws, 2)
    (piece,) = (workdir / "drawn").glob("*/00000008.npz")
    piece.write_bytes(piece.read_bytes()[:-40])
    assert evaluate.evaluate(config, workdir) == expected
    assert draws == [8, 16]


def test_samples_of_another_setting_are_not_used(workdir, draws, tmp_path):
    stopped(evaluate.evaluate, configured(tmp_path), workdir, draws, 2)
    evaluate.evaluate(configured(tmp_path, sample__seed=1), workdir)
    assert draws == [0, 8, 16]
    # The others are still there for those who go on with them.
    assert len(kept(workdir)) == 2


def test_samples_of_another_step_are_not_used(workdir, draws, tmp_path):
    config = configured(tmp_path)
    stopped(evaluate.evaluate, config, workdir, draws, 2)
    assert evaluate.evaluate(config, workdir, 3)["step"] == 3
    assert draws == [0, 8, 16]


def test_the_key_is_that_of_what_samples_depend_on(tmp_path):
    params = {"a": np.ones(3)}
    place = lambda params=params, step=3, **settings: cache.key(
        results.origin(configured(tmp_path, **settings), step, params)
    )
    assert place() == place()
    same = {"log_every": 7, "sample__batch_size": 99, "evaluation__split": "test", "num_steps": 99}
    assert place(**same) == place()
    others = [
        place(step=4),
        place(params={"a": np.ones(3, np.float32)}),
        place(params={"b": np.ones(3)}),
        place(sample__num=20),
        place(sample__seed=1),
        place(sampler__guidance=1.5),
        place(sampler__clip_x0=False),
    ]
    assert len({place(), *others}) == 8


def test_figures_of_other_settings_have_another_name(workdir, tmp_path):
    folder = workdir / "evaluation"
    said = lambda path: json.loads(path.read_text())
    figures = evaluate.evaluate(configured(tmp_path), workdir)
    first = folder / "00000005.json"
    assert said(first).items() > figures.items()
    made_from = said(first)["made_from"]
    assert made_from["step"] == 5 and made_from["inception"] == "digest" and "run" in made_from
    every = {"sampler.name", "sampler.num_steps", "sampler.eta", "sampler.guidance", "sample.seed"}
    every |= {"sample.num", "sampler.guidance_channels", "sampler.clip_x0"}
    every |= {"evaluation.features", "evaluation.reference", "evaluation.split"}
    assert every < made_from["settings"].keys()
    evaluate.evaluate(configured(tmp_path), workdir)
    assert len(list(folder.glob("*.json"))) == 1
    before = first.read_bytes()
    # Of the same samples, by another reference: figures of something else.
    reference = npz(tmp_path / "real.npz")
    for number, changes in enumerate(
        ({"sample__seed": 1}, {"evaluation__reference": reference}), start=2
    ):
        evaluate.evaluate(configured(tmp_path, **changes), workdir)
        assert len(list(folder.glob("*.json"))) == len(list(folder.glob("*.png"))) == number
    assert first.read_bytes() == before


def test_a_result_of_unknown_settings_is_left_alone(workdir, tmp_path):
    unknown = {
        workdir / "evaluation" / "00000005.json": b"{}",
        workdir / "samples/00000005.npz": b"",
    }
    for path, content in unknown.items():
        path.parent.mkdir()
        path.write_bytes(content)
    evaluate.evaluate(configured(tmp_path), workdir)
    assert sample.sample(configured(tmp_path), workdir).name != "00000005.npz"
    assert unknown == {path: path.read_bytes() for path in unknown}


@pytest.mark.parametrize("do", [sample.sample, evaluate.evaluate])
def test_the_second_of_two_at_the_same_samples_is_refused_at_the_start(
    do, workdir, draws, tmp_path, monkeypatch
):
    config = configured(tmp_path)
    build = measuring.build

    def at_once(config):
        # In the middle of an evaluation.
        with pytest.raises(InUseError, match=r"is drawing the same samples, of step 5 in .*: wait"):
            do(config, workdir)
        assert draws == []
        sample.sample(configured(tmp_path, sample__seed=1), workdir)
        assert draws == [0, 8, 16]
        return build(config)

    monkeypatch.setattr(measuring, "build", at_once)
    figures = evaluate.evaluate(config, workdir)
    assert len(draws) == 6
    monkeypatch.setattr(measuring, "build", build)
    assert evaluate.evaluate(config, workdir) == figures


def test_samples_that_are_not_finite_are_no_black_pictures(workdir, tmp_path, monkeypatch):
    restore = results.restore_run

    def poisoned(*arguments):
        step, setup, params = restore(*arguments)
        return step, setup, jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), params)

    monkeypatch.setattr(results, "restore_run", poisoned)
    told = r"step 5: 8 of 8 samples have numbers that are not finite, such as number 0"
    for do in (sample.sample, evaluate.evaluate):
        with pytest.raises(FloatingPointError, match=told):
            do(configured(tmp_path), workdir)
    with pytest.raises(FloatingPointError, match="step 5: the validation loss is nan"):
        evaluate.evaluate(
            configured(tmp_path, evaluation__features="", evaluation__split="test"), workdir
        )
    assert not {"samples", "evaluation"} & set(os.listdir(workdir))


def test_the_figures_of_a_run(workdir, tmp_path, monkeypatch):
    config = configured(tmp_path)
    logged = []
    monkeypatch.setattr(evaluate.logging, "info", lambda form, *args: logged.append(form % args))
    result = evaluate.evaluate(config, workdir)
    path = sample.sample(config, workdir)
    images = np.load(path)["arr_0"]
    train = data.digits("train").images
    ours, theirs = (next(features([x])) for x in (images, train))
    for name, of in (("fid", "features"), ("sfid", "spatial")):
        gaussians = [
            (x.mean(0, dtype=float), np.cov(x.astype(float), rowvar=False))
            for x in (ours[of], theirs[of])
        ]
        distance = evaluation.frechet_distance(*gaussians[0], *gaussians[1])
        assert result[name] == pytest.approx(distance, rel=1e-6)
    shares = evaluation.precision_and_recall(theirs["features"], ours["features"])
    assert (result["precision"], result["recall"]) == shares
    assert result["reference"] == "digits[train]" and result["num_samples"] == 21
    (table,) = [line for line in logged if "sFID" in line]
    head, row = (line.split() for line in table.splitlines())
    assert head == ["FID", "sFID", "IS", "precision", "recall", "samples", "reference"]
    assert row[0] == f"{result['fid']:.3f}" and row[-2:] == ["21", "digits[train]"]

    # The statistics of the training data are computed once.
    monkeypatch.setattr(data, "batches", None)
    (workdir / "evaluation" / "00000005.json").unlink()
    assert evaluate.evaluate(config, workdir) == result
    monkeypatch.undo()


def test_training_data_are_cropped_in_the_centre_and_each_counts_once(tmp_path, monkeypatch):
    seen = []
    batches = data.batches

    def watched(source, **settings):
        seen.append(settings)
        for batch in batches(source, **settings):
            seen.append(batch["image"])
            yield batch

    monkeypatch.setattr(data, "batches", watched)
    keys = []
    reference = evaluation.data_reference

    def noted(evaluator, images, *others):
        keys.append(images.key)
        return reference(evaluator, images, *others)

    monkeypatch.setattr(evaluation, "data_reference", noted)
    config = configured(tmp_path, data__crop="random", data__flip=True, sample__batch_size=600)
    measuring.build(config)
    (key,), settings, *counted = keys, *seen
    assert settings["crop"] == "center" == key["crop"] and not settings["flip"]
    assert key["num"] == 1497
    rows = lambda images: np.sort(images.reshape(-1, 64).view("V64").ravel())
    np.testing.assert_array_equal(
        rows(np.concatenate(counted)[: key["num"]]), rows(data.digits("train").images.copy())
    )


def test_other_data_are_another_reference(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keys = []
    for file, value in (("a.npz", 0), (str(tmp_path / "a.npz"), 0), ("b.npz", 0), ("a.npz", 1)):
        np.savez(file, images=np.full((3, 8, 8, 1), value, np.uint8))
        config = config_lib.default_config(data="arrays", model="dit", method="vanilla")
        config_lib.update(config, {"data.file": file, "data.split": "", "data.image_size": 8})
        keys.append(measuring._images(config, "").key)
    assert keys[0] == keys[1] != keys[2]
    # The last are other images in the same file.
    assert keys[3] not in keys[:3]


def test_a_classifier_is_trained_on_the_images_of_the_run(tmp_path):
    config = configured(
        tmp_path, data__crop="random", data__flip=True, evaluation__features="classifier"
    )
    extractor = measuring._extractor(config)
    extractor.check(8, 8, 1)
    training = measuring._images(config, "train", as_in_training=True)
    assert training.pipeline["crop"] == "random" and training.pipeline["flip"]
    assert training.key["flip"] and training.source.num_classes == 10


def npz(path, num=9, shape=(8, 8, 1)):
    images = np.uint8(np.random.RandomState(0).randint(0, 256, (num, *shape)))
    sampling.write_samples(path, [(images, None)], num)
    return str(path)


@pytest.mark.parametrize("features", ["inception", "digits"])
def test_a_file_of_samples_needs_no_run(features, tmp_path, draws):
    samples = npz(tmp_path / "samples.npz")
    # In the place of what would say what they are of: no reason to wait for a writer.
    os.mkfifo(tmp_path / "samples.json")
    config = configured(
        tmp_path,
        evaluation__features=features,
        evaluation__samples=samples,
        evaluation__split="test",
    )
    result = evaluate.evaluate(config, tmp_path / "empty")
    folder = tmp_path / "empty" / "evaluation"
    kept = json.loads((folder / "samples-samples.json").read_text())
    assert kept.pop("made_from")["samples"] == samples and kept == result
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".png"]
    assert result["num_samples"] == 9 and "step" not in result and draws == []
    assert {"inception": "real_fid", "digits": "real_frechet_distance"}[features] in result
    assert "validation_loss" not in result


def colours():
    def check(height, width, channels):
        if channels not in (3, None):
            raise ValueError(f"needs 3 channels, not {channels}")

    return evaluation.Extractor({"features": (3,)}, check, None)


def test_an_extractor_of_ones_own_knows_the_channels_before_samples_are_drawn(
    workdir, tmp_path, draws, caplog
):
    config = configured(tmp_path)
    config_lib.update(config, {"evaluation.features": f"{__name__}:colours"})
    with pytest.raises(ConfigError, match=r"colours' needs 3 channels, not 1: use 'classifier'"):
        evaluate.evaluate(config, workdir)
    assert draws == []
    train._look_ahead(config, 1)
    assert "--mode evaluate will refuse this: config.evaluation.features" in caplog.text


MISTAKES = {
    r"needs the path of the weights: pt_inception-2015.*: set config.evaluation.weights, or use ": {
        "evaluation__weights": ""
    },
    r"'inception' finds no weights: there is no such file as '.*absent.pth': set config.eval": {
        "evaluation__weights": "absent.pth"
    },
    r"config.evaluation.reference = '.*absent.npz': there is no such file": {
        "evaluation__reference": "absent.npz"
    },
    r"config.evaluation.reference: .*damaged.npz cannot be used": {
        "evaluation__reference": "damaged.npz"
    },
    r"config.evaluation.reference: .*other.npz cannot be used: 'mu' has 3 features": {
        "evaluation__reference": "other.npz"
    },
    r"config.evaluation.samples = '.*absent.npz': there is no such file": {
        "evaluation__samples": "absent.npz"
    },
    r"config.evaluation.samples: .*damaged.npz cannot be used": {
        "evaluation__samples": "damaged.npz"
    },
    r"config.evaluation.samples: a covariance needs at least 2 samples": {
        "evaluation__samples": "single.npz"
    },
    r"set config.evaluation.features to 'digits'$": {
        "evaluation__features": "",
        "evaluation__samples": "single.npz",
    },
    "config.sample.num = 1: metrics need 2 samples": {"sample__num": 1},
    r"set config.evaluation.features to .*, or set config.evaluation.split to held-out images": {
        "evaluation__features": ""
    },
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_is_named_before_anything_is_drawn(message, run, draws, tmp_path):
    npz(tmp_path / "single.npz", 1)
    (tmp_path / "damaged.npz").write_bytes(b"no zip")
    np.savez(tmp_path / "other.npz", mu=np.zeros(3), sigma=np.eye(3))
    settings = {
        name: str(tmp_path / value) if "." in str(value) else value
        for name, value in MISTAKES[message].items()
    }
    with pytest.raises(ConfigError, match=re.compile(message, re.S)):
        evaluate.evaluate(configured(tmp_path, **settings), run)
    assert draws == [] and not list(run.glob("evaluation/*.json"))


def test_the_time_left_is_logged(monkeypatch):
    clock = iter([100, 104, 111, 112, 122])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    logged = []
    monkeypatch.setattr(progress.logging, "info", lambda form, *args: logged.append(form % args))
    batches = [(np.zeros(5),)] * 5
    assert list(progress.with_time_left(batches, 30, "things")) == batches
    # 10 took 11 s after the first 5, which compiled; 15 are left.
    assert logged == ["15/30 things  ETA 16s", "25/30 things  ETA 6s"]
