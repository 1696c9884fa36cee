"""The whole of VATT in minutes.

Render a small world of real mp4 files, pre-train tiny on it, retrieve held-out clips by text and
sound.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..config import preset
from ..data.clips import ClipSpec
from ..data.loader import evaluation_clips
from ..data.media import read_video
from ..encoding import embed_batches, embed_sentences
from ..evaluation.probe import linear_probe
from ..evaluation.retrieval import factor_agreement, retrieval_metrics, top_k
from ..files import write_text
from ..model import VATT
from ..training.loop import (
    CHECKPOINT,
    METRICS,
    pretrain,
    vocabulary_of,
)
from ..training.settings import PretrainConfig
from ..training.step import initial_model
from ..weights import WEIGHTS
from .report import contact_sheet, plot_curves, retrieval_table
from .scene import FACTORS
from .world import render_world

SUMMARY, REPORT = "summary.json", "report.md"
_SHEET_ROWS = 6


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """The demo's world and run. The defaults take minutes on two cores."""

    out: str = "runs/demo"  # run folder, with report.md
    world: str = "runs/world"  # rendered once per seed and sizes, then reused
    steps: int = 1000  # updates in all
    batch_size: int = 32  # clips of a step
    drop_rate: float = 0.5  # fraction of video and audio patches removed by DropToken
    train_clips: int = 1200  # to train on
    test_clips: int = 200  # held out
    seed: int = 0  # of the world and of the run
    shuffle_captions: bool = False  # captions of other clips: retrieval must stay near chance
    learning_rate: float = 1.5e-3  # after the warm-up
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the device computes it
    framework: Literal["torch", "jax"] = "torch"  # what trains
    workers: int = 1  # processes that read clips; 0: none


def run_demo(demo: DemoConfig, *, progress: bool = True) -> dict[str, Any]:
    """Render, measure, pre-train, measure again, report.

    A finished run starts anew, an unfinished one continues.

    Returns:
        the summary that the command prints as its last line: rates in percent, those that end in
        "_before" of the same model untrained.
    """
    began = time.perf_counter()
    out = Path(demo.out)
    world = Path(demo.world) / f"seed{demo.seed}_{demo.train_clips}_{demo.test_clips}"
    out.mkdir(parents=True, exist_ok=True)
    if (out / SUMMARY).exists():
        for name in (CHECKPOINT, WEIGHTS, METRICS, SUMMARY):
            (out / name).unlink(missing_ok=True)
    print(f"world: {demo.train_clips} + {demo.test_clips} clips in {world}")
    render_world(
        world,
        num_train=demo.train_clips,
        num_test=demo.test_clips,
        seed=demo.seed,
        progress=progress,
    )

    run = _settings(demo, out, world)
    vocabulary = vocabulary_of(run.data, run.max_words)
    config = dataclasses.replace(preset("tiny"), vocab_size=len(vocabulary))
    before = evaluate_world(initial_model(config, vocabulary, run.seed), world)
    model = pretrain(run, progress=progress)
    after = evaluate_world(model, world)

    summary = {
        "seconds": round(time.perf_counter() - began, 1),
        "steps": demo.steps,
        **{f"t2v_{name}": after["t2v"][name] for name in ("r1", "r10", "median_rank")},
        "a2v_r10": after["a2v"]["r10"],
        "t2v_r10_before": before["t2v"]["r10"],
        "motion_probe": after["motion_probe"],
        "motion_probe_before": before["motion_probe"],
        "report": str(out / REPORT),
    }
    write_report(out, world, summary, before, after)
    write_text(out / SUMMARY, json.dumps(summary) + "\n")
    return summary


