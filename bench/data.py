"""Clips a second and a core: reading and decoding windows of media, ours beside others.

All readers of a case take the same windows in turn, of files that are made for it. What counts is
the processor's time, of one thread: several processes share nothing but memory.
"""

import dataclasses
import importlib
import io
import itertools
import json
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vatt_fast.config import preset
from vatt_fast.data.augment import Key, augmentation, parts_of
from vatt_fast.data.cache import ClipCache
from vatt_fast.data.clips import ClipSpec
from vatt_fast.data.media import MediaReader
from vatt_fast.data.source import Place
from vatt_fast.data.torchcodec_reader import reader_class
from vatt_fast.flops import true_flops

from . import lines, machine
from .timer import first_line, interleaved

FILE = lines.RESULTS / "data.jsonl"
SECONDS, RATE, FPS = 20, 48000, 25
STARTS = (0.0, 3.1, 5.7, 8.8, 11.3, 14.9)
CONFIG = preset("medium_base_small")
SPEC = ClipSpec.from_config(CONFIG)
BARE, _AUGMENTED, _CACHED = "PyAV, decoded only", "ours, augmented", "ours, cached"
H200_FLOPS = 790e12  # a second, of dense bf16, as measured
# codec, width, height, frames from one key frame to the next: one thing changes at a time
CASES = {
    "{} {}x{}, key every {}".format(*case): case
    for case in (
        *(("h264", *size, 50) for size in ((320, 240), (640, 480), (1280, 720))),
        *(("h264", 320, 240, keys) for keys in (10, 250)),
        *((codec, 320, 240, 50) for codec in ("hevc", "vp9", "mpeg4")),
    )
}
_ENCODERS = {
    # b-adapt: its quick choice would take hardly a B picture of this motion
    "h264": ("libx264", {"preset": "medium", "crf": "23", "x264-params": "b-adapt=2"}),
    "hevc": ("libx265", {"preset": "fast", "crf": "26"}),
    "vp9": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "6", "crf": "33", "b": "0"}),
    "mpeg4": ("mpeg4", {"qscale": "4", "bf": "2"}),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One reader on one case; ``lines.Line`` is for ops and steps."""

    case: str
    reader: str
    ms_p20: float  # of the processor's time, a clip
    ms_p50: float
    ms_p80: float
    rounds: int
    over_bare: float  # median over the rounds, of its time over that of decoding alone
    clips_per_second: float  # a core
    device: str
    versions: dict[str, str]
    commit: str
    date: str


def make_file(path: Path, codec: str, width: int, height: int, key_frames: int) -> None:
    """Colours that scroll under grain, and tones with noise, in stereo."""
    import av

    encoder, options = _ENCODERS[codec]
    graph = (
        f"rgbtestsrc=s={2 * width}x{2 * height}:r={FPS}:d={SECONDS},scroll=h=0.003:v=0.002,"
        f"crop={width}:{height},noise=alls=14:allf=t[out0];"
        f"aevalsrc=0.3*sin(2000*t)+0.1*random(0)|0.2*sin(900*t):s={RATE}:d={SECONDS}[out1]"
    )
    with av.open(graph, format="lavfi") as source, av.open(str(path), "w") as out:
        video: Any = out.add_stream(encoder, rate=FPS)
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        x265 = {"x265-params": f"keyint={key_frames}:log-level=none"} if codec == "hevc" else {}
        video.options = {**options, **x265, "g": str(key_frames)}
        audio: Any = out.add_stream("aac", rate=RATE, layout="stereo")
        for frame in source.decode(*source.streams):
            sound = hasattr(frame, "sample_rate")
            if not sound:  # the source's are all key frames, which encoders would follow
                frame.pict_type = av.video.frame.PictureType.NONE
            out.mux((audio if sound else video).encode(frame))
        out.mux(video.encode(None))
        out.mux(audio.encode(None))


def decode(source: Any, start: float, take: Callable[[Any], Any] = lambda frame: None) -> list[Any]:
    """``take`` of each of the window's frames, as PyAV gives them in one pass over both streams."""
    import av

    end, found = start + SPEC.seconds, []
    with av.open(source) as container:
        streams = (container.streams.video[0], container.streams.audio[0])
        for stream in streams:
            stream.thread_count = 1
        container.seek(int(start / streams[0].time_base), stream=streams[0])
        left = {stream.index for stream in streams}
        for packet in container.demux(streams):
            # sound from before the window stays undecoded
            if packet.stream.type == "audio" and (packet.pts or 0) * packet.time_base < start - 0.2:
                continue
            for frame in packet.decode() if packet.stream_index in left else ():
                if frame.time >= start - 0.05:
                    found.append(take(frame))
                if frame.time >= end:
                    left.discard(packet.stream_index)
            if not left:
                break
    return found


