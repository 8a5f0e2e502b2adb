import json
import logging

import forked
import numpy as np
import pytest

from ant_jax.runtime import logs, progress


def step_metrics(loss, cluster_losses, counts):
    """One step as the train step returns it."""
    values = {"loss": loss, "cluster_losses": cluster_losses, "counts": counts}
    return {name: np.asarray(value, np.float32) for name, value in values.items()}


def test_progress_is_shown_in_python_too(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from ant_jax.runtime import logs, progress\n"
        "logs.show_progress()\nprogress.Progress(0, 2, 3).line(1, 0.5)"
    )
    ((status, said),) = forked.run([[script]], devices=1)
    assert status == 0 and said.startswith("step 1/2  loss 0.5000  ")


def test_the_interval_weights_cluster_losses_by_their_counts():
    interval = logs.MeanMetrics()
    first = step_metrics(1.0, [2.0, 0.0, 0.0], [3, 0, 0])
    interval.add(first)
    interval.add(step_metrics(3.0, [6.0, 5.0, 0.0], [1, 2, 0]))
    report = interval.report()
    assert report["loss"] == 2.0
    # A cluster without examples has no loss; one with examples in one step has that step's loss.
    assert report["cluster_losses"] == [(3 * 2 + 6) / 4, 5.0, None]
    assert report["counts"] == [2.0, 1.0, 0.0]
    assert first["cluster_losses"][0] == 2.0
    json.dumps(report, allow_nan=False)

    interval.add(step_metrics(7.0, [1.0, 1.0, 1.0], [1, 1, 1]))
    assert interval.report()["loss"] == 7.0


def test_an_interval_goes_on_from_its_state_to_the_bit():
    rng = np.random.default_rng(0)
    steps = [
        step_metrics(rng.normal(), rng.normal(size=3), rng.integers(0, 4, 3)) for _ in range(9)
    ]
    nothing = {name: np.full_like(value, np.nan) for name, value in steps[4].items()}
    steps[4] = nothing
    whole, parts = logs.MeanMetrics(), logs.MeanMetrics()
    for step in steps:
        whole.add(step)
        parts = logs.MeanMetrics(json.loads(json.dumps(parts.state())))
        parts.add(step)
    assert parts.report() == whole.report()
    assert logs.MeanMetrics().state() == parts.state() == {}
    parts.add(nothing)
    assert parts.report() == {"loss": None, "cluster_losses": [None] * 3, "counts": [None] * 3}


def read(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_lines_beyond_the_start_and_a_torn_one_are_dropped(tmp_path):
    lines = [json.dumps({"step": step, "loss": step / 2}) for step in (2, 4, 6)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 3, "lo')
    writer = logs.MetricWriter(tmp_path, 4)
    writer.scalars(5, {"loss": 1.0})
    writer.close()
    assert read(tmp_path) == [
        {"step": 2, "loss": 1.0},
        {"step": 4, "loss": 2.0},
        {"step": 5, "loss": 1.0},
    ]
    # Unreadable lines are kept in another file.
    assert (tmp_path / "metrics-damaged.jsonl").read_text() == '{"step": 3, "lo\n'


def damage(content, **changes):
    """Replaces single bytes of the file of five lines below."""
    lines = content.splitlines(True)
    for line, (old, new) in changes.items():
        number = int(line[-1])
        assert lines[number].count(old) == 1
        lines[number] = lines[number].replace(old, new)
    return b"".join(lines)


DAMAGE = {
    "no JSON": {"line1": (b"{", b"\0")},
    "no UTF-8": {"line1": (b"loss", b"l\xffss")},
    "no step": {"line1": (b"step", b"stop")},
    "no number": {"line1": (b"20", b"2.")},
    "an end of line": {"line1": (b"\n", b" ")},
    "a step too high": {"line1": (b"20", b"70")},
    "a step too low": {"line1": (b"20", b"00")},
    "the last step": {"line4": (b"50", b"90")},
    "a carriage return": {"line1": (b", ", b",\r")},
    "another loss": {"line1": (b"0.25", b"0.75")},
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_line_costs_no_other_and_is_set_aside(tmp_path, caplog, kind):
    path, aside = tmp_path / "metrics.jsonl", tmp_path / "metrics-damaged.jsonl"
    writer = logs.MetricWriter(tmp_path, 0)
    for step in range(10, 60, 10):
        writer.scalars(step, {"loss": 0.25})
    written = writer.written()
    writer.scalars(60, {"loss": 0.5})
    writer.close()
    path.write_bytes(damage(path.read_bytes(), **DAMAGE[kind]))
    before = path.read_bytes()
    seen = logs.read(path)
    # Only the digest shows that the loss has changed.
    assert kind == "another loss" or (len(seen) >= 4 and "can't be read" in caplog.text)
    logs.MetricWriter(tmp_path, 50, written=written).close()
    after = path.read_bytes() + (aside.read_bytes() if aside.exists() else b"")
    assert sorted(after.splitlines()) == sorted(before.splitlines())
    steps = [row["step"] for row in read(tmp_path)]
    assert steps == sorted(steps) and steps[:1] == [10] and len(steps) >= 3
    assert f"{path} is not as it was written: " in caplog.text


def test_lines_that_are_as_they_were_written_are_left_alone(tmp_path, caplog):
    writer = logs.MetricWriter(tmp_path, 0)
    writer.scalars(10, {"loss": 0.25})
    written = writer.written()
    writer.scalars(20, {"loss": 0.5})
    writer.close()
    logs.MetricWriter(tmp_path, 10, written=written).close()
    assert [row["step"] for row in read(tmp_path)] == [10]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"] and not caplog.text
    (tmp_path / "metrics.jsonl").unlink()
    logs.MetricWriter(tmp_path, 10, written=written).close()
    assert "is not as it was written: 0 lines up to step 10 instead of 1" in caplog.text


def test_lines_without_a_checkpoint_are_said_to_be_dropped(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").write_text('{"step": 10}\n{"step": 20}\n')
    logs.MetricWriter(tmp_path, 0).close()
    assert "2 lines are removed, for there is no checkpoint" in caplog.text


def test_a_line_is_in_the_file_at_once(tmp_path):
    writer = logs.MetricWriter(tmp_path, 0)
    writer.scalars(1, {"loss": 0.5, "weights": [0.1, None]})
    assert read(tmp_path) == [{"step": 1, "loss": 0.5, "weights": [0.1, None]}]
    writer.close()


def test_progress_tells_step_loss_speed_and_time_left(monkeypatch, caplog):
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    bar = progress.Progress(10, 1000, batch_size=8)
    now[0] += 5
    # Parsing flags, as other tests do, sets the level of absl's logger.
    with caplog.at_level(logging.INFO, logger="absl"):
        assert bar.line(20, 0.12345) == 2.0
        now[0] += 50  # spent on samples
        bar.restart(20)
        now[0] += 1
        assert bar.line(24, 0.1) == 4.0
    first, second = caplog.messages
    assert first == "step   20/1000  loss 0.1235  2.0 steps/s  16 examples/s  ETA 8m10s"
    assert "4.0 steps/s" in second


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (125, "2m05s"),
        (3599.7, "1h00m"),
        (3 * 3600 + 7 * 60 + 50, "3h07m"),
        (100 * 3600, "100h00m"),
    ],
)
def test_duration(seconds, text):
    assert progress.duration(seconds) == text
