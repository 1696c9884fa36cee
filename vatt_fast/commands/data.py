"""The verbs that read and write data: index, pack."""

import dataclasses
import os
from json import dumps  # ``json`` is an option of the verbs
from pathlib import Path
from typing import Annotated, Any

import tyro
from tqdm import tqdm

from ..config import VATTConfig
from ..data.clips import ClipSpec
from ..data.index import build_index, summary_of, warn_of_captions
from ..data.listing import list_source, parse
from ..data.pack import Packing, clips_per_second, sample
from ..data.pack import pack as write_shards
from ..data.sources import open_source
from ..files import check_folder
from .printing import print_report

_PACKING = Packing()


def index(
    source: Annotated[tuple[str, ...], tyro.conf.Positional],
    out: str | None = None,
    captions: str | None = None,
    media: str | None = None,
    workers: int | None = None,
    problems: bool = False,
    json: bool = False,
) -> None:
    """Index folders, manifests or tar shards, so that training on them starts at once.

    Killed and started again it goes on; when media have changed it reads only those.

    Args:
        source: a folder, folder/** for all below, a .csv, .tsv or .parquet of path, start, end and
            text, a folder of tars, shards/{000..099}.tar, a URL of such, or a .toml of several.
        out: folder of the index; by default it lies beside the data, where pretrain looks for it.
        captions: JSON or folder of captions by the media's names, as HowTo100M's caption.json; for
            clips without captions of their own.
        media: folder that a manifest's paths are relative to, instead of the manifest's.
        workers: processes; by default one a core.
        problems: list all that was left out, and why, instead of the first ten.
        json: print JSON.
    """
    if not source:
        raise ValueError("name a source: vatt-fast index clips")
    wanted = [each for text in source for each in parse(text)]
    if out is not None and len(wanted) > 1:
        raise ValueError(f"--out {out} has room for one index; leave it out, or name one source")
    count = len(os.sched_getaffinity(0)) if workers is None else workers
    told = {}
    for each in wanted:
        listing = list_source(
            dataclasses.replace(each, captions=captions or each.captions, media=media or each.media)
        )
        folder = Path(out) if out is not None else listing.home
        if folder is None:
            raise ValueError(f"{each.text} is remote; name a folder for its index with --out")
        check_folder(folder)
        with tqdm(desc=each.text, unit="part", disable=json or None) as bar:

            def show(done: int, total: int, bar: Any = bar) -> None:
                bar.total, bar.n = total, done
                bar.refresh()

            built = build_index(listing, folder, workers=count, progress=show)
        told[str(folder)] = summary_of(built)
        if not json:
            warn_of_captions(built)
            print(f"{folder}: {told[str(folder)].pop('line')}")
            left_out = list(built.problems.items())
            for name, reason in left_out if problems else left_out[:10]:
                print(f"  {name}: {reason}")
            if len(left_out) > 10 and not problems:
                print(f"  and {len(left_out) - 10} more; --problems lists them")
    if json:
        print(dumps(told))


def pack(
    source: Annotated[str, tyro.conf.Positional],
    out: str,
    packing: Annotated[Packing, tyro.conf.arg(name="")] = _PACKING,
    workers: int | None = None,
    problems: bool = False,
    json: bool = False,
) -> None:
    """Write a source into tar shards of small pictures with many key frames, and say what it saves.

    Killed and started again it goes on after the last whole shard.

    Args:
        source: as pretrain's --data.
        out: folder of the shards, which --data then names.
        workers: processes; by default one a core.
        problems: list all that was left out, and why, instead of the first ten.
        json: print JSON.
    """
    opened = open_source(source, index_folder=Path(out) / "source_index")
    count = len(os.sched_getaffinity(0)) if workers is None else workers
    with tqdm(desc=source, unit="shard", disable=json or None) as bar:

        def show(done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.refresh()

        done = write_shards(opened, out, packing, workers=count, progress=show)
    config = VATTConfig()
    window = ClipSpec.from_config(config).reader_arguments()
    report: dict[str, Any] = {
        "shards": done.shards,
        "clips": done.clips,
        "gigabytes": round(done.bytes / 1e9, 3),
        "gigabytes_before": round(done.source_bytes / 1e9, 3),
    }
    if pairs := sample(opened, out):
        before, after = clips_per_second(pairs, window)
        report |= {
            "clips_per_second_a_core": round(after, 1),
            "clips_per_second_a_core_before": round(before, 1),
            "measured_on_clips": len(pairs),
        }
    left_out = done.problems
    if json:
        print(dumps({**report, "left_out": left_out}))
        return
    print_report(report, False)
    print(f"left_out: {len(left_out)}")
    for name, reason in list(left_out.items())[: None if problems else 10]:
        print(f"  {name}: {reason}")
    if len(left_out) > 10 and not problems:
        print(f"  and {len(left_out) - 10} more; --problems lists them")
