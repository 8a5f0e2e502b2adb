"""``--mode sample``: where samples are written. `test_evaluate` has what both modes do."""

import json
import re
from pathlib import Path

import evaluated_run
import numpy as np
from evaluated_run import configured

from ant_jax import evaluate, measuring, model_card, sample
from ant_jax import workdir as workdir_lib

# pytest looks for fixtures among the names of a module.
network, run, workdir = evaluated_run.network, evaluated_run.run, evaluated_run.workdir


def test_a_result_says_what_it_is_of_and_others_do_not_take_its_place(workdir, tmp_path):
    plain = sample.sample(configured(tmp_path), workdir)
    assert plain == workdir / "samples" / "00000005.npz"
    before = {path.name: path.read_bytes() for path in plain.parent.iterdir()}
    assert sorted(before) == ["00000005.json", "00000005.npz", "00000005.png"]
    other = configured(tmp_path, sample__seed=1)
    path = sample.sample(other, workdir)
    assert re.fullmatch(r"00000005-[0-9a-f]{8}\.npz", path.name)
    assert sample.sample(other, workdir) == path
    assert before == {name: (plain.parent / name).read_bytes() for name in before}
    assert len(list(plain.parent.iterdir())) == 6
    made_from = json.loads(path.with_suffix(".json").read_text())["made_from"]
    assert (made_from["step"], made_from["settings"]["sample.seed"]) == (5, 1)
    # Again, with what samples don't depend on, they are the same.
    assert sample.sample(configured(tmp_path, sample__batch_size=16), workdir) == plain
    # The figures of a file say what its samples were made from.
    judged = configured(tmp_path, evaluation__samples=str(path))
    evaluate.evaluate(judged, workdir)
    said = json.loads((workdir / "evaluation" / f"samples-{path.stem}.json").read_text())
    assert said["made_from"]["samples_made_from"] == made_from


def test_a_picture_of_the_trainer_is_not_replaced_by_another(workdir, tmp_path):
    (workdir / "samples").mkdir()
    (workdir / "samples" / "00000005.png").write_bytes(b"the trainer's")
    other = sample.sample(configured(tmp_path, sample__seed=1), workdir)
    assert other.name != "00000005.npz" and other.with_suffix(".png").exists()
    assert (workdir / "samples" / "00000005.png").read_bytes() == b"the trainer's"
    # Of so many more or fewer samples the first ones are the same.
    assert sample.sample(configured(tmp_path, sample__num=16), workdir).name == "00000005.npz"


def test_a_picture_that_the_trainer_is_still_to_draw_keeps_its_name(workdir, tmp_path):
    config = workdir_lib.load_config(workdir)
    config.sample.every = 5
    workdir_lib.save_config(config, workdir)
    assert sample.sample(configured(tmp_path, sample__seed=1), workdir).name != "00000005.npz"
    assert sample.sample(configured(tmp_path), workdir).name == "00000005.npz"


def test_classes_can_be_chosen(workdir, tmp_path, caplog):
    plain = sample.sample(configured(tmp_path), workdir)
    # As in earlier versions, whose results stay valid.
    said = json.loads(plain.with_suffix(".json").read_text())
    assert "sample.labels" not in said["made_from"]["settings"]
    config = configured(tmp_path, sample__labels=(7, 1))
    path = sample.sample(config, workdir)
    assert path != plain
    with np.load(path) as stored:
        np.testing.assert_array_equal(stored["arr_1"], [7, 1] * 10 + [7])
    measuring.build(config)
    assert "samples of the classes config.sample.labels = (7, 1) are compared with" in caplog.text


def test_a_model_card_names_the_classes_of_the_samples():
    settings = {"sampler.name": "ddim", "sampler.num_steps": 9, "sampler.guidance": 1.0}
    settings |= {"sample.seed": 0, "evaluation.features": "digits"}
    table = lambda **more: model_card._table(
        [model_card._Result(Path("x"), {"num_samples": 4}, settings | more)]
    )
    assert "| 4 samples, ddim, 9 steps" in table()
    assert "| 4 samples of class 3 and 5, ddim" in table(**{"sample.labels": [3, 5]})
