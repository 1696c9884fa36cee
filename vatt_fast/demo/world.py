"""The small world: rendered clips with a sound and a narration, made of four independent factors.

A coloured shape moves over a patterned background. Its sound tells the shape (waveform and base pitch) and the motion (contour of
pitch and loudness, in step with the picture) and nothing else; its captions tell a part of everything, among sentences that tell
nothing. Phase, period, place and size are random and space wraps around, so a single frame does not give the motion away, and
held-out clips combine the factors in ways never seen in training: what is retrieved must be understood factor by factor.

    folder/world.json      what was rendered; "complete" appears last
    folder/train/          clip_00000.mp4 ..., captions.json, factors.json
    folder/test/           the same, and queries.json: {file: one sentence naming all four factors}
"""

import itertools
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.media import write_clip

SIDE = 64  # pixels; space wraps around at this length
SECONDS = 3.2
FRAMES_PER_SECOND = 10
SAMPLE_RATE_HZ = 16000
NOISE_BELOW_SIGNAL_DB = 20

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {
    "red": (255, 70, 60),
    "green": (70, 220, 90),
    "blue": (90, 130, 255),
    "yellow": (250, 230, 60),
    "purple": (225, 95, 250),
    "cyan": (70, 230, 235),
}  # all brighter than any background: an edge means the same in every colour
MOTIONS = ("left", "right", "up", "down", "grow", "shrink", "orbit", "bounce")
BACKGROUNDS = ("plain", "striped", "checkered", "dotted")
TINTS = {"plain": (0, 0, 0), "striped": (0, 0, 28), "checkered": (0, 22, 0), "dotted": (28, 0, 0)}
FACTORS: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "motion": MOTIONS,
    "background": BACKGROUNDS,
}

# Share of each kind of caption, and how often a telling one names each factor: what is seen at a glance the least.
ABOUT_THE_CLIP, UNRELATED, ABOUT_ANOTHER = 0.70, 0.25, 0.05
NAMED = {"shape": 0.75, "colour": 0.5, "motion": 0.9, "background": 0.5}
WORDS_AT_MOST = 16

# At most a quarter of the combinations is held out, so that training still sees every pair of values.
MOST_HELD_OUT = math.prod(len(values) for values in FACTORS.values()) // 4

# How the generator's streams are told apart.
_COMBINATIONS, _RENDERING, _CAPTIONS = range(3)
_SPLITS = ("train", "test")


@dataclass(frozen=True)
class Factors:
    """What a clip shows. Raises ValueError for values that the world does not have."""

    shape: str
    colour: str
    motion: str
    background: str

    def __post_init__(self):
        for name, values in FACTORS.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it is one of {', '.join(values)}"
                )


# -- motion: one function of time for picture and sound ----------------------------------------------------------------

# Seconds of one round. Steady motions cross 3 to 5 pixels a frame; every round fits into a window of 1.6 s or nearly so.
PERIOD_SECONDS = {
    **dict.fromkeys(("left", "right", "up", "down", "orbit"), (1.2, 2.0)),
    **dict.fromkeys(("grow", "shrink"), (0.9, 1.5)),
    "bounce": (0.7, 1.1),
}
ORBIT_RADIUS = (12.0, 16.0)
BOUNCE_HEIGHT = (24.0, 32.0)
SIZE = (12.5, 13.5)  # half the width of a shape, times:
RELATIVE_SIZE = {
    "circle": 0.6,
    "star": 0.75,
    "triangle": 0.95,
    "square": 1.05,
    "cross": 1.3,
    "ring": 1.4,
}  # tells at the scale of a patch
GROWTH = (0.55, 1.4)  # factors between which the size of a growing shape runs
GLIDE_SEMITONES = 3.5  # either way; less than half the distance between two shapes' pitches
QUIET = 0.2  # the softest loudness, the loudest being 1


