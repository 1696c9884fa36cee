"""Small labelled media and runs on them: two classes that colour and pitch tell apart."""

import numpy as np

from vatt_fast.data.media_writer import write_clip
from vatt_fast.finetuning.settings import FineTuneConfig

CLASSES = ("blue", "red")


def write_labelled(folder, *, each=4, splits=("train", "test"), size=(20, 16)):
    """folder/SPLIT/CLASS/i.mp4: 0.8 s of a colour under noise, and of a tone."""
    rng = np.random.default_rng(0)
    for split in splits:
        for number, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for i in range(each):
                frames = rng.integers(0, 120, (8, *size, 3), dtype=np.uint8)
                frames[..., 2 - 2 * number] += 120
                tone = np.sin(np.arange(6400) * (0.05 + 0.4 * number)).astype(np.float32) / 2
                write_clip(
                    folder / split / name / f"{i}.mp4",
                    frames,
                    tone + rng.normal(0, 0.05, 6400).astype(np.float32),
                    frames_per_second=10,
                    sample_rate_hz=8000,
                )
    return folder


def settings(folder, out, **changes):
    defaults = dict(
        recipe="small",
        steps=6,
        batch_size=4,
        learning_rate=0.02,
        log_every=1,
        checkpoint_every=2,
        workers=0,
        precision="fp32",
        loggers="none",
        init="none",
        preset="tiny",
    )
    if "init" in changes:
        del defaults["preset"]
    return FineTuneConfig(data=str(folder), out=str(out), **defaults | changes)