def to_array(frame: Any) -> np.ndarray | None:
    """What one writes without us: frames in RGB, scaled as a whole, cropped; sound as it is."""
    if hasattr(frame, "sample_rate"):
        return frame.to_ndarray().mean(0)
    before, number = (
        int(round(frame.time * FPS - n) * SPEC.frames_per_second / FPS) for n in (1, 0)
    )
    if before == number:  # the clip shows fewer frames than the file has
        return None
    scale = max(SPEC.height / frame.height, SPEC.width / frame.width)
    size = (round(frame.width * scale), round(frame.height * scale))
    return frame.reformat(*size, "rgb24", threads=1).to_ndarray()[: SPEC.height, : SPEC.width]


def readers(path: Path, folder: Path, failed: dict[str, str]) -> dict[str, Callable[[float], Any]]:
    """Functions of a window's start, by name; of those that are not installed ``failed`` tells."""
    tar = folder / "shard.tar"
    with tarfile.open(tar, "w") as out:
        for number in range(len(STARTS)):
            out.add(path, f"{number:06d}.mp4")
    with tarfile.open(tar) as out:
        last = out.getmembers()[-1]
    place = Place(str(tar), f"shard.tar/{last.name}", last.offset_data, last.size)
    augment = augmentation(parts_of("recipe", "paper"), SPEC.height, SPEC.width)
    assert augment is not None
    cache, count = ClipCache(folder / "cache", SPEC), itertools.count()

    def ours(where: Any, start: float, **options: Any) -> Any:
        with MediaReader(where) as reader:
            return reader.clip(start=start, **SPEC.reader_arguments(), **options)

    def augmented(start: float) -> None:
        key = Key(0, next(count), 0)
        clip = ours(path, start, box=lambda height, width: augment.crop(key, height, width))
        augment.frames(key, clip.video)
        augment.sound(key, clip.audio)

    def cached(start: float) -> None:
        video = np.zeros((SPEC.frames, SPEC.height, SPEC.width, 3), np.uint8)
        audio = np.zeros(SPEC.samples, np.float32)
        cache.read_into(path, lambda _: round(start * SPEC.frames_per_second), video, audio)

    def webdataset() -> Callable[[float], Any]:
        pipeline = importlib.import_module("webdataset").WebDataset(str(tar), shardshuffle=False)
        samples = iter(pipeline.repeat())
        return lambda start: decode(io.BytesIO(next(samples)["mp4"]), start, to_array)

    def by_torchcodec() -> Callable[[float], Any]:
        opened = reader_class("torchcodec")

        def read(start: float) -> Any:
            with opened(path) as reader:
                return reader.clip(start=start, **SPEC.reader_arguments())

        return read

    def energon() -> Callable[[float], Any]:
        decoder = importlib.import_module("megatron.energon.av").AVDecoder

        def read(start: float) -> Any:
            spans = [(start, start + SPEC.seconds)]
            whole = decoder(io.BytesIO(path.read_bytes()))
            return whole.get_clips(video_clip_ranges=spans, audio_clip_ranges=spans)

        return read

    found: dict[str, Callable[[float], Any]] = {
        BARE: lambda start: decode(str(path), start),
        "PyAV, to arrays": lambda start: decode(str(path), start, to_array),
        "ours, a file": lambda start: ours(path, start),
        "ours, in a tar": lambda start: ours(place, start),
        _AUGMENTED: augmented,
        _CACHED: cached,
    }
    for name, make in (
        ("torchcodec, a file", by_torchcodec),
        ("webdataset, PyAV, to arrays", webdataset),
        ("Energon's decoder", energon),
    ):
        try:
            found[name] = make()
        except (ImportError, ValueError) as error:  # ValueError: torchcodec does not load
            failed[name] = first_line(error)
    return found


