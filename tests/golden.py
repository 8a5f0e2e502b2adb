"""Golden runs: what short runs compute, to the bit, so that a change of structure can be evaluated.

  python -m tests.golden record     # writes tests/data/golden/runs.json; cases alone if named
  python -m tests.golden compare    # runs all again and prints what differs
  python -m tests.golden compare nash pcgrad    # these cases alone

Bits are those of one kind of CPU and one jaxlib: on another machine, record with the commit before
the change first.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

PATH = Path(__file__).parent / "data" / "golden" / "runs.json"
STEPS = 50
DEVICES = (1, 4)

DIGITS = {
    "num_steps": STEPS,
    "log_every": 1,
    "log_to": (),
    "checkpoint.every": STEPS,
    "sample.every": 0,
    "evaluation.features": "",
    "evaluation.split": "",
}
SMALL_UNET = {
    "num_steps": 20,
    "checkpoint.every": 20,
    "model.name": "unet",
    "model.width": 32,
    "model.num_res_blocks": 1,
    "model.head_channels": 16,
    "process.variance": "learned_range",
    "process.prediction": "v",
    "loss_weight.name": "min_snr",
}
LATENT = {
    "num_steps": 20,
    "checkpoint.every": 20,
    "data.name": "folder",
    "data.split": "",
    "data.image_size": 16,
    "data.crop": "center",
    "data.flip": True,
    "data.batch_size": 40,
    "sampler.clip_x0": False,
    "loss_weight.name": "p2",
    "model.patch": 2,
    "autoencoder.name": "KL-f4-small",
    "autoencoder.scale": 0.5,
    "autoencoder.batch_size": 8,
}
# Name: the config's argument and what is changed.
CASES = {
    "vanilla": ("vanilla", {}),
    "linear": ("linear", {}),
    "uncertainty": ("uncertainty", {}),
    "pcgrad": ("pcgrad", {}),
    "nash": ("nash", {}),
    "nash-renewed": ("nash", {"method.update_every": 7}),
    "masked-uniform": (
        "pcgrad",
        {"method.gradient_form": "masked", "method.draw": "uniform"},
    ),
    "scan": ("nash,timestep", {"method.gradient_form": "scan"}),
    "microbatches": ("nash", {"optimizer.microbatches": 2}),
    "microbatches-losses": ("uncertainty", {"optimizer.microbatches": 2}),
    "specialist": ("vanilla", {"clusters.specialist": 2}),
    "random-clusters": ("uncertainty,random", {}),
    "share-weighted": ("linear", {"method.weight_by_interval_size": True}),
    "share-weighted-nash": ("nash", {"method.weight_by_interval_size": True}),
    "cosines-clipped-frozen": (
        "linear",
        {"method.cosines": True, "optimizer.clip_norm": 0.5, "optimizer.frozen": "block_0/"},
    ),
    "unet": ("nash", SMALL_UNET),
    "latent-dit": ("uncertainty", LATENT),
}
# Of the runs above.
SAMPLES = {
    "ddim": ("nash", {"sampler.name": "ddim", "sampler.eta": 0.5, "sampler.guidance": 2.0}),
    "ddpm": ("unet", {"sampler.name": "ddpm"}),
}


def make_config(case: str, folder: Path):
    from ant_jax.config import update
    from configs import digits

    argument, changes = CASES[case]
    config = digits.get_config(argument)
    if "autoencoder.name" in changes:
        changes = changes | {
            "data.dir": str(folder / "images"),
            "autoencoder.weights": str(folder / "weights.safetensors"),
            "autoencoder.latents": str(folder / "latents"),
        }
    update(config, DIGITS | changes)
    return config


def make_latents(folder: Path) -> None:
    """Images, an autoencoder that is not trained, and the latents."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from PIL import Image

    from ant_jax import encode, interop
    from ant_jax.latents.autoencoder import autoencoder
    from ant_jax.latents.autoencoder_weights import AUTOENCODER

    rng = np.random.default_rng(0)
    for i in range(48):
        path = folder / "images" / f"class{i % 3}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(path)
    params = jax.jit(autoencoder("KL-f4-small").init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    state = interop.to_torch(jax.device_get(params["params"]), AUTOENCODER)
    interop.write_state(folder / "weights.safetensors", state)
    encode.encode(make_config("latent-dit", folder))


def digest(tree) -> str:
    """SHA-256 of the bytes of a pytree's arrays, in the order of their paths, without the paths."""
    import jax
    import numpy as np

    sha = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        array = np.asarray(leaf)
        sha.update(f"{array.dtype} {array.shape} ".encode() + array.tobytes())
    return sha.hexdigest()[:16]


def run_case(case: str, folder: Path) -> dict:
    """Losses, last weights and digests of the last state of one run."""
    from ant_jax.train import train

    workdir = folder / case
    state = train(make_config(case, folder), workdir)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {
        "losses": [line["loss"] for line in lines],
        "weights": lines[-1]["weights"],
        "params": digest(state.params),
        "ema": digest(state.ema_params),
        "optimizer": digest(state.opt_state),
        "method": digest(state.method_state),
    }


def draw(name: str, folder: Path) -> dict:
    """The digest of samples, as float32 and as pixels, of a run that is done."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from ant_jax import config as config_lib
    from ant_jax import experiment, results
    from ant_jax.diffusion import samplers

    case, changes = SAMPLES[name]
    config = make_config(case, folder)
    config_lib.update(config, {"sample.num": 24, "sampler.num_steps": 12} | changes)
    _, setup, params = results.restore_run(config, folder / case)
    apply_fn = experiment.denoiser(setup, params)
    pixels = [images for images, _ in experiment.draw_samples(config, setup, apply_fn, 24)]
    x0 = config_lib.build(config, "sampler")(
        setup.process,
        apply_fn,
        (8, *setup.image_shape),
        jax.random.key(0),
        samplers.SampleOptions(num_steps=12, guidance=config.sampler.guidance),
        jnp.arange(8),
        setup.model.num_classes,
    )
    return {"pixels": digest(np.concatenate(pixels)), "x0": digest(x0)}


def run_all(devices: int, cases: list[str]) -> dict:
    """Some cases, and samples of the runs that are among them, on so many devices."""
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "latent-dit" in cases:
            make_latents(folder)
        for case in cases:
            results[f"{case}/{devices}"] = run_case(case, folder)
        for each, (case, _) in SAMPLES.items():
            if case in cases:
                results[f"{each}/{devices}"] = draw(each, folder)
    return results


def environment(devices: int) -> dict[str, str]:
    """Quick compilation, as for the tests, and so many devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    flags += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": flags,
    }


