"""Small pre-training runs that tests of both frameworks share."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from vatt_fast.config import PRESETS
from vatt_fast.data.media_writer import write_clip
from vatt_fast.training.loop import METRICS
from vatt_fast.training.settings import PretrainConfig

# a model of the files' size
MODEL = dataclasses.replace(
    PRESETS["tiny"],
    frames=4,
    height=16,
    width=16,
    samples=1280,
    sample_rate_hz=8000,
    texts_per_clip=2,
)


def write_media(folder: Path) -> Path:
    """Eight real mp4 files, one of them without sound and one without captions."""
    rng = np.random.default_rng(0)
    captions = {}
    for i in range(8):
        frames = rng.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
        audio = np.sin(np.arange(6400) * 0.1 * (i + 1)).astype(np.float32) * 0.5
        write_clip(
            folder / f"{i}.mp4",
            frames,
            None if i == 3 else audio,
            frames_per_second=10,
            sample_rate_hz=8000,
        )
        if i != 5:
            captions[f"{i}.mp4"] = [
                {"start": 0.0, "end": 0.4, "text": f"clip number {i}"},
                {"start": 0.4, "end": 0.8, "text": f"the end of {i}"},
            ]
    (folder / "captions.json").write_text(json.dumps(captions))
    return folder


def settings(folder, out, **changes):
    defaults = dict(
        steps=6,
        batch_size=4,
        warmup_steps=2,
        log_every=1,
        checkpoint_every=2,
        workers=0,
        learning_rate=1e-3,
        precision="fp32",
    )
    return PretrainConfig(data=str(folder), out=str(out), **defaults | changes)


def metrics(out):
    return [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
