"""The rendered world is what its factors say, in picture, sound and words.

It is the same with any number of workers.
"""

import itertools
import json
from collections import Counter

import numpy as np
import pytest

av = pytest.importorskip("av")

from vatt_fast.data.captions import load_captions  # noqa: E402
from vatt_fast.data.media import read_clip  # noqa: E402
from vatt_fast.data.media_writer import write_clip  # noqa: E402
from vatt_fast.data.text import Vocabulary, split_words  # noqa: E402
from vatt_fast.demo import world as rendering  # noqa: E402
from vatt_fast.demo.captions import (  # noqa: E402
    MOTION_WORDS,
    NAMED,
    caption_clip,
    query_sentence,
)
from vatt_fast.demo.scene import (  # noqa: E402
    BACKGROUNDS,
    COLOURS,
    FACTORS,
    GLIDE_SEMITONES,
    MOTIONS,
    PERIOD_SECONDS,
    SHAPES,
    SIDE,
    Course,
    Factors,
    contour,
    position,
)
from vatt_fast.demo.sound import HARMONICS, PITCH_HZ, render_audio  # noqa: E402
from vatt_fast.demo.world import (  # noqa: E402
    render_clip,
    render_world,
    seeded,
    split_factors,
)

WHOLE = dict(
    num_frames=32,
    frames_per_second=10.0,
    height=SIDE,
    width=SIDE,
    num_samples=51200,
    sample_rate_hz=16000,
)
FACTOR_WORDS = {
    *SHAPES,
    *COLOURS,
    *BACKGROUNDS,
    "left",
    "right",
    "up",
    "down",
    "growing",
    "shrinking",
    "orbiting",
    "bouncing",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """24 training and 8 test clips, rendered by two processes."""
    return render_world(
        tmp_path_factory.mktemp("world") / "world",
        num_train=24,
        num_test=8,
        seed=3,
        workers=2,
        progress=False,
    )


@pytest.fixture(scope="module")
def full_split():
    return split_factors(1200, 200, seed=0)


@pytest.fixture(scope="module")
def full_captions(full_split):
    """The captions of the demo's training clips, and what each sentence was."""
    train, _ = full_split
    return [caption_clip(index, train, np.random.default_rng(index)) for index in range(len(train))]


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# -- files -----------------------------------------------------------------------------------------


def test_files_are_real_media(world):
    for split, count in (("train", 24), ("test", 8)):
        assert len(list((world / split).glob("*.mp4"))) == count
    with av.open(str(world / "train" / "clip_00000.mp4")) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert video.codec_context.name in ("h264", "mpeg4") and (video.width, video.height) == (
            64,
            64,
        )
        assert video.average_rate == 10 and video.frames == 32
        assert audio.codec_context.name == "aac" and audio.rate == 16000
        assert container.duration / av.time_base == pytest.approx(3.2, abs=0.1)


def test_labels_and_captions_belong_to_the_files(world):
    for split in ("train", "test"):
        names = sorted(path.name for path in (world / split).glob("*.mp4"))
        factors = json.loads((world / split / "factors.json").read_text())
        assert sorted(factors) == names == sorted(load_captions(world / split / "captions.json"))
        assert all(Factors(**values) for values in factors.values())
    queries = json.loads((world / "test" / "queries.json").read_text())
    test = json.loads((world / "test" / "factors.json").read_text())
    assert list(queries) == list(test)
    for name, sentence in queries.items():
        named = set(split_words(sentence)) & FACTOR_WORDS
        assert {
            test[name]["shape"],
            test[name]["colour"],
            test[name]["background"],
        } < named and len(named) == 4


def test_any_number_of_workers_renders_the_same(world, tmp_path):
    assert contents(
        render_world(
            tmp_path / "alone", num_train=24, num_test=8, seed=3, workers=1, progress=False
        )
    ) == contents(world)


def test_another_seed_is_another_world(world, tmp_path):
    other = render_world(
        tmp_path / "other", num_train=2, num_test=1, seed=4, workers=1, progress=False
    )
    assert (other / "train" / "clip_00000.mp4").read_bytes() != (
        world / "train" / "clip_00000.mp4"
    ).read_bytes()


def test_a_complete_world_is_reused_and_an_interrupted_one_completed(tmp_path, monkeypatch):
    arguments = dict(num_train=5, num_test=2, seed=0, workers=1, progress=False)
    original, done = rendering._render_file, []

    def breaking(job):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(job[0].name)
        original(job)

    monkeypatch.setattr(rendering, "_render_file", breaking)
    with pytest.raises(KeyboardInterrupt):
        render_world(tmp_path / "world", **arguments)
    assert json.loads((tmp_path / "world" / "world.json").read_text())["complete"] is False
    monkeypatch.setattr(
        rendering, "_render_file", lambda job: (done.append(job[0].name), original(job))
    )
    render_world(tmp_path / "world", **arguments)
    assert len(done) == 7  # none twice
    monkeypatch.setattr(rendering, "_render_file", None)
    assert render_world(tmp_path / "world", **arguments) == tmp_path / "world"
    monkeypatch.undo()
    assert contents(tmp_path / "world") == contents(render_world(tmp_path / "fresh", **arguments))
    # a clip that got lost comes back
    (tmp_path / "world" / "test" / "clip_00001.mp4").unlink()
    assert contents(render_world(tmp_path / "world", **arguments)) == contents(tmp_path / "fresh")


def test_refusals(world, tmp_path):
    with pytest.raises(ValueError, match=r"holds another world.*delete it or name a new folder"):
        render_world(world, num_train=24, num_test=8, seed=5, progress=False)
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match=r"no world\.json; name a new folder"):
        render_world(tmp_path, num_train=2, num_test=1, progress=False)
    (tmp_path / "world.json").write_text("[]")
    with pytest.raises(ValueError, match="does not describe a rendered world"):
        render_world(tmp_path, num_train=2, num_test=1, progress=False)
    for arguments, message in (
        ({"num_train": 0}, "num_train is 0"),
        ({"num_test": 289}, "num_test 289; they are at least 1, and 0 to 288"),
        ({"seed": -1}, "seed is -1"),
        ({"workers": 0}, "workers is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            render_world(tmp_path / "new", **arguments)
    with pytest.raises(ValueError, match="colour is 'pink'; it is one of red"):
        Factors("circle", "pink", "left", "plain")


# -- factors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_held_out_combinations_are_new_and_their_pairs_are_not(seed):
    train, test = split_factors(1200, 200, seed)
    assert (len(train), len(test), len(set(test))) == (1200, 200, 200)
    assert not set(train) & set(test)
    for a, b in itertools.combinations(FACTORS, 2):
        seen = {(getattr(one, a), getattr(one, b)) for one in train}
        assert len(seen) == len(FACTORS[a]) * len(FACTORS[b])


def test_factors_are_independent(full_split):
    """Chi-squared of every pair stays where chance puts it; all values are about as frequent."""
    train, _ = full_split
    for a, b in itertools.combinations(FACTORS, 2):
        table = np.zeros((len(FACTORS[a]), len(FACTORS[b])))
        for one in train:
            table[FACTORS[a].index(getattr(one, a)), FACTORS[b].index(getattr(one, b))] += 1
        expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
        freedom = (table.shape[0] - 1) * (table.shape[1] - 1)
        assert ((table - expected) ** 2 / expected).sum() < freedom + 3 * np.sqrt(2 * freedom)
        for counts in (table.sum(0), table.sum(1)):
            assert counts.min() > 0.8 * counts.mean() and counts.max() < 1.2 * counts.mean()


# -- picture ---------------------------------------------------------------------------------------


def tracked(factors, seed, tmp_path):
    """Per frame of the decoded file: the shape's middle, in pixels around the torus, and its area.

    The colour tells which pixels are the shape's.
    """
    frames, audio = render_clip(factors, seed)
    write_clip(tmp_path / "clip.mp4", frames, audio)
    video = read_clip(tmp_path / "clip.mp4", start=0.0, **WHOLE).video.astype(float)
    saturation = video.max(-1) - video.min(-1)
    cover = saturation > 70
    turn = np.exp(2j * np.pi * np.arange(SIDE) / SIDE)
    x, y = np.angle((cover.sum(1) * turn).sum(1)), np.angle((cover.sum(2) * turn).sum(1))
    return x * SIDE / (2 * np.pi), y * SIDE / (2 * np.pi), cover.sum((1, 2))


def steps_of(positions):
    """Pixels moved from frame to frame, the short way round."""
    return (np.diff(positions) + SIDE / 2) % SIDE - SIDE / 2


@pytest.mark.parametrize("shape", ["circle", "star"])
@pytest.mark.parametrize("motion", MOTIONS)
def test_decoded_motion_is_the_one_named(motion, shape, tmp_path):
    for seed, colour in ((0, "red"), (1, "blue")):
        x, y, area = tracked(Factors(shape, colour, motion, "checkered"), seed, tmp_path)
        dx, dy, growth = steps_of(x), steps_of(y), np.diff(area) / area[:-1]
        if motion in ("left", "right", "up", "down"):
            along, aside = (dx, dy) if motion in ("left", "right") else (dy, dx)
            sign = 1 if motion in ("right", "down") else -1
            assert (
                np.all(sign * along > 1.5)
                and np.all(sign * along < 7)
                and np.abs(aside).max() < 1.5
            )
        elif motion in ("grow", "shrink"):
            sign = 1 if motion == "grow" else -1
            assert np.mean(sign * growth > 0) > 0.8  # all but the steps where it starts again
            assert np.hypot(dx, dy).max() < 2.5
        elif motion == "orbit":
            turn = np.diff(np.unwrap(np.arctan2(dy, dx)))
            assert (
                np.all(np.sign(turn) == np.sign(turn[0]))
                and np.abs(turn).sum() / (2 * np.pi) * 2 * np.pi > 5
            )
            assert np.hypot(dx, dy).min() > 2
        else:
            assert np.abs(dx).max() < 1.5
            signs = np.sign(dy[np.abs(dy) > 1])
            assert 4 <= np.sum(signs[1:] != signs[:-1]) <= 12 and abs(np.mean(signs)) < 0.5
            fastest = dy[np.abs(dy) > 4]
            assert len(fastest) >= 4  # it flies


def test_one_frame_does_not_give_the_motion_away():
    """In single pictures, the middle of the shape spreads alike whatever the motion."""
    for name in ("x", "y"):
        for motion in MOTIONS:
            places = []
            for seed in range(60):
                generator = np.random.default_rng(seed)
                course = Course.draw(motion, generator)
                x, y, _ = position(motion, course, np.arange(32) / 10)
                places.append({"x": x, "y": y}[name][generator.integers(32)] % SIDE)
            quarters = np.histogram(places, 4, (0, SIDE))[0]
            assert quarters.min() >= 5, (motion, name, quarters)


def test_periods_show_the_motion_within_a_window():
    """A window of 1.6 s holds at least 0.8 of a round, so every motion shows.

    No step is half of space or of a round.
    """
    for motion, (shortest, longest) in PERIOD_SECONDS.items():
        assert 1.6 / longest >= 0.8 and 0.1 / shortest < 0.2, motion


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_colours_and_shapes_survive_coding(background, tmp_path):
    """Decoded, each shape keeps its colour, though chroma has half the resolution.

    It stands out of the background.
    """
    for shape, (colour, rgb) in zip(SHAPES, COLOURS.items(), strict=True):
        frames, audio = render_clip(Factors(shape, colour, "right", background), 5)
        write_clip(tmp_path / "clip.mp4", frames, audio)
        video = read_clip(tmp_path / "clip.mp4", start=0.0, **WHOLE).video[8].astype(float)
        cover = video.max(-1) - video.min(-1) > 70
        assert 120 < cover.sum() < 0.3 * SIDE**2
        inside = np.median(video[cover], axis=0)
        distances = {name: np.abs(inside - value).sum() for name, value in COLOURS.items()}
        assert min(distances, key=distances.get) == colour
        assert np.abs(inside - rgb).max() < 40
        assert (
            video[~cover].max(-1) - video[~cover].min(-1)
        ).mean() < 45  # muted: a tint, no colour
        assert video[~cover].mean() < video[cover].mean() - 40  # and darker than any shape


# -- sound -----------------------------------------------------------------------------------------


def heard(factors, seed, tmp_path):
    _, audio = render_clip(factors, seed)
    write_clip(tmp_path / "clip.mp4", None, audio)
    return read_clip(tmp_path / "clip.mp4", start=0.0, **WHOLE).audio


def pitch_track(audio, seconds=0.064):
    """Base pitch and loudness over time.

    The pitch is the shortest lag at which a piece of sound repeats itself, on a grid of 1/8 sample.
    """
    size, finer = round(seconds * 16000), 8
    lowest, highest = min(PITCH_HZ.values()) * 0.7, max(PITCH_HZ.values()) * 1.4
    lags = np.arange(int(finer * 16000 / highest), int(finer * 16000 / lowest))
    pitches, loudness = [], []
    for first in range(0, len(audio) - size, size):
        piece = audio[first : first + size] * np.hanning(size)
        power = np.abs(np.fft.rfft(piece, 2 * size)) ** 2
        correlation = np.fft.irfft(power, 2 * size * finer)[lags] / (
            1 - lags / finer / size
        )  # the window's own fall
        peaks = (
            np.flatnonzero(
                (correlation[1:-1] >= correlation[:-2]) & (correlation[1:-1] >= correlation[2:])
            )
            + 1
        )
        good = peaks[correlation[peaks] > 0.85 * correlation[peaks].max()]
        pitches.append(16000 * finer / lags[good[0]])
        loudness.append(np.sqrt(np.mean(piece**2)))
    return np.array(pitches), np.array(loudness)


@pytest.mark.parametrize("shape", SHAPES)
def test_pitch_follows_the_shape(shape, tmp_path):
    for motion in ("left", "up"):
        pitches, loudness = pitch_track(heard(Factors(shape, "red", motion, "plain"), 1, tmp_path))
        middle = np.median(pitches[loudness > loudness.max() / 3])
        nearest = min(PITCH_HZ, key=lambda name: abs(np.log(PITCH_HZ[name] / middle)))
        assert nearest == shape, (motion, middle, PITCH_HZ[shape])


def test_waveforms_differ():
    """Shapes differ in more than pitch: the strengths of their harmonics."""
    timbres = {
        tuple(strength / sum(abs(s) for _, s in partials) for _, strength in partials)
        for partials in HARMONICS.values()
    }
    assert len(timbres) == len(SHAPES)


@pytest.mark.parametrize(
    ("motion", "pitch_slope", "loudness_slope"),
    [
        ("left", 0, -1),
        ("right", 0, 1),
        ("up", 1, 0),
        ("down", -1, 0),
        ("grow", -1, 1),
        ("shrink", 1, -1),
    ],
)
def test_contour_follows_the_motion(motion, pitch_slope, loudness_slope, tmp_path):
    """Between two starts of a round pitch and loudness run the way that belongs to the motion."""
    pitches, loudness = pitch_track(heard(Factors("circle", "red", motion, "plain"), 2, tmp_path))
    course = Course.draw(motion, seeded(2))
    times = (np.arange(len(pitches)) + 0.5) * 0.064
    part = course.at(times)
    inside = (part > 0.1) & (part < 0.9)
    semitones = 12 * np.log2(pitches / PITCH_HZ["circle"])
    for values, slope, size in (
        (semitones, pitch_slope, 2 * GLIDE_SEMITONES),
        (loudness / loudness.max(), loudness_slope, 0.8),
    ):
        fitted = np.polyfit(part[inside], values[inside], 1)[0]
        assert fitted == pytest.approx(slope * size, abs=0.3 * size)


def test_bounce_thumps_when_the_picture_is_at_its_lowest():
    factors = Factors("circle", "red", "bounce", "plain")
    course = Course.draw("bounce", seeded(4))
    times = np.arange(3200) / 1000
    _, y, _ = position("bounce", course, times)
    _, loudness = contour("bounce", course, times)
    loudest = times[np.flatnonzero(np.diff(loudness) > 0.5)]
    lowest = times[1:-1][(y[1:-1] >= y[:-2]) & (y[1:-1] >= y[2:])]  # y points down
    assert len(loudest) >= 2
    assert all(np.abs(lowest - time).min() < 0.005 for time in loudest)
    assert render_clip(factors, 4)[1].shape == (51200,)


def test_colour_and_background_are_inaudible_and_noise_is_20_db_below():
    generators = [np.random.default_rng(0) for _ in range(2)]
    course = Course.draw("orbit", np.random.default_rng(1))
    one = render_audio(Factors("ring", "red", "orbit", "plain"), course, generators[0])
    other = render_audio(Factors("ring", "cyan", "orbit", "striped"), course, generators[1])
    np.testing.assert_array_equal(one, other)
    # a sine's noise is what lies away from it
    still = Course(1.0, 0.0, 0, 0, 10, 0, 1)
    audio = render_audio(Factors("circle", "red", "left", "plain"), still, np.random.default_rng(2))
    power = np.abs(np.fft.rfft(audio)) ** 2
    hertz = np.fft.rfftfreq(len(audio), 1 / 16000)
    noise = power[hertz > 1000].sum() * 8000 / 7000
    assert 10 * np.log10(power.sum() / noise) == pytest.approx(20, abs=0.7)


# -- words -----------------------------------------------------------------------------------------


def test_captions_are_five_to_eight_spread_over_the_clip(full_captions):
    counts = Counter(len(captions) for captions in full_captions)
    assert set(counts) == {5, 6, 7, 8} and min(counts.values()) > 200
    for captions in full_captions:
        assert all(0 <= one["start"] < one["end"] <= 3.2 for one in captions)
        middles = [(one["start"] + one["end"]) / 2 for one in captions]
        assert min(middles) < 1.1 and max(middles) > 2.1
        assert max(len(split_words(one["text"])) for one in captions) <= 16


def test_shares_of_telling_unrelated_and_foreign_captions(full_split, full_captions):
    train, _ = full_split
    kinds = Counter()
    words_of_motion = {
        motion: set(" ".join(phrases).split()) & FACTOR_WORDS
        for motion, phrases in MOTION_WORDS.items()
    }
    for factors, captions in zip(train, full_captions, strict=True):
        own = {factors.shape, factors.colour, factors.background, *words_of_motion[factors.motion]}
        for one in captions:
            named = set(split_words(one["text"])) & FACTOR_WORDS
            kinds["unrelated" if not named else "own" if named <= own else "foreign"] += 1
    total = sum(kinds.values())
    # a foreign caption that happens to fit counts as the clip's own
    assert kinds["unrelated"] / total == pytest.approx(0.25, abs=0.02)
    assert kinds["own"] / total == pytest.approx(0.71, abs=0.02)
    assert kinds["foreign"] / total == pytest.approx(0.045, abs=0.015)


def test_telling_captions_name_each_part_as_often_as_they_should(full_split, full_captions):
    train, _ = full_split
    named = Counter()
    for factors, captions in zip(train, full_captions, strict=True):
        for one in captions:
            words = split_words(one["text"])
            named.update(
                name
                for name in ("shape", "colour", "background")
                if getattr(factors, name) in words
            )
    for name, count in named.items():
        assert count / named["colour"] == pytest.approx(NAMED[name] / NAMED["colour"], rel=0.1)


def test_queries_use_words_of_the_captions(full_split, full_captions):
    vocabulary = Vocabulary.build(
        [one["text"] for captions in full_captions for one in captions], max_size=512
    )
    assert len(vocabulary) < 512
    _, test = full_split
    queries = [query_sentence(factors) for factors in test]
    assert len(set(queries)) == 200
    assert all(word in vocabulary for sentence in queries for word in split_words(sentence))
