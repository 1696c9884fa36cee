"""`bench ranks`: steps of gloo ranks, the bytes they send, and the table of the docs."""

import dataclasses

import pytest

from bench import __main__ as command
from bench import ranks
from bench.report import MARKED, Report


def test_steps_of_two_ranks_are_measured_told_and_left_out_the_next_time(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(ranks, "CELLS", ((2, "ddp"),))
    out = tmp_path / "ranks.jsonl"
    given = ["ranks", "--batch", "4", "--rounds", "2", "--resume", "--out", str(out)]
    assert command.main(given) == 0
    (row,) = ranks.read(out)
    assert (row.configuration, row.batch, row.ranks, row.strategy) == ("tiny", 4, 2, "ddp")
    assert row.rounds == 2 and 0 < row.ms_p20 <= row.ms_p50 <= row.ms_p80
    # what a ring sends, and some bytes that say what it is
    assert row.sent_mb == pytest.approx(row.planned_mb, rel=0.05)
    assert ranks.table([row]) in capsys.readouterr().out
    monkeypatch.setattr(ranks, "measure", lambda *what: pytest.fail("measured again"))
    assert command.main(given) == 0
    with pytest.raises(SystemExit):
        command.main(["ranks", "--batch", "3"])
    assert "batch is 3; 2 ranks cannot share it evenly" in capsys.readouterr().err
    later = dataclasses.replace(row, ms_p50=1.0)
    assert "| tiny | 4 | 2 | ddp | 1 |" in MARKED["ranks"][0](Report.of([], [], of_ranks=[later]))
