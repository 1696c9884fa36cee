"""The tables in miniature: what is measured, that it resumes, and what the tables say."""

import csv
import dataclasses
import json

import pytest

pytest.importorskip("av")
pytest.importorskip("sklearn")
pytest.importorskip("PIL")

from bench import miniature
from bench.__main__ import main
from bench.miniature import Cell, Runs, Score, cells, measure, read, tables
from bench.report import MARKED, Report
from vatt_fast import VATT
from vatt_fast.data.labels import open_labels

CLIPS = (40, 4)


def test_cells_cover_every_row_of_every_table():
    of_seed = {dataclasses.astuple(cell)[:3] for cell in cells(0)}
    assert len(of_seed) == len(cells(0))
    shown = {row for _, rows in miniature._SHOWN for row in rows}
    assert shown <= of_seed
    assert {model for model, *_ in of_seed} == set(miniature.MODELS)
    grids = {name: config.video_grid for name, config in miniature.MODELS.items()}
    assert grids["patch 8x8x8"] == (2, 8, 8) and grids["patch 4x16x16"] == (4, 4, 4)


def test_it_goes_on_after_the_last_whole_line(tmp_path):
    out, asked = tmp_path / "tables.jsonl", []

    def score(cell, runs):
        if len(asked) == 5:
            raise KeyboardInterrupt
        asked.append(cell)
        return 10.0 * cell.seed + len(cell.task)

    arguments = ([0, 1], 3, CLIPS, tmp_path / "runs", out)
    with pytest.raises(KeyboardInterrupt):
        measure(*arguments, score)
    out.write_text(out.read_text() + '{"cell": {"mod')
    assert [one.cell for one in read(out)] == asked == cells(0)[:5]
    first, asked[:] = list(asked), asked[:0]
    measured = measure(*arguments, lambda cell, runs: asked.append(cell) or 1.0)
    assert first + asked == [*cells(0), *cells(1)]
    assert [one.cell for one in measured] == first + asked
    assert measured[0].value == 3.0 and measured[-1].value == 1.0
    # other sizes are other measurements
    again = measure([0], 4, CLIPS, tmp_path / "runs", out, lambda cell, runs: 2.0)
    assert len(again) == len(cells(0)) and {one.steps for one in again} == {4}


def made(model, task, method, *values):
    return [
        Score(Cell(model, task, method, seed), value, 1, 1, "", {}, "", "")
        for seed, value in enumerate(values)
    ]


def test_tables_say_what_is_not_clear():
    scores = [
        *made("specific", "motion", "from scratch", 20.0, 30.0, 40.0),
        *made("specific", "motion", "fine-tuned", 25.0, 34.0, 43.0),
        *made("agnostic", "motion", "fine-tuned", 25.0, 34.0, 39.0),
    ]
    said = tables(scores)
    assert "8 motions of a clip (fine-tuned with 10% of the labels):" in said
    assert "| specific | from scratch | 30.0 ± 10.0 |  |" in said
    assert "| specific | fine-tuned | 34.0 ± 9.0 | +5.0, +4.0, +3.0 |" in said
    assert "| agnostic | fine-tuned | 32.7 ± 7.1 | +5.0, +4.0, -1.0 (not clear) |" in said
    assert "R@10" not in said
    assert "by patch" not in said  # its one row stands above
    alone = made("patch 8x8x8", "motion", "fine-tuned", 1.0)
    assert "8 motions by patch:" in tables([*scores, *alone])
    assert tables([]) == "No scores exist yet."
    longer = [dataclasses.replace(one, steps=1000) for one in scores[:1]]
    page = MARKED["miniature"][0](Report.of([], [], scores=[*scores, *longer]))
    assert said in page and page.count("steps of pre-training") == 2 and tables(longer) in page
    two = tables([one for one in scores if one.cell.seed < 2])
    assert "+5.0, +4.0 (not clear)" in two  # two seeds do not tell


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"), 0, 1, CLIPS)


def test_labels_are_the_worlds_factors_and_a_share_of_them(runs):
    for task in ("motion", "sound", "frame"):
        path, media = runs.labels(task)
        factors = json.loads((runs.world / "train" / "factors.json").read_text())
        with path.open() as file:
            rows = list(csv.DictReader(file))
        trained = [row for row in rows if row["split"] == "train"]
        data = open_labels(path, media=media)
        data.check_training()
        assert data.splits["test"] == 4 and len(trained) < 40
        assert task != "frame" or len(trained) == len(data.classes)
        for row in trained:
            own = factors[row["file"].removeprefix("train/")]
            wanted = {"motion": own["motion"], "frame": own["shape"],
                      "sound": f"{own['shape']};{own['motion']}"}  # fmt: skip
            assert row["class"] == wanted[task]
        assert data.has_several == (task == "sound")


def test_digits_are_pictures_with_a_third_held_out(runs):
    path, media = runs.labels("digits")
    data = open_labels(path, media=media)
    assert data.classes == tuple("0123456789")
    assert data.splits == {"test": 599, "train": 120}


def test_a_models_cells_are_measured(runs, monkeypatch):
    """One model of little training: searched, fine-tuned, and fine-tuned from scratch."""
    monkeypatch.setattr(miniature, "EPOCHS", 1.0)
    assert 0 <= runs.retrieval("spectrogram", "t2v") <= 100
    tuned = runs.fine_tuned("spectrogram", "sound", scratch=False)
    assert 0 <= tuned <= 100
    assert tuned != runs.fine_tuned("spectrogram", "sound", scratch=True)
    trained = VATT.from_pretrained(runs.pretrained("spectrogram"))
    assert trained.config.audio_input == "spectrogram"


def test_the_command(monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr(
        miniature, "measure", lambda *given, wanted: asked.append((*given, wanted)) or []
    )
    out = tmp_path / "lines.jsonl"
    command = ["accuracy", "--tables", "--seed", "3", "--clips", "40", "4", "--out", str(out)]
    assert not main([*command, "--model", "specific", "--task", "motion",
                     "--method", "from scratch", "fine-tuned"])  # fmt: skip
    assert not main(command)
    (seeds, steps, clips, _, where, wanted), (*_, every) = asked
    assert (seeds, steps, clips, where) == ([3], 600, (40, 4), out)
    assert set(filter(wanted, cells(3))) == {
        Cell("specific", "motion", how, 3) for how in ("from scratch", "fine-tuned")
    }
    assert all(map(every, cells(3)))
    assert "No scores exist yet." in capsys.readouterr().out