def compute(cases: list[str]) -> dict:
    """The cases on all numbers of devices, side by side."""
    programs = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.golden", str(devices), *cases],
            env=environment(devices),
            stdout=subprocess.PIPE,
        )
        for devices in DEVICES
    ]
    results = {}
    for program in programs:
        output, _ = program.communicate()
        if program.returncode:
            sys.exit("a run failed")
        results |= json.loads(output.splitlines()[-1])
    return results


def main(argument: str, *cases: str) -> None:
    """Runs one of the commands, or the cases on a number of devices."""
    cases = list(cases or CASES)
    if argument == "record":
        before = json.loads(PATH.read_text()) if PATH.exists() else {}
        PATH.write_text(json.dumps(before | compute(cases), indent=1) + "\n")
    elif argument == "compare":
        before, now = json.loads(PATH.read_text()), compute(cases)
        differing = [name for name in now if before[name] != now[name]]
        for name in differing:
            for key, value in before[name].items():
                other = now[name][key]
                if other != value and isinstance(value, list):
                    gap = max(abs(a - b) / abs(a) for a, b in zip(value, other, strict=True) if a)
                    print(f"{name}: {key} differ by {gap:.1e}")
                elif other != value:
                    print(f"{name}: {key} differs")
        print(f"{len(now) - len(differing)} of {len(now)} are equal to the bit")
        sys.exit(bool(differing))
    else:
        print(json.dumps(run_all(int(argument), cases)))


if __name__ == "__main__":
    main(*sys.argv[1:])