def _settings(demo: DemoConfig, out: Path, world: Path) -> PretrainConfig:
    return PretrainConfig(
        data=str(world / "train"),
        out=str(out),
        preset="tiny",
        steps=demo.steps,
        batch_size=demo.batch_size,
        drop_rate=demo.drop_rate,
        learning_rate=demo.learning_rate,
        final_learning_rate=demo.learning_rate / 20,
        warmup_steps=min(100, demo.steps // 10),
        schedule="half_cosine",
        max_words=512,
        seed=demo.seed,
        shuffle_captions=demo.shuffle_captions,
        augment="none",  # captions name colours and directions
        precision=demo.precision,
        framework=demo.framework,
        workers=demo.workers,
        cache=str(world / "decoded"),
    )


def evaluate_world(model: VATT, world: Path) -> dict[str, Any]:
    """How well a model retrieves the held-out clips.

    Returns:
        t2v and a2v: ``retrieval_metrics`` of a sentence and of the clip's own sound; factors: how
        often the best hit shares each factor; motion_probe: accuracy of a linear probe of the
        motion; files, queries and top5: the clips, their sentences and the five best hits.
    """
    config, vocabulary = model.config, model.vocabulary
    assert vocabulary is not None
    spec, found, names = ClipSpec.from_config(config), {}, {}
    for part, modalities in (("train", ("video",)), ("test", ("video", "audio"))):
        batches = evaluation_clips(
            world / part, spec, vocabulary=vocabulary, batch_size=50, cache_dir=world / "decoded"
        )
        found[part], names[part] = embed_batches(model, batches, modalities=modalities, pooled=True)
    factors = {part: json.loads((world / part / "factors.json").read_text()) for part in found}
    columns = {
        part: {factor: [factors[part][name][factor] for name in names[part]] for factor in FACTORS}
        for part in found
    }
    sentences = json.loads((world / "test" / "queries.json").read_text())
    queries = embed_sentences(model, [sentences[name] for name in names["test"]])
    test, own = found["test"], np.arange(len(names["test"]))
    best = top_k(queries, test["z_video_vt"], 5)
    return {
        "t2v": retrieval_metrics(queries, test["z_video_vt"], own),
        "a2v": retrieval_metrics(test["z_audio_va"], test["z_video_va"], own),
        "factors": factor_agreement(best[:, 0], columns["test"], columns["test"]),
        "motion_probe": linear_probe(
            found["train"]["video_pooled"],
            columns["train"]["motion"],
            test["video_pooled"],
            columns["test"]["motion"],
        ),
        "files": names["test"],
        "queries": [sentences[name] for name in names["test"]],
        "top5": best.tolist(),
    }


def write_report(out: Path, world: Path, summary: dict, before: dict, after: dict) -> None:
    """curves.png, contact_sheet.png and report.md in ``out``."""
    count = len(after["files"])
    chance = {
        "r1": 100 / count,
        "r5": 500 / count,
        "r10": 1000 / count,
        "median_rank": (count + 1) / 2,
    }
    plot_curves(out / METRICS, out / "curves.png")
    rows = np.linspace(0, count - 1, min(_SHEET_ROWS, count)).astype(int)
    clips = [
        [_frames(world / "test" / after["files"][hit]) for hit in after["top5"][row]]
        for row in rows
    ]
    correct = [[hit == row for hit in after["top5"][row]] for row in rows]
    contact_sheet(
        [after["queries"][row] for row in rows], clips, correct, out / "contact_sheet.png"
    )
    agreement = "\n".join(
        f"| {name} | {before['factors'][name]:.1f} | {after['factors'][name]:.1f} |"
        for name in after["factors"]
    )
    write_text(
        out / REPORT,
        f"# Demo run\n\n{summary['steps']} steps, {summary['seconds']} s on this machine, "
        f"rendering included. {count} held-out clips.\n\n"
        f"## Text to video\n\n{retrieval_table(before['t2v'], after['t2v'], chance)}\n\n"
        f"## Audio to video\n\n{retrieval_table(before['a2v'], after['a2v'], chance)}\n\n"
        "Sound tells shape and motion only, so clips that share both are alike to it.\n\n"
        "## Factors of the best clip that agree with the query, percent\n\n"
        f"| factor | before | after |\n|---|---|---|\n{agreement}\n\n"
        "## Motion, linear probe on frozen video features\n\n"
        f"{summary['motion_probe_before']:.1f} % untrained, "
        f"{summary['motion_probe']:.1f} % trained.\n\n"
        "![Curves](curves.png)\n\n![Queries and their five best clips](contact_sheet.png)\n",
    )


def _frames(path: Path, count: int = 4) -> np.ndarray:
    return read_video(path, start=0.8, num_frames=count, frames_per_second=2.5, height=64, width=64)
