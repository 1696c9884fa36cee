"""The small world: rendered clips with a sound and a narration, made of four independent factors.

A coloured shape moves over a patterned background. Its sound tells the shape (waveform and base
pitch) and the motion (contour of pitch and loudness, in step with the picture) and nothing else.
Its captions tell a part of everything, among sentences that tell nothing.

Phase, period, place and size are random, and space wraps around, so a single frame does not give
the motion away. Held-out clips combine the factors in ways that training never shows: a model must
understand the factors one by one to retrieve them.

    folder/world.json      what was rendered; "complete" turns true last
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
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..data.media_writer import write_clip
from ..files import write_text
from .captions import caption_clip, query_sentence
from .picture import render_frames
from .scene import FACTORS, FRAMES_PER_SECOND, Course, Factors
from .sound import SAMPLE_RATE_HZ, render_audio

# At most a quarter of the combinations is held out: training still sees every pair of values.
MOST_HELD_OUT = math.prod(len(values) for values in FACTORS.values()) // 4

# These numbers keep the generator's streams apart.
_COMBINATIONS, _RENDERING, _CAPTIONS = range(3)
_SPLITS = ("train", "test")


def split_factors(num_train: int, num_test: int, seed: int) -> tuple[list[Factors], list[Factors]]:
    """What each training and each test clip shows.

    No combination is in both, and all test clips differ. Training goes round its combinations, so
    1200 clips hold each of them, and with them every pair of values.
    """
    combinations = [Factors(*values) for values in itertools.product(*FACTORS.values())]
    generator = seeded(seed, _COMBINATIONS)
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
    """Frames (T, SIDE, SIDE, 3) uint8 and audio (S,) float32 of one clip.

    The same factors and seed give the same clip.
    """
    generator = seeded(*seed)
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

    The files depend on ``num_train``, ``num_test`` and ``seed`` alone. A complete world of the same
    arguments is left as it is; an interrupted one is completed.

    Args:
        workers: the number of processes; None starts one a core.

    Raises:
        ValueError: counts out of range, or a folder that holds something else.
    """
    if num_train < 1 or not 0 <= num_test <= MOST_HELD_OUT:
        raise ValueError(
            f"num_train is {num_train} and num_test {num_test}; they are at least 1, "
            f"and 0 to {MOST_HELD_OUT}"
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
            name: caption_clip(place, everyone, seeded(seed, _CAPTIONS, number, place))
            for place, name in enumerate(names)
        }
        _write_labels(folder / split, dict(zip(names, everyone, strict=True)), captions)
        for place, (name, factors) in enumerate(zip(names, everyone, strict=True)):
            if not (folder / split / name).exists():  # clips appear whole, so those there are done
                jobs.append((folder / split / name, factors, (seed, _RENDERING, number, place)))

    _render_all(jobs, workers or _cores(), progress)
    _write_json(folder / "world.json", {**recipe, "complete": True})
    return folder


def _write_labels(
    folder: Path, factors: dict[str, Factors], captions: dict[str, list[dict[str, Any]]]
) -> None:
    """What is known of the clips of one split, beside them."""
    _write_json(folder / "captions.json", captions)
    _write_json(folder / "factors.json", {name: asdict(each) for name, each in factors.items()})
    if folder.name == "test":
        queries = {name: query_sentence(each) for name, each in factors.items()}
        _write_json(folder / "queries.json", queries)


def _check_folder(folder: Path, recipe: dict[str, Any]) -> bool:
    """Whether the world is there already. Raises ValueError where something else is there."""
    manifest = folder / "world.json"
    if not manifest.exists():
        if any((folder / split).exists() for split in _SPLITS):
            raise ValueError(
                f"{folder} has a train or test folder but no world.json; name a new folder, "
                "so that nothing is mixed"
            )
        return False
    try:
        found = json.loads(manifest.read_text(encoding="utf-8"))
        complete = found.pop("complete")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{manifest} does not describe a rendered world ({error}); "
            f"delete {folder} or name a new folder"
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
    # Fork where it is safe. The children use NumPy and PyAV only; and unlike a spawned child, a
    # forked one does not import the caller's main module again.
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


def seeded(*key: int) -> np.random.Generator:
    """A generator whose draws depend on the key alone."""
    return np.random.default_rng(np.random.SeedSequence(key))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")
