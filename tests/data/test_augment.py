"""Augmentation: against TensorFlow's definitions written out in fp64, the same on every instruction
set, and a pure function of (seed, step, row)."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from native_fixtures import LEVELS, held_to
from training_runs import MODEL, write_media

from vatt_fast.data import augment as augment_module
from vatt_fast.data.augment import (
    WHOLE,
    AreaCrop,
    Augment,
    Box,
    ColourJitter,
    Frames,
    JitterCrop,
    Key,
    augment_clip,
    augmentation,
    crop_clips,
    crop_frames,
    parts_of,
)
from vatt_fast.data.clips import ClipSpec
from vatt_fast.data.colours import (
    Colours,
    change_clips_in_torch,
    change_colours,
    change_colours_in_torch,
)
from vatt_fast.data.dataset import ClipDataset
from vatt_fast.data.loader import loader
from vatt_fast.kernels import native

KEY = Key(3, 17, 40)
built = pytest.mark.skipif(native.extension is None, reason=f"the extension is {native.explain()}")


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


# -- tf.image.adjust_* in fp64, by way of HSV ------------------------------------------------------


def to_hsv(rgb):
    r, g, b = np.moveaxis(rgb, -1, 0)
    v, low = rgb.max(-1), rgb.min(-1)
    spread = v - low
    with np.errstate(divide="ignore", invalid="ignore"):
        s = np.where(v > 0, spread / v, 0.0)
        h = np.where(
            r == v,
            (g - b) / (6 * spread),
            np.where(g == v, (b - r) / (6 * spread) + 2 / 6, (r - g) / (6 * spread) + 4 / 6),
        )
    h = np.where(spread <= 0, 0.0, h)
    return h % 1.0, s, v


def to_rgb(h, s, v):
    c = s * v
    m = v - c
    sixth = h * 6
    x = c * (1 - np.abs(sixth % 2 - 1))
    zero = np.zeros_like(c)
    faces = [(c, x, zero), (x, c, zero), (zero, c, x), (zero, x, c), (x, zero, c), (c, zero, x)]
    face = np.floor(sixth).astype(int) % 6
    planes = [np.choose(face, [each[channel] for each in faces]) for channel in range(3)]
    return np.stack(planes, -1) + m[..., None]


def as_tensorflow(frames, colours):
    x = frames / 255.0
    x = x + colours.brightness / 16 / 255
    h, s, v = to_hsv(x)
    x = to_rgb(h, np.clip(s * colours.saturation / 1024, 0, 1), v)
    mean = x.mean((1, 2), keepdims=True)
    x = (x - mean) * colours.contrast / 256 + mean
    # adjust_hue turns the hue and leaves the largest and the smallest channel
    low = x.min(-1, keepdims=True)
    h, s, v = to_hsv(x - low)
    x = to_rgb((h + colours.hue / 384) % 1.0, s, v) + low
    return np.clip(x, 0, 1) * 255


CHANGES = [
    Colours(),
    Colours(brightness=512),
    Colours(brightness=-512),
    Colours(saturation=1434),
    Colours(saturation=614),
    Colours(contrast=358),
    Colours(contrast=154),
    Colours(hue=77),
    Colours(hue=-77),
    Colours(512, 1434, 358, 77),
    Colours(-512, 614, 154, -77),
    Colours(-300, 1434, 300, -40),
    Colours(1024, 2048, 512, 192),
    Colours(-1024, 0, 0, -192),
]


@pytest.mark.parametrize("colours", CHANGES, ids=str)
def test_colours_are_tensorflows(colours):
    frames = pixels(3, 37, 53)
    frames[0, :8] = frames[0, :8, :, :1]  # greys
    frames[1] //= 8  # dark, where saturation ends at 0
    found = change_colours(torch.from_numpy(frames.copy()), colours).numpy()
    error = np.abs(found - as_tensorflow(frames, colours))
    assert error.max() < 1.0 and error.mean() < 0.26  # rounding to whole levels has a mean of 0.25


def test_nothing_asked_changes_nothing():
    frames = torch.from_numpy(pixels(2, 16, 20))
    assert torch.equal(change_colours(frames.clone(), Colours()), frames)


@built
@pytest.mark.parametrize(
    "level", [level for level in LEVELS if level in ("base", "avx2", "avx512")]
)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 7), (3, 16, 8), (2, 33, 47)])
def test_every_instruction_set_gives_torchs_bytes(level, shape, request):
    with held_to(level, request):
        for number, colours in enumerate(CHANGES):
            frames = torch.from_numpy(pixels(*shape, seed=number))
            expected = change_colours_in_torch(frames, colours)
            assert torch.equal(change_colours(frames, colours), expected), colours


@built
@hypothesis_settings(max_examples=30, deadline=None)
@given(
    st.builds(
        Colours,
        st.integers(-1024, 1024),
        st.integers(0, 2048),
        st.integers(0, 512),
        st.integers(-192, 192),
    ),
    st.integers(0, 1000),
)
def test_any_change_gives_torchs_bytes(colours, seed):
    frames = torch.from_numpy(pixels(2, 9, 31, seed=seed))
    expected = change_colours_in_torch(frames, colours)
    assert torch.equal(change_colours(frames, colours), expected)


def test_clips_changed_together_have_the_bytes_of_each_alone():
    clips = torch.from_numpy(np.stack([pixels(2, 9, 31, seed=n) for n in range(len(CHANGES))]))
    together = change_clips_in_torch(clips, CHANGES)
    for clip, found, colours in zip(clips, together, CHANGES, strict=True):
        assert torch.equal(found, change_colours_in_torch(clip, colours)), colours
    assert torch.equal(change_clips_in_torch(clips, [Colours()] * len(clips)), clips)


@pytest.mark.parametrize(
    "parts", ["crop,flip,colour", "jitter_crop,flip", "flip,colour", "flip", "noise"]
)
def test_what_a_device_changes_together_equals_each_clip_alone(parts, monkeypatch):
    """A CPU runs here what a device would; ``test_a_gpu_gives_the_same_bytes`` is of one."""
    augment = augmentation(parts, 40, 56)
    clips = torch.from_numpy(pixels(12, 3, 40, 56))
    keys = [Key(0, 2, row) for row in range(12)]
    alone = augment(clips, keys)
    monkeypatch.setattr(Augment, "_clip_by_clip", Augment._clips)
    monkeypatch.setattr(augment_module, "_PIXELS_AT_ONCE", 5 * clips[0, ..., 0].numel())
    together = augment(clips, keys)
    if "crop" not in parts:
        assert torch.equal(together, alone)
    elif "colour" not in parts:
        assert (together.int() - alone.int()).abs().max() <= 2
    else:  # colours multiply what rounding left
        assert (together.int() - alone.int()).abs().float().mean() < 0.5
    assert torch.equal(alone, clips) == (parts == "noise")  # which is of sounds


@pytest.mark.parametrize(
    "box", [WHOLE, Box(0.99, 0.99, 0.01, 0.01), Box(0.1, 0.3, 0.37, 0.6)], ids=str
)
def test_crops_as_products_of_matrices_are_those_of_one_clip(box):
    clips = torch.from_numpy(pixels(2, 3, 41, 57))
    boxes = [box, Box(0.2, 0.1, 0.5, 0.8)]
    found = crop_clips(clips, boxes)
    for clip, one, its in zip(clips, found, boxes, strict=True):
        assert (one.int() - crop_frames(clip, its, 41, 57).int()).abs().max() <= 2
    if box == WHOLE:
        assert torch.equal(found[0], clips[0])


@pytest.mark.gpu
def test_a_gpu_gives_the_same_bytes():
    augment = augmentation("flip,colour,noise", 32, 48)
    frames = torch.from_numpy(pixels(4, 3, 32, 48))
    keys = [Key(0, 1, row) for row in range(4)]
    found = augment(frames.cuda(), keys).cpu()
    assert torch.equal(found, augment(frames, keys))
    sound = torch.randn(4, 1000)
    assert torch.equal(augment.sounds(sound.cuda(), keys).cpu(), augment.sounds(sound, keys))
    cropped = augmentation("crop", 32, 48)
    apart = cropped(frames.cuda(), keys).cpu().int() - cropped(frames, keys).int()
    assert apart.abs().max() <= 2  # the CPU's kernel for bytes has weights of few bits


def test_bad_colours_and_frames_are_refused():
    with pytest.raises(ValueError, match="hue is 200; it lies between -192 and 192"):
        Colours(hue=200)
    with pytest.raises(ValueError, match=r"frames are \(2, 4, 4\) torch.uint8"):
        change_colours(torch.zeros(2, 4, 4, dtype=torch.uint8), Colours())
    with pytest.raises(ValueError, match="2 keys for 1 clips"):
        Augment()(torch.zeros(1, 1, 4, 4, 3, dtype=torch.uint8), [KEY, KEY])


def test_draws_span_their_ranges():
    jitter = ColourJitter()
    rng = np.random.default_rng(0)
    drawn = [jitter.draw(rng.random(5)) for _ in range(4000)]
    changed = [one for one in drawn if one is not None]
    assert len(changed) / len(drawn) == pytest.approx(0.8, abs=0.03)
    limits = dict(
        brightness=(-512, 512), saturation=(614, 1434), contrast=(154, 358), hue=(-77, 77)
    )
    for name, (low, high) in limits.items():
        values = [getattr(one, name) for one in changed]
        room = (high - low) * 0.02
        assert low <= min(values) < low + room and high - room < max(values) <= high
        assert np.mean(values) == pytest.approx((low + high) / 2, abs=(high - low) * 0.03)


# -- crops -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(240, 320), (320, 180), (64, 64), (10, 200), (500, 40)])
def test_area_crops_have_the_area_and_shape_asked_for(size):
    height, width = size
    areas, shapes = [], []
    for row in range(600):
        box = Augment(AreaCrop()).crop(Key(0, 0, row), height, width)
        assert 0 <= box.top <= 1 - box.height + 1e-12 and 0 <= box.left <= 1 - box.width + 1e-12
        areas.append(box.height * box.width)
        shapes.append(box.width * width / (box.height * height))
    assert 0.08 - 1e-9 <= min(areas) < 0.1 and max(areas) <= 1 + 1e-9
    assert min(shapes) >= 0.5 - 1e-9 and max(shapes) <= 2 + 1e-9
    if size == (64, 64):
        assert min(shapes) < 0.52 and max(shapes) > 1.95 and max(areas) > 0.8


def test_a_picture_too_long_for_any_crop_is_taken_whole():
    assert Augment(AreaCrop()).crop(KEY, 4, 400) == Box(0.0, 0.0, 1.0, 1.0)


def test_jittered_crops_cover_the_picture_one_way():
    aspects = []
    for row in range(300):
        box = Augment(JitterCrop(clip_shape=2.0)).crop(Key(0, 0, row), 200, 300)
        assert max(box.height, box.width) == pytest.approx(1)
        assert 0 <= box.top <= 1 - box.height + 1e-12 and 0 <= box.left <= 1 - box.width + 1e-12
        aspects.append(box.width * 300 / (box.height * 200) / 2)
    still = np.isclose(aspects, 1)
    assert still.mean() == pytest.approx(0.2, abs=0.07)
    assert min(aspects) >= 0.8 / 1.2 - 1e-9 and max(aspects) <= 1.2 / 0.8 + 1e-9
    assert min(aspects) < 0.75 and max(aspects) > 1.35


def test_crops_are_scaled_without_aliasing():
    """Against triangles summed in fp64."""
    frames = pixels(2, 41, 57)
    box = Box(5 / 41, 7 / 57, 32 / 41, 45 / 57)
    part = frames[:, 5:37, 7:52].astype(float)

    def weights(size, to):
        scale = max(size / to, 1.0)
        middle = (np.arange(to) + 0.5) * size / to
        reach = np.abs(np.arange(size) + 0.5 - middle[:, None]) / scale
        found = np.maximum(1 - reach, 0)
        return found / found.sum(1, keepdims=True)

    for height, width in ((16, 16), (64, 80), (20, 60)):
        expected = np.einsum("yh,xw,thwc->tyxc", weights(32, height), weights(45, width), part)
        found = crop_frames(torch.from_numpy(frames), box, height, width).numpy()
        assert np.abs(found - expected).max() < 1.6
    whole = crop_frames(torch.from_numpy(frames), box, 32, 45).numpy()
    assert (whole == frames[:, 5:37, 7:52]).all()


# -- clips -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["paper", "released"])
def test_a_batch_equals_its_clips_whatever_is_around_them(recipe):
    augment = augmentation(parts_of("recipe", recipe), 24, 32)
    frames, sound = pixels(5, 2, 24, 32), np.random.default_rng(1).random((5, 400), np.float32)
    keys = [Key(0, step, row) for step, row in ((0, 0), (0, 1), (3, 1), (3, 9), (4, 0))]
    together = augment(torch.from_numpy(frames), keys).numpy()
    heard = augment.sounds(torch.from_numpy(sound), keys).numpy()
    assert not (together == frames).all((1, 2, 3, 4)).any()
    for row, key in enumerate(keys):
        alone = augment_clip(augment, key, frames[row].copy(), sound[row].copy())
        assert (alone[0] == together[row]).all() and (alone[1] == heard[row]).all()
    backwards = augment(torch.from_numpy(frames[::-1].copy()), keys[::-1]).numpy()
    assert (backwards[::-1] == together).all()


def test_all_frames_of_a_clip_change_alike():
    augment, frames = augmentation("crop,flip,colour", 24, 32), pixels(1, 24, 32)
    frames = np.repeat(frames, 6, axis=0)
    for row in range(8):
        video, _ = augment_clip(augment, Key(0, 0, row), frames.copy(), None)
        assert (video == video[:1]).all()


def test_half_of_the_clips_are_mirrored():
    augment, frames = augmentation("flip", 4, 5), pixels(2, 4, 5)
    mirrored = 0
    for row in range(400):
        found = augment.frames(Key(0, 0, row), frames.copy())
        assert (found == frames).all() or (found == frames[:, :, ::-1]).all()
        mirrored += not (found == frames).all()
    assert mirrored / 400 == pytest.approx(0.5, abs=0.08)


def test_noise_is_a_hundredth_of_the_loudest_sample():
    augment = augmentation("noise", 4, 4)
    sound = np.sin(np.arange(40_000, dtype=np.float32)) * np.float32(0.5)
    noise = augment.sound(KEY, sound.copy()) - sound
    assert noise.std() == pytest.approx(0.005, rel=0.03) and abs(noise.mean()) < 1e-4
    assert np.mean(np.abs(noise) < 0.005) == pytest.approx(0.683, abs=0.01)
    assert not augment.sound(KEY, np.zeros(100, np.float32)).any()


def test_names_of_parts():
    assert parts_of("recipe", "paper") == "crop,flip,colour"
    assert parts_of("recipe", "released") == "jitter_crop,flip,colour,noise"
    assert parts_of("colour,flip", "paper") == "flip,colour" and parts_of("none", "paper") == "none"
    assert augmentation("none", 8, 8) is None
    with pytest.raises(ValueError, match="'grey' is none of crop, jitter_crop"):
        parts_of("flip,grey", "paper")
    with pytest.raises(ValueError, match="one of the two crops"):
        parts_of("crop,jitter_crop", "paper")


# -- batches ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_media(tmp_path_factory.mktemp("media"))


def batches(folder, augment, workers=0, **options):
    spec = ClipSpec.from_config(dataclasses.replace(MODEL, height=24, width=24))
    options = dict(batch_size=4, seed=5) | options
    dataset = ClipDataset(folder, spec, vocabulary=None, augment=augment, **options)
    return [batch.clone() for batch in loader(dataset, 0, 3, workers)]


def test_augmented_batches_do_not_depend_on_workers_ranks_or_a_cache(folder, tmp_path):
    augment = augmentation("crop,flip,colour,noise", 24, 24)
    one = batches(folder, augment)
    plain = batches(folder, None)
    assert any(not torch.equal(a.video, b.video) for a, b in zip(one, plain, strict=True))
    assert all(a.files == b.files for a, b in zip(one, plain, strict=True))
    for a, b in zip(one, batches(folder, augment, workers=2), strict=True):
        assert torch.equal(a.video, b.video) and torch.equal(a.audio, b.audio)
    ranks = [batches(folder, augment, batch_size=2, rank=rank, world=2) for rank in range(2)]
    for whole, *parts in zip(one, *ranks, strict=True):
        assert torch.equal(whole.video, torch.cat([part.video for part in parts]))
        assert torch.equal(whole.audio, torch.cat([part.audio for part in parts]))


def test_any_callable_takes_the_place(folder):
    seen = []

    def dim(key, frames):
        seen.append(key)
        return frames // 2

    for dimmed, plain in zip(batches(folder, Frames(dim)), batches(folder, None), strict=True):
        assert torch.equal(dimmed.video, plain.video // 2)
        assert torch.equal(dimmed.audio, plain.audio)
    assert seen[:4] == [Key(5, 0, row) for row in range(4)]
    with pytest.raises(ValueError, match="shape and dtype must stay"):
        Frames(lambda key, frames: frames[:1]).frames(KEY, pixels(2, 4, 4))
