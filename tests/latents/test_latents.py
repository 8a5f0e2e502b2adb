"""Encoding, the latents as a source, training on them and decoding, with a small autoencoder."""

import itertools
import json
import logging
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ant_jax import config as config_lib
from ant_jax import data, dataset, encode, export, interop, results, sample, train
from ant_jax.config import ConfigError
from ant_jax.data.source import UnreadableImageError
from ant_jax.latents import codec as codec_lib
from ant_jax.latents.autoencoder import autoencoder
from ant_jax.latents.autoencoder_weights import AUTOENCODER
from ant_jax.latents.shards import LatentInfo, as_kept, complete, latents, shard_path, write_shard
from ant_jax.runtime.files import locked
from ant_jax.runtime.lock import InUseError
from configs import digits

NUM, SIZE = 21, 16
FACTS = LatentInfo("VQ-f4", "", 12, (3, 3, 2), 1, 5, 8, 0.0, "", "", "")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Images in two classes, and the weights of an autoencoder that is not trained."""
    root = tmp_path_factory.mktemp("latents")
    rng = np.random.default_rng(0)
    for i in range(NUM):
        path = root / "images" / f"class{i % 2}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (SIZE, SIZE + 2, 3), np.uint8)).save(path)
    init = autoencoder("KL-f4-small").init
    shapes = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    for seed in (0, 1):
        params = jax.tree.map_with_path(initial(np.random.default_rng(seed)), shapes)
        state = interop.to_torch(params, AUTOENCODER)
        interop.write_state(root / f"weights{seed}.safetensors", state)
    return root


def initial(rng):
    """What layers begin with, without compiling their initialisation, which takes seconds."""

    def make(path, leaf):
        if path[-1].key == "kernel":
            return np.float32(rng.normal(0, np.prod(leaf.shape[:-1]) ** -0.5, leaf.shape))
        return np.full(leaf.shape, path[-1].key == "scale", np.float32)

    return make


def settings(place, **changes):
    config = digits.get_config("nash")
    config_lib.update(
        config,
        {
            "num_steps": 3,
            "data.name": "folder",
            "data.dir": str(place / "images"),
            "data.split": "",
            "data.image_size": SIZE,
            "data.crop": "center",
            "data.flip": True,
            "data.batch_size": 16,
            "process.timesteps": 20,
            "sampler.clip_x0": False,
            "model.width": 8,
            "model.depth": 1,
            "model.heads": 1,
            "model.patch": 2,
            "clusters.k": 2,
            "autoencoder.name": "KL-f4-small",
            "autoencoder.weights": str(place / "weights0.safetensors"),
            "autoencoder.latents": str(place / "latents"),
            "autoencoder.scale": 0.5,
            "autoencoder.batch_size": 8,
            "optimizer.warmup_steps": 0,
            "log_every": 1,
            "log_to": (),
            "checkpoint.every": 3,
            "sample.every": 3,
            "sampler.num_steps": 2,
            "sample.batch_size": 8,
            "sample.num": 11,
            "evaluation.features": "",
            "evaluation.split": "",
        },
    )
    named = {name.replace("__", "."): value for name, value in changes.items()}
    config_lib.update(config, named)
    return config


@pytest.fixture(scope="module")
def encoded(place):
    return encode.encode(settings(place))


def by_hand(place):
    """The latents of the images as they lie in the folder, and of their mirror images."""
    codec = dataset.open_codec(settings(place))
    source = data.folder(dir=place / "images")
    images = np.stack([source[i]["image"] for i in range(NUM)])[:, :, 1 : 1 + SIZE]
    params = jax.device_get(codec.params)
    encode_ = jax.jit(lambda x: codec.model.apply({"params": params}, x, method="encode"))
    views = [encode_(np.float32(view) / 127.5 - 1) for view in (images, images[:, :, ::-1])]
    return np.array(views), np.array([source[i]["label"] for i in range(NUM)])


def test_the_latents_are_those_of_every_image_and_its_mirror_image(place, encoded):
    source = latents(encoded, 0.5)
    assert source.image_shape == (4, 4, 4)
    assert (len(source), source.num_classes) == (NUM, 2)
    expected, labels = by_hand(place)
    seen = []
    for i in range(NUM):
        example = source[i]
        mean, std = expected[:, 0] * 0.5, expected[:, 1] * 0.5
        distance = np.abs(mean - example["mean"][:, None]).max((0, 2, 3, 4))
        nearest = distance.argmin()
        # Half precision on disk.
        np.testing.assert_allclose(example["mean"], mean[:, nearest], atol=2e-3)
        np.testing.assert_allclose(example["std"], std[:, nearest], rtol=2e-3)
        assert example["label"] == labels[nearest]
        seen.append(nearest)
    assert sorted(seen) == list(range(NUM))
    noise = np.random.default_rng(0).standard_normal(expected[:, 0].shape)
    whole = (expected[:, 0] + expected[:, 1] * noise).std()
    assert source.info.std == pytest.approx(whole, rel=0.05)


def test_batches_draw_the_latents_anew_and_flip_them(encoded):
    source = latents(encoded, 1.0)
    draw = lambda **more: next(data.batches(source, batch_size=NUM, seed=3, **more))
    plain, flipped, later = draw(), draw(flip=True), draw(start_step=1)
    assert plain["image"].dtype == np.float32 and plain["image"].shape == (NUM, 4, 4, 4)
    np.testing.assert_array_equal(plain["image"], draw()["image"])
    order = np.random.default_rng((3, 0, 0)).permutation(NUM)
    stored = [source[int(i)] for i in order]
    mean, std = (np.stack([example[part] for example in stored]) for part in ("mean", "std"))
    noise = (plain["image"] - mean[:, 0]) / std[:, 0]
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
    # Of some images the mirror image's latent is drawn.
    distances = np.abs(flipped["image"][:, None] - mean) / std
    mirrored = distances.mean((2, 3, 4)).argmin(1)
    assert 0 < mirrored.sum() < NUM
    # Another epoch draws others for the same images.
    first = {int(i): image for i, image in zip(order, plain["image"], strict=True)}
    second_order = np.random.default_rng((3, 0, 1)).permutation(NUM)
    for i, image in zip(second_order, later["image"], strict=True):
        assert np.abs(first[int(i)] - image).max() > 1e-3


def test_latents_without_standard_deviations(tmp_path):
    means = np.random.default_rng(0).standard_normal((5, 2, 3, 3, 2)).astype(np.float16)
    write_shard(shard_path(tmp_path, 0), ((as_kept(mean, None), 7) for mean in means))
    complete(tmp_path, FACTS)
    source = latents(tmp_path, 2.0)
    for example, mean in zip((source[i] for i in range(5)), means, strict=True):
        np.testing.assert_array_equal(example["mean"], 2 * np.float32(mean))
        assert not example["std"].any() and example["label"] == 7
    assert source.info.std == pytest.approx(means.astype(float).std())
    # Without spread a draw is the mean.
    (batch,) = itertools.islice(data.batches(source, batch_size=5, seed=0), 1)
    assert {image.tobytes() for image in batch["image"]} == {
        (2 * np.float32(mean[0])).tobytes() for mean in means
    }


def test_encoding_goes_on_at_the_first_missing_shard(place, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "_SHARD", 8)
    config = settings(place, autoencoder__latents=str(tmp_path))
    written = []
    write = encode.write_shard

    def failing(path, examples):
        if len(written) == 1:
            raise OSError("killed")
        written.append(path.name)
        write(path, examples)

    monkeypatch.setattr(encode, "write_shard", failing)
    with pytest.raises(OSError, match="killed"):
        encode.encode(config)
    with pytest.raises(ConfigError, match="has no latents, or is not complete yet: run --mode enc"):
        dataset.open_data(config)
    first = (tmp_path / "_" / "00000.array_record").read_bytes()

    def recording(path, examples):
        written.append(path.name)
        write(path, examples)

    monkeypatch.setattr(encode, "write_shard", recording)
    directory = encode.encode(config)
    assert written == [f"{i:05d}.array_record" for i in range(3)]
    assert (directory / "00000.array_record").read_bytes() == first
    monkeypatch.undo()
    # In shards or in one, the same latents.
    whole, parts = latents(encode.encode(settings(place)), 1.0), latents(directory, 1.0)
    for i in range(NUM):
        np.testing.assert_array_equal(whole[i]["mean"], parts[i]["mean"])


def test_a_folder_begun_with_other_settings_is_refused(place, encoded):
    del encoded
    other = settings(place, autoencoder__weights=str(place / "weights1.safetensors"))
    with pytest.raises(ConfigError, match=r"started with other settings: digest of the encoder: "):
        encode.encode(other)
    with pytest.raises(ConfigError, match=r"were made with config.autoencoder.weights, encoder"):
        dataset.open_data(other)
    with pytest.raises(ConfigError, match=r"data.image_size: 16 there, 8 now"):
        encode.encode(settings(place, data__image_size=8))
    with pytest.raises(ConfigError, match=r"made with config.data.image_size 16, not 8"):
        dataset.open_data(settings(place, data__image_size=8))
    with pytest.raises(ConfigError, match=r"made with config.data.crop 'center', not 'none'"):
        dataset.open_data(settings(place, data__crop="none"))
    with pytest.raises(ConfigError, match=r"data.exif: 'ignore' there, 'apply' now"):
        encode.encode(settings(place, data__exif="apply"))
    with pytest.raises(ConfigError, match=r"made with config.data.exif 'ignore', not 'apply'"):
        dataset.open_data(settings(place, data__exif="apply"))
    with pytest.raises(ConfigError, match=r"run --mode encode with config.data.split = 'val'"):
        dataset.open_data(settings(place), "val")
    with pytest.raises(ConfigError, match=r"made with config.data.name 'folder', not 'tfds:x'"):
        dataset.open_data(settings(place, data__name="tfds", data__builder="x"))
    with pytest.raises(ConfigError, match="'random' can't be encoded"):
        encode.encode(settings(place, data__crop="random"))
    with pytest.raises(ConfigError, match=r"weights.*: there is no .*"):
        encode.encode(settings(place, autoencoder__weights="nowhere.pt"))


def test_encoding_goes_on_with_settings_that_do_not_change_the_latents(place, encoded, tmp_path):
    shutil.copytree(encoded, tmp_path / "latents" / "_")
    shutil.copytree(place / "images", tmp_path / "moved")
    here = {"autoencoder__latents": str(tmp_path / "latents")}
    moved = here | {"data__dir": str(tmp_path / "moved")}
    for changes in (here | {"data__replace_unreadable": True}, moved):
        assert encode.encode(settings(place, **changes)) == tmp_path / "latents" / "_"
    # Of an older version, which knew only the place of the images.
    plan = tmp_path / "latents" / "_" / "plan.json"
    content = json.loads(plan.read_text())
    known = {name: value for name, value in content.items() if not name.startswith("fingerprint")}
    plan.write_text(json.dumps(known | {"data.replace_unreadable": False}))
    encode.encode(settings(place, **here, data__replace_unreadable=True))
    with pytest.raises(ConfigError, match=r"other settings: data\.dir"):
        encode.encode(settings(place, **moved))
    plan.write_text(json.dumps(content))
    (tmp_path / "moved/class0/00.png").write_bytes(b"another image")
    with pytest.raises(
        ConfigError, match=r"other settings: fingerprint of the images: '\w+' there"
    ):
        encode.encode(settings(place, **moved))


def test_a_damaged_folder_is_named(place, encoded, tmp_path):
    del place
    for path in encoded.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    facts = json.loads((tmp_path / "latents.json").read_text())
    (tmp_path / "latents.json").write_text(json.dumps(facts | {"num_images": 22}))
    with pytest.raises(ValueError, match="has 21 latents in 1 shards instead of 22: run --mode en"):
        latents(tmp_path, 1.0)
    (tmp_path / "latents.json").write_text(json.dumps(facts | {"num_images": 20}))
    with pytest.raises(ValueError, match="instead of 20: encode again into an empty folder"):
        latents(tmp_path, 1.0)
    (tmp_path / "latents.json").write_text("{")
    with pytest.raises(ValueError, match=r"latents.json is damaged"):
        latents(tmp_path, 1.0)
    with pytest.raises(FileNotFoundError, match="has no latents"):
        latents(tmp_path / "nothing", 1.0)


MINE = """
import numpy as np
from ant_jax import data

