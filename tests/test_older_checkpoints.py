import json
import tarfile
from pathlib import Path

import numpy as np

from ant_jax import workdir as workdir_lib
from ant_jax.train import train

DATA = Path(__file__).parent / "data" / "golden"


def test_a_run_goes_on_from_a_checkpoint_of_an_older_version(tmp_path):
    """Nash, whose weights are renewed every third step, at step 4 of 8.

    Steps 1 to 4 were recorded by the old version, steps 5 to 8 since each task has one block of the
    batch. Until the renewal at step 7 the weights are still those of the old version's step 4.
    """
    with tarfile.open(DATA / "workdir.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    workdir = tmp_path / "workdir"
    config = workdir_lib.load_config(workdir)
    assert config.method.update_every == 3
    config.num_steps = 8
    train(config, workdir)
    read = lambda path: [json.loads(line) for line in path.read_text().splitlines()]
    then, now = read(DATA / "metrics.jsonl"), read(workdir / "metrics.jsonl")
    assert [row["step"] for row in now] == list(range(1, 9))
    # The weights were those of the losses, times the share of each interval.
    scale = np.array([21, 19]) * 2 / 40
    for before, after in zip(then[4:], now[4:], strict=True):
        np.testing.assert_allclose(after["loss"], before["loss"], rtol=1e-4)
        np.testing.assert_allclose(after["weights"], scale * before["weights"], rtol=1e-4)
