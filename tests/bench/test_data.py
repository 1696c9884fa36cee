"""The readers of `bench data` read the same windows, and its rows become a table."""

import dataclasses
import json
import os

import numpy as np
import pytest

pytest.importorskip("av")

from bench import __main__ as command
from bench import cold, data
from bench.report import MARKED, Report


def test_a_case_is_measured_and_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "SECONDS", 5)
    monkeypatch.setattr(data, "STARTS", (0.5, 1.2))
    monkeypatch.setitem(data.CASES, "small", ("h264", 96, 64, 25))
    out = tmp_path / "rows.jsonl"
    assert command.main(["data", "--case", "small", "--rounds", "2", "--out", str(out)]) == 0
    rows = [data.Row(**json.loads(line)) for line in out.read_text().splitlines()]
    by_reader = {row.reader: row for row in rows}
    assert by_reader[data.BARE].over_bare == 1
    assert {"ours, a file", "ours, in a tar", "ours, augmented", "ours, cached"} <= set(by_reader)
    for row in rows:
        assert row.rounds == 2 and row.ms_p20 <= row.ms_p50 <= row.ms_p80
        assert row.clips_per_second == pytest.approx(
            1e3 / np.mean([row.ms_p20, row.ms_p80]), rel=0.5
        )
    told = capsys.readouterr().out
    assert data.table(rows).splitlines()[0] in told
    # measured again: the last rows are told, one line a case
    again = [dataclasses.replace(row, over_bare=2.5) for row in rows]
    with out.open("a") as file:
        file.writelines(json.dumps(dataclasses.asdict(row)) + "\n" for row in again)
    assert data.read(out) == again and data.read(tmp_path / "none") == []
    page = MARKED["decoding"][0](Report.of([], [], decoding=data.read(out)))
    (line,) = (line for line in page.splitlines() if line.startswith("| small"))
    assert line.count("2.50x") == len(again) - 2  # of decoding alone and the cache, clips/s


def test_tars_that_no_memory_holds_are_timed_with_read_ahead_and_without(monkeypatch, capsys):
    told = []
    monkeypatch.setattr(data, "SECONDS", 5)
    monkeypatch.setitem(data.CASES, "small", ("mpeg4", 96, 64, 25))
    for name, value in (("TARS", 2), ("CLIPS", 4), ("BATCH", 4)):
        monkeypatch.setattr(cold, name, value)
    monkeypatch.setattr(os, "posix_fadvise", lambda file, at, size, what: told.append(what))
    command.main(["data", "--case", "small", "--rounds", "1", "--cold", "0"])
    shown = capsys.readouterr().out
    assert "small, 8 clips in " in shown
    ways = [line.split(" | ")[0] for line in shown.splitlines() if line.startswith("| ")]
    assert ways[-3:] == ["| held in memory", "| on disk, read ahead", "| on disk, without"]
    # twice held, of which one is not timed, and once ahead: 4 of 8 clips come after the first ones
    assert told.count(os.POSIX_FADV_WILLNEED) == 3 * 4
    assert told.count(os.POSIX_FADV_DONTNEED) == 2 * 2


def test_decoding_alone_gives_the_windows_frames(tmp_path):
    data.make_file(tmp_path / "a.mp4", "mpeg4", 64, 64, 10)
    frames = data.decode(str(tmp_path / "a.mp4"), 3.1, lambda frame: (type(frame), frame.time))
    times = [at for kind, at in frames if kind.__name__ == "VideoFrame"]
    assert times[0] <= 3.1 + 1 / data.FPS and times[-1] == pytest.approx(6.3, abs=0.05)
    assert len(times) == pytest.approx(3.2 * data.FPS, abs=3)
