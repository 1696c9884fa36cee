"""The pictures hold what they should, and the table its numbers."""

import json

import numpy as np
import pytest
from matplotlib.image import imread

from vatt_fast.demo.report import contact_sheet, plot_curves, retrieval_table

RED, BLUE, FRAME = (
    (220, 0, 0),
    (0, 0, 220),
    (0, 158, 115),
)  # two clips, and the frame of the right one
VIDEO_AUDIO, VIDEO_TEXT = (
    (0, 114, 178),
    (213, 94, 0),
)  # the curves; the first colour serves the other panels too


def pixels(png, colour) -> int:
    """How many pixels of that colour a picture holds."""
    return int((abs((imread(png)[..., :3] * 255).round().astype(int) - colour).sum(-1) < 12).sum())


def clip(colour) -> np.ndarray:
    return np.tile(np.array(colour, np.uint8), (4, 64, 64, 1))


def write_metrics(path, **values) -> None:
    lines = [
        {"step": step, "learning_rate": 1e-3, "clips_per_second": 90.0, **values}
        for step in range(10, 110, 10)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_curves_hold_each_loss_that_was_logged(tmp_path):
    found = []
    for logged in ({"loss_va": 4.0, "loss_vt": 3.0}, {"loss_va": 4.0}, {"loss_vt": 3.0}):
        write_metrics(tmp_path / "metrics.jsonl", **logged)
        plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
        found.append(
            [pixels(tmp_path / "curves.png", colour) for colour in (VIDEO_AUDIO, VIDEO_TEXT)]
        )
    both, audio, text = found
    assert (
        min(both[0], audio[0]) > text[0] + 100
    )  # what is left in that colour without the curve are rate and speed
    assert min(both[1], text[1]) > 100 and audio[1] == 0


def test_curves_of_a_run_still_writing(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    write_metrics(metrics, loss_va=4.0)
    plot_curves(metrics, tmp_path / "whole.png")
    metrics.write_text(metrics.read_text() + '{"step": 110, "loss')
    plot_curves(metrics, tmp_path / "half.png")
    assert (tmp_path / "half.png").read_bytes() == (tmp_path / "whole.png").read_bytes()
    for empty in ("", '{"step": 1'):
        metrics.write_text(empty)
        with pytest.raises(ValueError, match="holds no step"):
            plot_curves(metrics, tmp_path / "none.png")


def test_contact_sheet_shows_the_clips_and_frames_the_right_one(tmp_path):
    png = tmp_path / "sheet.png"
    queries, clips = (
        ["a red ring going left", "a blue star"],
        [[clip(RED), clip(BLUE)], [clip(BLUE), clip(RED)]],
    )
    contact_sheet(queries, clips, [[True, False], [False, False]], png)
    one = pixels(png, FRAME)
    assert pixels(png, RED) > 5000 and pixels(png, BLUE) > 5000 and one > 500
    contact_sheet(queries, clips, [[True, False], [True, False]], png)
    assert pixels(png, FRAME) > 1.8 * one
    contact_sheet(queries, clips, [[False, False], [False, False]], png)
    assert pixels(png, FRAME) == 0
    with pytest.raises(ValueError, match="there must be one of each"):
        contact_sheet(["a"], [], [], png)


def test_retrieval_table():
    measures = ({"r1": v, "r5": v + 10, "r10": v + 20, "median_rank": v + 30} for v in (1, 2, 0.5))
    assert retrieval_table(*measures).splitlines() == [
        "| measure | chance | before | after |",
        "|---|---|---|---|",
        "| R@1 (%) | 0.5 | 1.0 | 2.0 |",
        "| R@5 (%) | 10.5 | 11.0 | 12.0 |",
        "| R@10 (%) | 20.5 | 21.0 | 22.0 |",
        "| median rank | 30.5 | 31.0 | 32.0 |",
    ]
