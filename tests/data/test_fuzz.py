"""Damaged bits in media, captions and vocabularies: read or refused; no crash, hang or growth.

Each example runs in a process of its own. More of them, for hours if need be:

    FUZZ_EXAMPLES=20000 python -m pytest tests/data/test_fuzz.py
"""

import json
import os
import resource
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("av")

from media_files import encode, numbered
from PIL import Image
from tried import tried

from vatt_fast.data.captions import load_captions
from vatt_fast.data.media import MediaError, MediaReader
from vatt_fast.data.text import Vocabulary

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "60"))
SECONDS, MEGABYTES = 30, 600
SIZES = dict(num_frames=4, frames_per_second=10.0, height=32, width=32)
SIZES |= dict(num_samples=8000, sample_rate_hz=16000)
MEDIA = {
    "a.mp4": ("libx264", "aac"),
    "a.mkv": ("mpeg4", "libmp3lame"),
    "a.webm": ("libvpx", "libopus"),
    "a.avi": ("mpeg4", "pcm_s16le"),
    "a.mov": ("mjpeg", "pcm_s16le"),
    "a.ts": ("mpeg2video", "mp2"),
    "a.mpg": ("mpeg1video", "mp2"),
    "a.wav": (None, "pcm_s16le"),
    "a.flac": (None, "flac"),
    "a.mp3": (None, "libmp3lame"),
    "a.m4a": (None, "alac"),
    "a.aac": (None, "aac"),
    "a.ogg": (None, "libopus"),
}
PICTURES = ("a.png", "a.jpg", "a.webp", "a.bmp")
FUZZED = "bits flipped at random"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """{name: bytes} of small files of every kind."""
    folder = tmp_path_factory.mktemp("whole")
    for name, (video, audio) in MEDIA.items():
        mpeg = name in ("a.mpg", "a.ts")
        rate = 48000 if audio == "libopus" else 44100
        encode(
            folder / name, video=video, audio=audio, seconds=1.0, fps=25 if mpeg else 10, rate=rate,
            pixels="yuvj420p" if video == "mjpeg" else "yuv420p",
        )  # fmt: skip
    for name in PICTURES:
        Image.fromarray(numbered(6)[5]).save(folder / name)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def flipped(content, flips, cut):
    """``content`` with bits flipped, a half of them near the file's ends where headers are."""
    changed = bytearray(content)
    for place, bit, near in flips:
        reach = min(len(changed), 600)
        index = place % reach if near == 1 else -1 - place % reach if near == 2 else place
        changed[index % len(changed)] ^= 1 << bit
    return bytes(changed[: max(1, round(len(changed) * cut))])


FLIPS = st.lists(
    st.tuples(st.integers(0, 30_000), st.integers(0, 7), st.integers(0, 3)), min_size=1, max_size=24
)
CUTS = st.sampled_from([1.0, 1.0, 1.0, 0.9, 0.5])


def in_a_process(work):
    """Run ``work`` in a forked process; its time, memory and end are what they may be."""
    began = time.monotonic()
    child = os.fork()
    if not child:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
            # growth of this process from here on
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            work()
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            code = 0 if grown < MEGABYTES * 1024 else 3
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(code)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() - began > 10 * SECONDS:  # of a machine that others use too
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("it hangs")
        time.sleep(0.002)
    assert os.waitstatus_to_exitcode(status) == 0, "1: another error; 3: memory; negative: a signal"


def read(path):
    try:
        with MediaReader(path) as reader:
            assert 0 <= reader.info.duration_seconds < float("inf")
            for start in (0.0, 0.6):
                clip = reader.clip(start=start, **SIZES)
                assert clip.audio is None or np.isfinite(clip.audio).all()
                assert clip.video is None or clip.video.shape == (4, 32, 32, 3)
    except MediaError as error:
        said = str(error)
        assert path.name in said


@tried(
    FUZZED,
    "headers and bodies of 17 kinds of media and pictures, some cut short",
    "read, finite, or MediaError; within 30 s and 600 MB",
)
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(name=st.sampled_from([*MEDIA, *PICTURES]), flips=FLIPS, cut=CUTS)
def test_media(whole, tmp_path, name, flips, cut):
    path = tmp_path / name
    path.write_bytes(flipped(whole[name], flips, cut))
    in_a_process(lambda: read(path))


CAPTIONS = json.dumps(
    {"a.mp4": [{"start": 0.5, "end": 1.5e0, "text": "a d\u00f6g \U0001f436"}], "b.wav": []},
    ensure_ascii=False,
)


def read_words(path: Path):
    try:
        if path.suffix == ".json":
            for entries in load_captions(path).values():
                sentences = [one.text for one in entries]
                json.dumps(sentences, ensure_ascii=False).encode()  # can be written again
        else:
            vocabulary = Vocabulary.load(path)
            vocabulary.save(path.with_name("again.txt"))
            assert Vocabulary.load(path.with_name("again.txt")) == vocabulary
    except ValueError as error:
        said = str(error)
        assert path.name in said


@tried(FUZZED, "captions.json and vocabulary.txt", "read and writable, or ValueError")
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(name=st.sampled_from(["captions.json", "vocabulary.txt"]), flips=FLIPS, cut=CUTS)
def test_captions_and_vocabularies(tmp_path, name, flips, cut):
    text = CAPTIONS if name == "captions.json" else "<pad>\n<unk>\nd\u00f6g\nstar\n"
    path = tmp_path / name
    path.write_bytes(flipped(text.encode(), flips[:3], cut))
    in_a_process(lambda: read_words(path))