@dataclass(frozen=True)
class Course:
    """The random part of one clip's motion. ``at`` gives how far each time is into its round, 0 to 1."""

    period_seconds: float
    phase: float
    x: float
    y: float
    size: float
    reach: float  # pixels: radius of the orbit or height of the bounce
    turn: int  # sense of the orbit

    @classmethod
    def draw(cls, motion: str, generator: np.random.Generator) -> "Course":
        reach = {"orbit": ORBIT_RADIUS, "bounce": BOUNCE_HEIGHT}.get(motion, (0.0, 0.0))
        return cls(
            period_seconds=generator.uniform(*PERIOD_SECONDS[motion]),
            phase=generator.random(),
            x=generator.uniform(0, SIDE),
            y=generator.uniform(0, SIDE),
            size=generator.uniform(*SIZE),
            reach=generator.uniform(*reach),
            turn=int(generator.choice([-1, 1])),
        )

    def at(self, seconds: np.ndarray) -> np.ndarray:
        return (seconds / self.period_seconds + self.phase) % 1.0


def _position(
    motion: str, course: Course, seconds: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, y (downwards, before wrapping) and size at each time."""
    part = course.at(seconds)
    still = np.zeros_like(part)
    x, y, size = course.x + still, course.y + still, course.size + still
    low, high = GROWTH
    if motion == "left":
        x -= SIDE * part
    elif motion == "right":
        x += SIDE * part
    elif motion == "up":
        y -= SIDE * part
    elif motion == "down":
        y += SIDE * part
    elif motion == "grow":
        size *= low * (high / low) ** part
    elif motion == "shrink":
        size *= high * (low / high) ** part
    elif motion == "orbit":
        x += course.reach * np.cos(2 * np.pi * part)
        y += course.turn * course.reach * np.sin(2 * np.pi * part)
    else:
        y -= course.reach * np.sin(np.pi * part)
    return x, y, size


def _contour(motion: str, course: Course, seconds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pitch offset in semitones and loudness (QUIET to 1) at each time: each motion has its own pair."""
    part = course.at(seconds)
    level = np.zeros_like(part)
    rising = GLIDE_SEMITONES * (2 * part - 1)
    swelling = QUIET + (1 - QUIET) * part
    fading = QUIET + (1 - QUIET) * (1 - part)
    if motion == "left":
        return level, fading
    if motion == "right":
        return level, swelling
    if motion == "up":
        return rising, level + 1
    if motion == "down":
        return -rising, level + 1
    if motion == "grow":
        return -rising, swelling
    if motion == "shrink":
        return rising, fading
    if motion == "orbit":
        turning = 2 * np.pi * part
        return GLIDE_SEMITONES * np.sin(turning), QUIET + (1 - QUIET) * (
            0.5 + 0.5 * np.cos(turning)
        )
    return GLIDE_SEMITONES * (2 * np.sin(np.pi * part) - 1), QUIET + (1 - QUIET) * np.exp(
        -5 * part
    )  # a thump on the floor


# -- picture -----------------------------------------------------------------------------------------------------------


def _outline(shape: str, x: np.ndarray, y: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Distance in pixels to the shape's edge, negative inside; x and y from its middle."""
    if shape == "circle":
        return np.hypot(x, y) - size
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.88 * size
    if shape == "triangle":
        slant = np.sqrt(3) / 2
        return np.maximum(np.maximum(y, slant * x - y / 2), -slant * x - y / 2) - 0.66 * size
    if shape == "star":
        outer, inner, step = 1.35, 0.55, np.pi / 5
        angle = np.abs(
            (np.arctan2(x, -y) + step) % (2 * step) - step
        )  # every edge folded onto the one right of the upper tip
        along, across = np.hypot(x, y) * np.cos(angle), np.hypot(x, y) * np.sin(angle)
        edge = np.array([inner * np.cos(step) - outer, inner * np.sin(step)])
        normal = np.array([edge[1], -edge[0]]) / np.hypot(*edge)
        return along * normal[0] + across * normal[1] - outer * normal[0] * size
    if shape == "cross":
        long, short = 1.15 * size, 0.38 * size
        x, y = np.abs(x), np.abs(y)
        return np.minimum(np.maximum(x - long, y - short), np.maximum(x - short, y - long))
    return np.abs(np.hypot(x, y) - 0.85 * size) - 0.3 * size


def _background(background: str, generator: np.random.Generator) -> np.ndarray:
    """(SIDE, SIDE, 3) float: two dark, slightly tinted greys in a pattern whose place is random."""
    rows, columns = np.mgrid[:SIDE, :SIDE] + generator.integers(0, 16, 2)[:, None, None]
    if generator.random() < 0.5:
        rows, columns = columns, rows
    if background == "plain":
        light = np.full((SIDE, SIDE), 0.5)
    elif background == "striped":
        light = (rows // 8 % 2).astype(float)
    elif background == "checkered":
        light = ((rows // 8 + columns // 8) % 2).astype(float)
    else:
        light = (np.hypot(rows % 16 - 7.5, columns % 16 - 7.5) < 4.5).astype(float)
    grey = generator.uniform(15, 30) + 35 * light
    return grey[..., None] + TINTS[background] + generator.uniform(-6, 6, 3)


def render_frames(factors: Factors, course: Course, generator: np.random.Generator) -> np.ndarray:
    """(T, SIDE, SIDE, 3) uint8: the whole clip's pictures, edges smooth."""
    seconds = np.arange(round(SECONDS * FRAMES_PER_SECOND)) / FRAMES_PER_SECOND
    x, y, size = (
        values[:, None, None].astype(np.float32)
        for values in _position(factors.motion, course, seconds)
    )
    rows, columns = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    half = SIDE / 2
    across, down = (columns - x + half) % SIDE - half, (rows - y + half) % SIDE - half
    size = size * np.float32(RELATIVE_SIZE[factors.shape])
    cover = np.clip(0.5 - _outline(factors.shape, across, down, size), 0, 1)[..., None]
    colour = (np.array(COLOURS[factors.colour]) + generator.uniform(-8, 8, 3)).astype(np.float32)
    ground = _background(factors.background, generator).astype(np.float32)
    return np.clip(ground + cover * (colour - ground) + 0.5, 0, 255).astype(np.uint8)


# -- sound -------------------------------------------------------------------------------------------------------------

# Base pitches lie 8 semitones apart, so glides of neighbours do not meet, and high enough for a glide to show within one patch of 8 ms.
# Waveforms are sums of harmonics: (number, strength), as far as they lie below HIGHEST_HZ.
PITCH_HZ = {shape: 300.0 * 1.6**place for place, shape in enumerate(SHAPES)}
HIGHEST_HZ = 6500.0  # glides stay below half the sample rate
LOUDEST = 0.9  # of full scale, in every clip
_HARMONICS: dict[str, tuple[tuple[int, float], ...]] = {
    "circle": ((1, 1.0),),  # a sine
    "square": tuple((n, 1 / n) for n in (1, 3, 5, 7, 9, 11)),
    "triangle": tuple((n, (-1) ** (n // 2) / n**2) for n in (1, 3, 5, 7)),
    "star": tuple((n, 1 / n) for n in range(1, 11)),  # a sawtooth
    "cross": ((1, 1.0), (2, 0.9), (4, 0.6), (8, 0.3)),  # an organ
    "ring": ((1, 0.7), (3, 1.0), (4, 0.6)),  # a bell
}


def render_audio(factors: Factors, course: Course, generator: np.random.Generator) -> np.ndarray:
    """(S,) float32 in [-1, 1]: the shape's voice along the motion's contour, noise 20 dB below it."""
    seconds = np.arange(round(SECONDS * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    semitones, loudness = _contour(factors.motion, course, seconds)
    pitch_hz = PITCH_HZ[factors.shape] * 2.0 ** (semitones / 12)
    turns = np.cumsum(pitch_hz) / SAMPLE_RATE_HZ + generator.random()
    turn = np.exp(2j * np.pi * (turns % 1.0))
    voice, power, reached = np.zeros_like(seconds), np.ones_like(turn), 0
    for number, strength in _HARMONICS[factors.shape]:
        if number * PITCH_HZ[factors.shape] > HIGHEST_HZ:  # the same harmonics whatever the motion
            break
        while reached < number:
            power = power * turn
            reached += 1
        voice += strength * power.imag
    voice *= loudness / np.sqrt(np.mean(voice**2))
    voice *= LOUDEST / np.abs(voice).max()
    noise = (
        generator.normal(size=len(voice))
        * np.sqrt(np.mean(voice**2))
        * 10 ** (-NOISE_BELOW_SIGNAL_DB / 20)
    )
    return np.clip(voice + noise, -1, 1).astype(np.float32)


# -- words -------------------------------------------------------------------------------------------------------------

_MOTION_WORDS = {
    "left": ("moving left", "sliding left", "going to the left"),
    "right": ("moving right", "sliding right", "going to the right"),
    "up": ("moving up", "floating up", "going all the way up"),
    "down": ("moving down", "sinking down", "going all the way down"),
    "grow": ("growing", "growing bigger", "growing larger"),
    "shrink": ("shrinking", "shrinking smaller", "shrinking to a small size"),
    "orbit": ("orbiting", "orbiting around", "orbiting in a loop"),
    "bounce": ("bouncing", "bouncing along", "bouncing off the floor"),
}
_OPENERS = (
    "",
    "",
    "now we see",
    "look there is",
    "here comes",
    "you can see",
    "and this is",
    "okay so we have",
    "next comes",
)
_ENDINGS = ("", "", "", "again", "as you see", "just like that", "for a while", "on the screen")
_NOUNS = ("background", "background", "wall", "backdrop")
_UNRELATED = (
    "please remember to subscribe to the channel",
    "let me know what you think in the comments",
    "{today} I had {food} with my {friend}",
    "we will be back after a short break",
    "thank you so much for watching {today}",
    "my {friend} told me a funny story {today}",
    "the weather was really nice {today}",
    "I should clean the kitchen before my {friend} arrives",
    "first you need some {food} and a little patience",
    "do not forget to add {food} to the shopping list",
    "the train was late {today} so I walked",
    "we talked about {food} and music for hours",
    "that is what my {friend} always says",
    "I have been thinking about buying a new camera",
    "the link is below if you want to learn more",
    "so anyway where was I before the phone rang",
)
_SLOTS = {
    "today": ("today", "yesterday", "this morning", "last week"),
    "food": ("coffee", "soup", "bread", "rice", "tea"),
    "friend": ("friend", "brother", "sister", "neighbour"),
}


def _pick(generator: np.random.Generator, options: Iterable[str]) -> str:
    options = tuple(options)
    return options[int(generator.integers(len(options)))]


def telling_sentence(factors: Factors, generator: np.random.Generator) -> str:
    """A sentence that names a random, non-empty part of the factors, with filler words around it."""
    named: set[str] = set()
    while not named:
        named = {name for name in FACTORS if generator.random() < NAMED[name]}
    thing = [_pick(generator, ("a", "the", "this"))]
    if generator.random() < 0.2:
        thing.append(_pick(generator, ("nice", "little", "simple", "funny")))
    if "colour" in named:
        thing.append(factors.colour)
    thing.append(
        factors.shape if "shape" in named else _pick(generator, ("thing", "object", "figure"))
    )
    if "motion" in named:
        thing.append(_pick(generator, _MOTION_WORDS[factors.motion]))
    if "background" in named:
        thing.append(
            f"{_pick(generator, ('on a', 'over a', 'against a'))} {factors.background} {_pick(generator, _NOUNS)}"
        )
    core = " ".join(thing)
    whole = " ".join(f"{_pick(generator, _OPENERS)} {core} {_pick(generator, _ENDINGS)}".split())
    return whole if len(whole.split()) <= WORDS_AT_MOST else core


def unrelated_sentence(generator: np.random.Generator) -> str:
    """A sentence that names no factor."""
    return _pick(generator, _UNRELATED).format(
        **{slot: _pick(generator, options) for slot, options in _SLOTS.items()}
    )


def query_sentence(factors: Factors) -> str:
    """The one full sentence that describes a clip: all four factors, in words of the captions."""
    return f"a {factors.colour} {factors.shape} {_MOTION_WORDS[factors.motion][0]} on a {factors.background} background"


def caption_clip(
    index: int, everyone: list[Factors], generator: np.random.Generator
) -> list[dict[str, Any]]:
    """5 to 8 captions in the order of time, spread over clip ``index``; ``everyone`` holds the factors of all clips of its split."""
    own = everyone[index]
    count = int(generator.integers(5, 9))
    captions = []
    for place in range(count):
        kind = generator.random()
        if kind < ABOUT_THE_CLIP:
            text = telling_sentence(own, generator)
        elif kind < ABOUT_THE_CLIP + UNRELATED:
            text = unrelated_sentence(generator)
        else:
            text = telling_sentence(_another(own, everyone, generator), generator)
        middle = (place + generator.random()) / count * SECONDS
        length = generator.uniform(0.4, 0.9)
        start, end = max(0.0, middle - length / 2), min(SECONDS, middle + length / 2)
        captions.append({"start": round(start, 2), "end": round(end, 2), "text": text})
    return captions


def _another(own: Factors, everyone: list[Factors], generator: np.random.Generator) -> Factors:
    """The factors of a clip that differs; in a world of one kind of clip, of that kind."""
    for _ in range(100):
        other = everyone[int(generator.integers(len(everyone)))]
        if other != own:
            return other
    return own


# -- the world ---------------------------------------------------------------------------------------------------------


def split_factors(num_train: int, num_test: int, seed: int) -> tuple[list[Factors], list[Factors]]:
    """What each training and test clip shows. No combination is in both; all test clips differ; training goes round its
    combinations, so 1200 clips hold each of them and with them every pair of values."""
    combinations = [Factors(*values) for values in itertools.product(*FACTORS.values())]
    generator = _generator(seed, _COMBINATIONS)
    while True:
        order = [combinations[place] for place in generator.permutation(len(combinations))]
        test, seen = order[:num_test], order[num_test:]
        if _covers_every_pair(seen):
            break
    train: list[Factors] = []
    while len(train) < num_train:
        train += [seen[place] for place in generator.permutation(len(seen))]
    return train[:num_train], test


def _covers_every_pair(some: list[Factors]) -> bool:
    rows = [tuple(asdict(factors).values()) for factors in some]
    sizes = [len(values) for values in FACTORS.values()]
    return all(
        len({(row[a], row[b]) for row in rows}) == sizes[a] * sizes[b]
        for a, b in itertools.combinations(range(len(sizes)), 2)
    )


def render_clip(factors: Factors, *seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames (T, SIDE, SIDE, 3) uint8 and audio (S,) float32 of one clip; the same for the same factors and seed."""
    generator = _generator(*seed)
    course = Course.draw(factors.motion, generator)
    return render_frames(factors, course, generator), render_audio(factors, course, generator)


def render_world(
    folder: str | os.PathLike,
    *,
    num_train: int = 1200,
    num_test: int = 200,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Render the world into ``folder`` (see the top of this file) and return the folder.

    The files depend on the arguments up to ``seed`` alone. A complete world of the same arguments is left as it is, an interrupted
    one is completed. ``workers`` is the number of processes (None: one a core). Raises ValueError for counts out of range and for a
    folder that holds something else.
    """
    if num_train < 1 or not 0 <= num_test <= MOST_HELD_OUT:
        raise ValueError(
            f"num_train is {num_train} and num_test {num_test}; they are at least 1, and 0 to {MOST_HELD_OUT}"
        )
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must be 0 or more")
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}; rendering takes at least 1 process")
    folder = Path(folder)
    recipe = {"world": 4, "num_train": num_train, "num_test": num_test, "seed": seed}
    if _check_folder(folder, recipe):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "world.json", {**recipe, "complete": False})

    jobs: list[tuple[Path, Factors, tuple[int, ...]]] = []
    for number, (split, everyone) in enumerate(
        zip(_SPLITS, split_factors(num_train, num_test, seed), strict=True)
    ):
        names = [f"clip_{place:05d}.mp4" for place in range(len(everyone))]
        (folder / split).mkdir(exist_ok=True)
        captions = {
            name: caption_clip(place, everyone, _generator(seed, _CAPTIONS, number, place))
            for place, name in enumerate(names)
        }
        _write_json(folder / split / "captions.json", captions)
        _write_json(
            folder / split / "factors.json",
            {name: asdict(factors) for name, factors in zip(names, everyone, strict=True)},
        )
        if split == "test":
            queries = {
                name: query_sentence(factors) for name, factors in zip(names, everyone, strict=True)
            }
            _write_json(folder / split / "queries.json", queries)
        for place, (name, factors) in enumerate(zip(names, everyone, strict=True)):
            if not (folder / split / name).exists():  # clips appear whole, so those there are done
                jobs.append((folder / split / name, factors, (seed, _RENDERING, number, place)))

    _render_all(jobs, workers or _cores(), progress)
    _write_json(folder / "world.json", {**recipe, "complete": True})
    return folder


def _check_folder(folder: Path, recipe: dict[str, Any]) -> bool:
    """True where the world is there already. Raises ValueError where another one, or something else, is in its place."""
    manifest = folder / "world.json"
    if not manifest.exists():
        if any((folder / split).exists() for split in _SPLITS):
            raise ValueError(
                f"{folder} has a train or test folder but no world.json; name a new folder, so that nothing is mixed"
            )
        return False
    try:
        found = json.loads(manifest.read_text(encoding="utf-8"))
        complete = found.pop("complete")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{manifest} does not describe a rendered world ({error}); delete {folder} or name a new folder"
        ) from error
    if found != recipe:
        raise ValueError(
            f"{folder} holds another world, {found}, not {recipe}; delete it or name a new folder"
        )
    counts = dict(zip(_SPLITS, (recipe["num_train"], recipe["num_test"]), strict=True))
    return complete and all(
        sum(1 for _ in (folder / split).glob("clip_*.mp4")) == count
        for split, count in counts.items()
    )


def _render_all(
    jobs: list[tuple[Path, Factors, tuple[int, ...]]], workers: int, progress: bool
) -> None:
    if not jobs:
        return
    if workers == 1:
        for _ in _progress(map(_render_file, jobs), len(jobs), progress):
            pass
        return
    # fork where it is safe to: the children touch NumPy and PyAV only, and nobody's main module is imported again
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context) as pool:
        try:
            for _ in _progress(pool.map(_render_file, jobs, chunksize=8), len(jobs), progress):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _render_file(job: tuple[Path, Factors, tuple[int, ...]]) -> None:
    path, factors, seed = job
    frames, audio = render_clip(factors, *seed)
    write_clip(
        path, frames, audio, frames_per_second=FRAMES_PER_SECOND, sample_rate_hz=SAMPLE_RATE_HZ
    )


def _progress(done: Iterable[None], total: int, wanted: bool) -> Iterable[None]:
    if not wanted:
        return done
    try:
        from tqdm import tqdm
    except ImportError:  # part of the extra `train`; rendering goes on without a bar
        return done
    return tqdm(done, total=total, desc="rendering clips", unit="clip", disable=None)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _generator(*key: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(key))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