def squares(split):
    return data.ArraySource(np.zeros((8, 16, 16, 3), np.uint8), name=f"squares[{split}]")

def nothing(split):
    return []
"""


def test_a_source_of_ones_own(place, tmp_path, monkeypatch):
    (tmp_path / "my_sources.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    config = settings(place, data__name="my_sources:squares", autoencoder__name="")
    config_lib.validate(config)
    assert dataset.open_data(config, "val").name == "squares[val]"
    for name, told in {
        "my_sources:nothing": "makes list, not Source: see docs/adding.md",
        "my_sources:none": "'my_sources:none' can't be imported",
        "digit": "must be one of 'arrays', 'digits', .* did you mean 'digits'?",
    }.items():
        with pytest.raises(ConfigError, match=rf"^config.data.name .*{told}"):
            config_lib.update(config, {"data.name": name})
            dataset.open_data(config)


def test_a_truncated_shard_is_named_and_made_again_once_removed(place, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "_SHARD", 8)
    config = settings(place, autoencoder__latents=str(tmp_path))
    shard = encode.encode(config) / "00001.array_record"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    named = r"00001.array_record is damaged: remove it and run --mode encode"
    with pytest.raises(ConfigError, match=named):
        dataset.open_data(config)
    with pytest.raises(ConfigError, match=named):
        encode.encode(config)
    shard.unlink()
    encode.encode(config)
    assert shard.read_bytes() == whole


def test_two_that_encode_into_one_folder(place, tmp_path):
    config = settings(place, autoencoder__latents=str(tmp_path))
    refused = r"^process \d+ on .* is encoding into .*: wait for it, stop it, or choose another"
    with locked(tmp_path / "_" / ".lock"), pytest.raises(InUseError, match=refused):
        encode.encode(config)
    assert os.listdir(tmp_path / "_") == [".lock"]


def test_two_that_write_one_shard_leave_a_whole_one(tmp_path):
    path = shard_path(tmp_path, 0)
    numbers = np.float16(np.random.default_rng(0).standard_normal((5, 2, 1, 3, 3, 2)))

    def examples():
        yield numbers[0], 1
        write_shard(path, ((each, 0) for each in numbers))
        yield from ((each, 1) for each in numbers[1:])

    write_shard(path, examples())
    with pytest.raises(KeyboardInterrupt):
        write_shard(path, itertools.chain([(numbers[0], 2)], raising(KeyboardInterrupt)))
    assert list(tmp_path.iterdir()) == [path]
    complete(tmp_path, FACTS)
    source = latents(tmp_path, 1.0)
    assert [source[i]["label"] for i in range(5)] == [1] * 5


def raising(error):
    raise error
    yield


def poisoned(codec, part, value):
    """An autoencoder of which one number, in that part of its weights, is another."""
    params = codec.params | {part: {"conv_out": dict(codec.params[part]["conv_out"])}}
    params[part] = codec.params[part] | {"conv_out": codec.params[part]["conv_out"]}
    bias = params[part]["conv_out"]["bias"].at[0].set(value)
    params[part]["conv_out"] = params[part]["conv_out"] | {"bias": bias}
    return codec._replace(params=params)


@pytest.mark.parametrize(("value", "told"), [(np.nan, "nan"), (1e6, "such as -?[0-9.]+e[+]0[0-9]")])
def test_latents_that_half_precision_can_not_hold_are_refused(
    value, told, place, encoded, tmp_path, monkeypatch
):
    del encoded
    config = settings(place, autoencoder__latents=str(tmp_path))
    codec = poisoned(dataset.open_codec(config), "encoder", value)
    monkeypatch.setattr(codec_lib, "load", lambda name, weights: codec)
    told = rf"^example \d+ of FolderSource.*numbers of its latent, .*{told}.*float16.*65504"
    with pytest.raises(FloatingPointError, match=told):
        encode.encode(config)
    assert sorted(os.listdir(tmp_path / "_")) == [".lock", "plan.json"]


def test_a_decoder_that_is_not_finite_makes_no_black_pictures(place):
    config = settings(place)
    codec = poisoned(dataset.open_codec(config), "decoder", np.nan)
    told = "11 of 11 images that the autoencoder of config.autoencoder.weights decodes have numbers"
    with pytest.raises(FloatingPointError, match=told):
        codec_lib.decode(codec, np.zeros((11, 4, 4, 4), np.float32), batch_size=4)


@pytest.mark.parametrize(
    ("number", "label", "told"),
    [
        (np.nan, 0, "latent 3 of .* has numbers that are not finite: encode into another folder"),
        (np.inf, 0, "latent 3 of .* has numbers that are not finite: encode into another folder"),
        (1.0, 8, "latent 3 of .* has label 8, but there are 8 classes"),
        (1.0, -1, "latent 3 of .* has label -1, but there are 8 classes"),
    ],
)
def test_latents_that_can_not_be_learned_from_are_named(number, label, told, tmp_path):
    numbers = np.float16(np.random.default_rng(0).standard_normal((5, 2, 1, 3, 3, 2)))
    labels = np.zeros(5, int)
    path = shard_path(tmp_path, 0)
    write_shard(path, zip(numbers, labels, strict=True))
    complete(tmp_path, FACTS)
    numbers[3, 1, 0, 2, 2, 1], labels[3] = number, label
    write_shard(path, zip(numbers, labels, strict=True))
    with pytest.raises(data.ExampleError, match=told):
        next(data.batches(latents(tmp_path, 1.0), batch_size=5, seed=0))
    with pytest.raises(UnreadableImageError, match=told):
        complete(tmp_path, FACTS)
    # Where images may be replaced, latents may.
    source = latents(tmp_path, 1.0)
    batch = next(data.batches(source, batch_size=5, seed=0, replace_unreadable=True))
    assert np.isfinite(batch["image"]).all() and batch["replaced"].sum() == 1


def test_files_of_others_beside_the_shards_do_not_matter(place, encoded, tmp_path):
    del place
    shutil.copytree(encoded, tmp_path / "copy")
    for name in (".DS_Store", "._00000.array_record", ".nfs0001", "Thumbs.db", "x.array_record"):
        (tmp_path / "copy" / name).write_bytes(b"")
    assert len(latents(tmp_path / "copy", 1.0)) == NUM


DAMAGE = {
    "plan.json": ("", "[1]", "7", "[" * 100_000, "\x00"),
    "latents.json": (
        *("", "[1]", "7", "[" * 100_000, "\x00", "{}"),
        *({"shape": [4, 4]}, {"shape": "444"}, {"shape": None}, {"shape": [4, 4, -4]}),
        *({"parts": 3}, {"num_images": "21"}, {"num_images": True}, {"num_classes": -1}),
        *({"std": None}, {"std": 0.0}, {"std": float("nan")}, {"extra": 1}),
    ),
}


def test_damaged_descriptions_are_named(place, encoded, tmp_path):
    del encoded
    config = settings(place, autoencoder__latents=str(tmp_path))
    shutil.copytree(dataset.latents_folder(settings(place), ""), tmp_path / "_")
    for name, contents in DAMAGE.items():
        path = tmp_path / "_" / name
        whole = path.read_text()
        for content in contents:
            changed = content if isinstance(content, str) else json.loads(whole) | content
            path.write_text(changed if isinstance(content, str) else json.dumps(changed))
            do = encode.encode if name == "plan.json" else dataset.open_data
            with pytest.raises(ConfigError, match=rf"{name} is damaged"):
                do(config)
        path.write_text(whole)
    facts = json.loads((tmp_path / "_" / "latents.json").read_text())
    (tmp_path / "_" / "latents.json").write_text(json.dumps(facts | {"shape": [9, 9, 9]}))
    with pytest.raises(ConfigError, match=r"shape of latents \(9, 9, 9\), not \(4, 4, 4\)"):
        dataset.open_data(config)


def test_a_scale_that_does_not_fit_the_latents_is_warned_of(place, encoded, caplog):
    std = latents(encoded, 1.0).info.std
    with caplog.at_level(logging.WARNING):
        dataset.open_data(settings(place, autoencoder__scale=1.5 / std))
        assert not caplog.text
        dataset.open_data(settings(place, autoencoder__scale=0.1 / std))
    assert "gives the latents a standard deviation of 0.1; " in caplog.text
    assert f"{1 / std:.3g} would make it 1" in caplog.text


def test_training_sampling_and_decoding(place, encoded, tmp_path):
    del encoded
    config = settings(place)
    state = train.train(config, tmp_path)
    assert int(state.step) == 3
    assert state.params["output"]["kernel"].shape == (8, 2 * 2 * 4)
    with Image.open(tmp_path / "samples" / "00000003.png") as grid:
        assert grid.size[0] == 10 * 34 + 2
    path = sample.sample(config, tmp_path)
    with np.load(path) as stored:
        images, labels = stored["arr_0"], stored["arr_1"]
    assert images.shape == (11, SIZE, SIZE, 3) and images.dtype == np.uint8
    np.testing.assert_array_equal(labels, np.arange(11) % 2)
    other = settings(place, autoencoder__weights=str(place / "weights1.safetensors"))
    with pytest.raises(ConfigError, match="learned latents of another encoder"):
        sample.sample(other, tmp_path)
    # Not needed for the weights of the network alone.
    gone = settings(place, autoencoder__weights=str(place / "gone.safetensors"))
    exported = interop.read_state(export.export(gone, tmp_path) / "model.safetensors")
    assert exported["final_layer.linear.weight"].shape == (2 * 2 * 4, 8)


def test_another_decoder_of_the_same_encoder_fits_the_latents(place, encoded, tmp_path):
    del encoded
    state = interop.read_state(place / "weights0.safetensors")
    tuned = {
        name: value + 0.01 if name.startswith("decoder.") else value
        for name, value in state.items()
    }
    interop.write_state(tmp_path / "tuned.safetensors", tuned)
    config = settings(place, autoencoder__weights=str(tmp_path / "tuned.safetensors"))
    assert len(dataset.open_data(config)) == NUM
    before, after = dataset.open_codec(settings(place)), dataset.open_codec(config)
    assert before.digest != after.digest


def test_samples_are_the_decoded_latents_with_the_scale_taken_off(place):
    config = settings(place)
    codec = dataset.open_codec(config)
    latents = np.random.default_rng(0).standard_normal((11, 4, 4, 4)).astype(np.float32)
    images = codec_lib.decode(codec, latents, batch_size=4)
    params = jax.device_get(codec.params)
    plain = jax.jit(lambda x: codec.model.apply({"params": params}, x, method="decode"))(latents)
    expected = np.clip(np.round((np.asarray(plain) + 1) * 127.5), 0, 255)
    assert images.shape == (11, SIZE, SIZE, 3) and images.dtype == np.uint8
    np.testing.assert_allclose(images.astype(int), expected, atol=1)


def test_samples_of_another_decoder_do_not_go_on(place, tmp_path):
    weights = tmp_path / "weights.safetensors"
    places = []
    for seed in (0, 0, 1):
        weights.write_bytes((place / f"weights{seed}.safetensors").read_bytes())
        codec_lib._load.cache_clear()
        config = settings(place, autoencoder__weights=str(weights))
        places.append(results.origin(config, 3, {}))
    assert places[0] == places[1] != places[2]
    elsewhere = settings(place, autoencoder__weights=str(place / "weights1.safetensors"))
    assert results.origin(elsewhere, 3, {}) == places[2]


def test_validation_losses_are_of_latents_with_their_scale(place, encoded):
    del encoded
    x0, labels = dataset.images(settings(place), "", 100)
    assert x0.shape == (NUM, 4, 4, 4) and x0.dtype == np.float32
    once = dataset.images(settings(place, autoencoder__scale=1.0), "", 100)[0]
    np.testing.assert_allclose(2 * x0, once, rtol=1e-5)
    assert set(labels) == {0, 1}


def test_every_setting_of_the_autoencoder_but_its_places_is_part_of_a_run(place):
    config = settings(place)
    moved = settings(place, autoencoder__weights="w", autoencoder__latents="l")
    config_lib.check_same(config, moved, "w")
    with pytest.raises(ConfigError, match=r"autoencoder.scale: 0.5 there, 0.7 now"):
        config_lib.check_same(config, settings(place, autoencoder__scale=0.7), "w")