class _ProcessorClock:
    def prepare(self, calls: Sequence[Callable[[], Any]]) -> Callable[[int], float]:
        def sample(i: int) -> float:
            began = time.process_time()
            calls[i % len(calls)]()
            return 1e3 * (time.process_time() - began)

        return sample


def measure(name: str, folder: Path, rounds: int, failed: dict[str, str]) -> list[Row]:
    """Rows of a case, its files made in ``folder``; ``failed`` takes readers and their errors."""
    make_file(folder / "clip.mp4", *CASES[name])
    torch.set_num_threads(1)
    contenders = {
        reader: [lambda start=start, read=read: read(start) for start in STARTS]
        for reader, read in readers(folder / "clip.mp4", folder, failed).items()
    }
    timed = interleaved(contenders, rounds=rounds, warmup=1, clock=_ProcessorClock(), failed=failed)
    cpu = torch.device("cpu")
    versions = machine.versions(cpu) | machine.package_version("av")
    where = (machine.name(cpu), versions, machine.commit(), machine.today())
    return [
        Row(name, reader, each.p20, each.p50, each.p80, rounds,
            timed[BARE].speedup_over(each), 1e3 / float(np.mean(each.ms)), *where)
        for reader, each in timed.items()
    ]  # fmt: skip


def read(path: Path) -> list[Row]:
    """Rows of a file, of each case and reader the last one; none where it does not exist."""
    if not path.exists():
        return []
    found = [Row(**json.loads(line)) for line in path.read_text().splitlines()]
    return list({(row.device, row.case, row.reader): row for row in found}.values())


def table(rows: Sequence[Row]) -> str:
    """In the last column the cores that decode what a training step on an H200 takes at most."""
    cells = [
        (row.case, row.reader, lines.number(row.clips_per_second), lines.times(row.over_bare),
         _cores(row))
        for row in rows
    ]  # fmt: skip
    return lines.markdown_table(("case", "reader", "clips/s", "over decoding", "for 1 H200"), cells)


def tables(rows: Sequence[Row]) -> str:
    """A table a machine, a row a case: each reader's time over that of decoding alone."""
    made = []
    for device in dict.fromkeys(row.device for row in rows):
        own = [row for row in rows if row.device == device]
        cases: dict[str, dict[str, Row]] = {}
        for row in own:
            cases.setdefault(row.case, {})[row.reader] = row
        readers = [r for r in dict.fromkeys(row.reader for row in own) if r not in (BARE, _CACHED)]
        cells = [
            (
                case,
                lines.number(by[BARE].clips_per_second),
                *(lines.times(by[r].over_bare) if r in by else "" for r in readers),
                lines.number(by[_CACHED].clips_per_second),
                _cores(by[_AUGMENTED]),
            )
            for case, by in cases.items()
        ]
        headings = ("video", "decoded only, clips/s", *readers, f"{_CACHED}, clips/s",
                    "cores for 1 H200")  # fmt: skip
        title = f"{device}, av {own[-1].versions['av']}, {own[-1].date}"
        made.append(f"{title}:\n\n{lines.markdown_table(headings, cells)}")
    return "\n\n".join(made) or "No lines exist yet."


def _cores(row: Row) -> str:
    step = sum(true_flops(CONFIG, 0.5, mode="fwd+bwd", features=False).values())
    return f"{H200_FLOPS / step / row.clips_per_second:.0f}"


def run(names: Sequence[str], rounds: int, folder: Path, out: Path | None) -> int:
    """Measure cases, print their table, and append the rows to ``out``."""
    rows, failed = [], dict[str, str]()
    for number, name in enumerate(names):
        (inside := folder / str(number)).mkdir()
        rows += (measured := measure(name, inside, rounds, failed))
        print(table(measured), flush=True)
        if out:
            with out.open("a") as file:
                file.writelines(json.dumps(dataclasses.asdict(row)) + "\n" for row in measured)
    for reader, reason in failed.items():
        print(f"absent: {reader}: {reason}")
    return int(BARE in failed or any(reader.startswith("ours") for reader in failed))
