"""The paper's tables in miniature: the demo's world with labels, and digits; ``accuracy --tables``.

Each measurement is one line of JSON; those that the file holds are not made again, and trainings
go on where they were interrupted. Rates are in percent, of held-out clips that combine the factors
as training never shows.
"""

import csv
import dataclasses
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vatt_fast.config import VATTConfig, preset, with_input

from . import lines, machine

TABLES = lines.RESULTS / "accuracy_tables.jsonl"
SHARE = 0.1  # of the training clips have labels
EPOCHS = 30.0  # of fine-tuning: half of what recipe small takes, for five models and three seeds

# what is pre-trained: the preset tiny, changed
_TINY = preset("tiny")
MODELS: dict[str, VATTConfig] = {
    "specific": _TINY,
    "agnostic": dataclasses.replace(_TINY, kind="modality_agnostic", text=_TINY.video),
    "spectrogram": with_input(_TINY, audio_input="spectrogram"),
    "patch 4x16x16": with_input(_TINY, video_patch=(4, 16, 16)),
    "patch 8x8x8": with_input(_TINY, video_patch=(8, 8, 8)),
}
# name -> task of fine-tuning, measure, what it is
TASKS = {
    "motion": ("video", "top1", "8 motions of a clip"),
    "sound": ("audio", "mAP", "shape and motion of a sound"),
    "frame": ("image", "top1", "6 shapes in one frame"),
    "digits": ("image", "top1", "scikit-learn's 10 digits"),
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One measurement: a model, what it is asked, and how it learnt to answer."""

    model: str
    task: str  # of TASKS, or t2v or a2v: retrieval, R@10
    method: str  # fine-tuned, from scratch, lrc, svm, logistic; or zero-shot
    seed: int


@dataclasses.dataclass(frozen=True)
class Score:
    """A cell's value, and what it was made with."""

    cell: Cell
    value: float
    steps: int  # of pre-training
    clips: int  # trained on
    device: str
    versions: dict[str, str]
    commit: str
    date: str


def cells(seed: int) -> list[Cell]:
    """What one seed measures, a model after the other."""
    wanted = []
    for model in MODELS:
        wanted += [(model, task, "zero-shot") for task in ("t2v", "a2v")]
        tasks = {"spectrogram": ["sound"]}.get(model, ["motion"])
        if model in ("specific", "agnostic"):
            tasks = list(TASKS)
        wanted += [(model, task, "fine-tuned") for task in tasks]
        if model in ("specific", "spectrogram"):
            wanted += [(model, task, "from scratch") for task in tasks]
        if model in ("specific", "agnostic"):
            wanted += [(model, "motion", kind) for kind in ("lrc", "svm", "logistic")]
    return [Cell(*one, seed) for one in wanted]


def read(path: Path) -> list[Score]:
    """The scores of a file, none where it does not exist; without half a line of a killed run."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text().rpartition("\n")[0].splitlines():
        values = json.loads(line)
        found.append(Score(**values | {"cell": Cell(**values["cell"])}))
    return found


def measure(
    seeds: Sequence[int],
    steps: int,
    clips: tuple[int, int],
    folder: Path,
    out: Path,
    score: "Callable[[Cell, Runs], float] | None" = None,
    wanted: Callable[[Cell], bool] = lambda cell: True,
) -> list[Score]:
    """Append the scores that the file does not hold, and return all of these steps and clips.

    Args:
        wanted: whether a cell is measured now.
    """
    if out.exists():  # without half a line of a killed run
        whole = out.read_text().rpartition("\n")
        out.write_text(whole[0] + whole[1])
    for seed in seeds:
        runs = Runs(folder, seed, steps, clips)
        for cell in filter(wanted, cells(seed)):
            known = {(one.cell, one.steps, one.clips) for one in read(out)}
            if (cell, steps, clips[0]) in known:
                continue
            value = (score or _score)(cell, runs)
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            made = Score(
                cell, round(value, 3), steps, clips[0], machine.name(device),
                machine.versions(device), machine.commit(), machine.today(),
            )  # fmt: skip
            out.parent.mkdir(parents=True, exist_ok=True)
            with out.open("a") as file:
                file.write(json.dumps(dataclasses.asdict(made)) + "\n")
            print(f"{cell}: {value:.1f}", flush=True)
    return [one for one in read(out) if (one.steps, one.clips) == (steps, clips[0])]


def _score(cell: Cell, runs: "Runs") -> float:
    if cell.method == "zero-shot":
        return runs.retrieval(cell.model, cell.task)
    if cell.method in ("fine-tuned", "from scratch"):
        return runs.fine_tuned(cell.model, cell.task, cell.method == "from scratch")
    return runs.probed(cell.model, cell.task, cell.method)


class Runs:
    """One seed's world, labels, pre-trained models and fine-tunings, in folders of their own."""

    def __init__(self, folder: Path, seed: int, steps: int, clips: tuple[int, int]) -> None:
        self.seed, self.steps, self.clips = seed, steps, clips
        self.world = folder / f"world_seed{seed}_{clips[0]}_{clips[1]}"
        self.folder = folder / f"steps{steps}_clips{clips[0]}_seed{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def pretrained(self, model: str) -> Path:
        from vatt_fast.training.loop import PretrainConfig, pretrain

        self._render()
        train, _ = self.clips
        out = self.folder / model.replace(" ", "_")
        run = PretrainConfig(  # as the demo: captions name colours and directions
            data=str(self.world / "train"), out=str(out), steps=self.steps, seed=self.seed,
            batch_size=min(32, train), learning_rate=1.5e-3, final_learning_rate=1.5e-3 / 20,
            warmup_steps=min(100, self.steps // 10), schedule="half_cosine", max_words=512,
            augment="none", precision="fp32", cache=str(self.world / "cache"), loggers="none",
            workers=1, checkpoint_every=100, log_every=50,
        )  # fmt: skip
        pretrain(run, model_config=MODELS[model], progress=False)
        return out

    def _render(self) -> None:
        from vatt_fast.demo.world import render_world

        train, test = self.clips
        render_world(self.world, num_train=train, num_test=test, seed=self.seed, progress=False)

    def retrieval(self, model: str, task: str) -> float:
        from vatt_fast.evaluation.search import measure, read_folder
        from vatt_fast.model import create_model

        net = create_model(self.pretrained(model))
        test = self.world / "test"
        found = measure(net, test, read_folder(net, test))
        return found[{"t2v": "text_to_video", "a2v": "audio_to_video"}[task]]["r10"]

    def fine_tuned(self, model: str, task: str, scratch: bool) -> float:
        from vatt_fast.evaluation.classify import evaluate
        from vatt_fast.finetuning.loop import finetune
        from vatt_fast.finetuning.settings import FineTuneConfig

        start = self.pretrained(model)
        labels, media = self.labels(task)
        kind, measured, _ = TASKS[task]
        name = f"{model}_{task}_{'scratch' if scratch else 'tuned'}".replace(" ", "_")
        several: dict[str, Any] = dict(loss="sigmoid", label_smoothing=0.0)
        origin: dict[str, Any] = (
            dict(init="none", preset="tiny") if scratch else dict(init=str(start))
        )
        run = FineTuneConfig(
            data=str(labels), media=str(media), out=str(self.folder / name), task=kind,  # type: ignore[arg-type]
            recipe="small", epochs=EPOCHS, seed=self.seed, precision="fp32", loggers="none",
            **origin, **several if task == "sound" else {},
        )  # fmt: skip
        finetune(run, model_config=MODELS[model] if scratch else None, progress=False)
        views: dict[str, Any] = (
            dict(windows=1, crops=1) if kind == "image" else dict(windows=4, crops=1)
        )
        found = evaluate(self.folder / name, labels, media=media, split="test", **views)
        return float(found.result[measured])

    def probed(self, model: str, task: str, method: str) -> float:
        from vatt_fast.evaluation.probing import ProbeConfig, probe

        labels, media = self.labels(task)
        out = self.folder / f"{model}_probe".replace(" ", "_")
        config = ProbeConfig(
            model=str(self.pretrained(model)), data=str(labels), media=str(media), out=str(out),
            classifier=(method,),  # type: ignore[arg-type]
        )  # fmt: skip
        return float(probe(config)[method]["top1"])

    def labels(self, task: str) -> tuple[Path, Path]:
        """A table of labels, with a share of the training examples, and the folder of its media."""
        self._render()
        media = self.folder / "digits" if task == "digits" else self.world
        rows = list(_digits(media) if task == "digits" else _world(self.world, task))
        draw = np.random.default_rng([self.seed, len(task)])
        train = [row for row in rows if row[2] == "train"]
        order = [train[i] for i in draw.permutation(len(train))]
        # one of each class first, then any
        first: dict[str, tuple[str, str, str]] = {}
        for row in order:
            for name in row[1].split(";"):
                first.setdefault(name, row)
        kept = list(dict.fromkeys([*first.values(), *order]))
        kept = kept[: max(len(set(first.values())), round(SHARE * len(train)))]
        path = self.folder / f"{task}.csv"
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("file", "class", "split"))
            writer.writerows([*sorted(kept), *(row for row in rows if row[2] == "test")])
        return path, media


def _world(world: Path, task: str) -> Iterator[tuple[str, str, str]]:
    told: dict[str, Callable[[dict[str, str]], str]] = {
        "motion": lambda each: each["motion"],
        "sound": lambda each: f"{each['shape']};{each['motion']}",
        "frame": lambda each: each["shape"],
    }
    for split in ("train", "test"):
        factors = json.loads((world / split / "factors.json").read_text())
        for name, each in factors.items():
            yield f"{split}/{name}", told[task](each), split


def _digits(folder: Path) -> Iterator[tuple[str, str, str]]:
    """1797 digits of 8 x 8 pixels, each third one held out, as pictures of 64 x 64."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    folder.mkdir(parents=True, exist_ok=True)
    for i, (picture, number) in enumerate(zip(digits.images, digits.target, strict=True)):
        name = f"{i:04d}.png"
        if not (folder / name).exists():
            pixels = np.kron(picture / 16 * 255, np.ones((8, 8))).round().astype(np.uint8)
            Image.fromarray(pixels).convert("RGB").save(folder / name)
        yield name, str(number), "test" if i % 3 == 2 else "train"


# -- tables ----------------------------------------------------------------------------------------


_Row = tuple[str, str, str]  # a cell without its seed
# title and rows; the others are compared with the first
_SHOWN: tuple[tuple[str, tuple[_Row, ...]], ...] = (
    *(
        (f"{what} (fine-tuned with {SHARE:.0%} of the labels)",
         (("specific", task, "from scratch"), ("specific", task, "fine-tuned"),
          ("agnostic", task, "fine-tuned")))
        for task, (_, _, what) in TASKS.items()
    ),
    ("8 motions by classifier, features frozen or not",
     tuple(("specific", "motion", how) for how in ("lrc", "svm", "logistic", "fine-tuned"))),
    ("8 motions by patch",
     tuple((m, "motion", "fine-tuned") for m in ("specific", "patch 4x16x16", "patch 8x8x8"))),
    ("shape and motion of a sound by its input",
     (("specific", "sound", "from scratch"), ("spectrogram", "sound", "from scratch"),
      ("specific", "sound", "fine-tuned"), ("spectrogram", "sound", "fine-tuned"))),
    ("text to video, R@10", tuple((model, "t2v", "zero-shot") for model in MODELS)),
    ("audio to video, R@10", tuple((model, "a2v", "zero-shot") for model in MODELS)),
)  # fmt: skip


def tables(scores: Sequence[Score]) -> str:
    """Mean and standard deviation over the seeds, and whether each row differs from the first.

    A difference is clear where it has the same sign in every seed, of at least three. A table whose
    rows were all in others before is left out.
    """
    value_of = {one.cell: one.value for one in scores}
    parts: list[str] = []
    known: set[_Row] = set()
    for title, rows in _SHOWN:
        shown = []
        first = _by_seed(value_of, rows[0])
        found = {row: values for row in rows if (values := _by_seed(value_of, row))}
        if found.keys() <= known:
            continue
        known |= found.keys()
        for row, values in found.items():
            told = f"{statistics.mean(values.values()):.1f}"
            if len(values) > 1:
                told += f" ± {statistics.stdev(values.values()):.1f}"
            model, _, method = row
            shown.append((model, method, told, _against(values, first) if row != rows[0] else ""))
        headings = ("model", "method", "%", "against the first row, by seed")
        parts.append(f"{title}:\n\n{lines.markdown_table(headings, shown)}")
    return "\n\n".join(parts) or "No scores exist yet."


def by_length(scores: Sequence[Score]) -> str:
    """The tables of each length of pre-training and number of clips, under a line that says it."""
    made = []
    for steps, clips in dict.fromkeys((one.steps, one.clips) for one in scores):
        own = [one for one in scores if (one.steps, one.clips) == (steps, clips)]
        seeds = len({one.cell.seed for one in own})
        made.append(
            f"{seeds} seeds, {steps} steps of pre-training, {clips} clips, {own[-1].device}, "
            f"{own[-1].date}:\n\n{tables(own)}"
        )
    return "\n\n".join(made) or "No scores exist yet."


def _by_seed(value_of: dict[Cell, float], row: _Row) -> dict[int, float]:
    return {cell.seed: v for cell, v in value_of.items() if dataclasses.astuple(cell)[:3] == row}


def _against(values: dict[int, float], first: dict[int, float]) -> str:
    both = sorted(values.keys() & first.keys())
    if not both:
        return ""
    gaps = [values[seed] - first[seed] for seed in both]
    clear = len(gaps) >= 3 and (min(gaps) > 0 or max(gaps) < 0)
    return ", ".join(f"{gap:+.1f}" for gap in gaps) + ("" if clear else " (not clear)")
