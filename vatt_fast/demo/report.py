"""Pictures and tables of a run: curves, contact sheets, retrieval before and after."""

import json
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# blue and orange of Okabe and Ito's palette: distinct for the colour-blind and in print
_BLUE, _ORANGE, _GREEN = "#0072B2", "#D55E00", "#009E73"


def plot_curves(metrics: str | os.PathLike, png: str | os.PathLike) -> None:
    """Loss, learning rate and speed against the step, from a run's metrics.jsonl.

    Raises ValueError for a file without steps.
    """
    # a run that was killed or still writes may leave half a line
    whole_lines = Path(metrics).read_text().rpartition("\n")[0].splitlines()
    lines = [json.loads(line) for line in whole_lines]
    if not lines:
        raise ValueError(
            f"{metrics} holds no step; a run writes its first line after log_every steps"
        )
    plt = _pyplot()
    panels: tuple[tuple[str, dict[str, tuple[str | None, str, str]]], ...] = (
        (
            "loss",
            {"loss_va": ("video-audio", _BLUE, "-"), "loss_vt": ("video-text", _ORANGE, "--")},
        ),
        ("learning rate", {"learning_rate": (None, _BLUE, "-")}),
        ("clips per second", {"clips_per_second": (None, _BLUE, "-")}),
    )
    figure, axes = plt.subplots(1, len(panels), figsize=(12, 3.2), layout="constrained")
    for axis, (label, curves) in zip(axes, panels, strict=True):
        for key, (name, colour, style) in curves.items():
            points = [(line["step"], line[key]) for line in lines if key in line]
            if points:
                axis.plot(
                    *zip(*points, strict=True), style, color=colour, label=name, linewidth=1.5
                )
        axis.set(xlabel="step", ylabel=label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        if len(curves) > 1:
            axis.legend(frameon=False)
    figure.savefig(png, dpi=120)
    plt.close(figure)


def contact_sheet(
    queries: Sequence[str],
    clips: Sequence[Sequence[np.ndarray]],
    correct: Sequence[Sequence[bool]],
    png: str | os.PathLike,
) -> None:
    """One row a query: its best clips side by side, best first, the right one in a thick frame.

    Args:
        clips: for each query, its hits as frames (T, H, W, 3) uint8, a few each.
        correct: for each query, which hit is the right clip.
    """
    if not queries or not len(queries) == len(clips) == len(correct):
        raise ValueError(
            f"{len(queries)} queries, {len(clips)} rows of clips, {len(correct)} of marks; "
            "there must be one of each"
        )
    plt = _pyplot()
    columns = max(len(row) for row in clips)
    figure, axes = plt.subplots(
        len(queries),
        columns,
        figsize=(3.4 * columns, 1.45 * len(queries) + 0.4),
        layout="constrained",
        squeeze=False,
    )
    for row, (query, hits, marks) in enumerate(zip(queries, clips, correct, strict=True)):
        for column, axis in enumerate(axes[row]):
            axis.set(xticks=[], yticks=[])
            if column >= len(hits):
                axis.axis("off")
                continue
            axis.imshow(_strip(hits[column]), aspect="equal")
            right = marks[column]
            for spine in axis.spines.values():
                spine.set(color=_GREEN if right else "#999999", linewidth=5 if right else 0.8)
            rank = f"{column + 1}" + (" (right clip)" if right else "")
            axis.set_xlabel(rank, fontsize=9, fontweight="bold" if right else "normal")
        found = next((str(i + 1) for i, mark in enumerate(marks) if mark), f"beyond {len(marks)}")
        title = textwrap.shorten(query, 150)
        axes[row][0].set_title(f"“{title}” — right clip at rank {found}", fontsize=10, loc="left")
    figure.savefig(png, dpi=100)
    plt.close(figure)


def retrieval_table(
    before: Mapping[str, float], after: Mapping[str, float], chance: Mapping[str, float]
) -> str:
    """Markdown table of ``retrieval_metrics`` before and after training, beside chance."""
    names = {"r1": "R@1 (%)", "r5": "R@5 (%)", "r10": "R@10 (%)", "median_rank": "median rank"}
    rows = [
        f"| {names[key]} | {chance[key]:.1f} | {before[key]:.1f} | {after[key]:.1f} |"
        for key in names
    ]
    return "\n".join(["| measure | chance | before | after |", "|---|---|---|---|", *rows])


def _strip(frames: np.ndarray) -> np.ndarray:
    """Frames side by side with a white line between them."""
    gap = np.full((frames.shape[1], 2, 3), 255, np.uint8)
    parts = [part for frame in frames for part in (frame, gap)]
    return np.concatenate(parts[:-1], axis=1)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'vatt_fast[eval]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
