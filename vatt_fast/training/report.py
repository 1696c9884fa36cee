"""report.html of a pre-training: curves, retrieval, clips as they are trained on, settings."""

import html
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config import VATTConfig
from ..data.augment import WHOLE, ClipAugment, Key, crop_frames
from ..data.clips import Batch, ClipSpec, spread, to_batch
from ..data.dataset import ClipFolder
from ..data.media import MediaError
from ..data.source import Source
from ..data.text import Vocabulary
from ..files import write_text
from .metrics import METRICS, read_metrics
from .run_page import REPORT, Lines, measured, photo, run_page, spread_over, steps_done
from .settings import PretrainConfig

_CLIPS = 6  # on the contact sheet
_TRIED = 50  # clips, until so many are found that can be read
_FRAMES = 4  # shown of each
_HIGHEST = 128  # pixels of a shown frame
# title -> {metric: name in the legend}; curves of what a run did not log are left out
_CURVES: dict[str, dict[str, str]] = {
    "Loss": {"loss": "all", "loss_va": "video-audio", "loss_vt": "video-text"},
    "Retrieval on held-out clips, R@10 (%)": {
        "text_to_video_r10": "text to video",
        "audio_to_video_r10": "audio to video",
    },
    "Mean cosine of a batch's embeddings (1: collapsed)": {
        "cosine_video_va": "video, with audio",
        "cosine_audio_va": "audio",
        "cosine_video_vt": "video, with text",
        "cosine_text_vt": "text",
    },
}
_RETRIEVAL = {"r1": "R@1 (%)", "r5": "R@5 (%)", "r10": "R@10 (%)", "median_rank": "median rank"}
_KINDS = {"text_to_video": "Text to video", "audio_to_video": "Audio to video"}


class Report:
    """The page of one run, written anew at each checkpoint.

    Args:
        settings: what the run records of itself (``settings.describe``).
        augment: what changes its clips.
    """

    def __init__(
        self,
        run: PretrainConfig,
        settings: Mapping[str, Any],
        config: VATTConfig,
        vocabulary: Vocabulary,
        source: Source,
        augment: ClipAugment | None,
    ):
        self.run, self.settings, self.config = run, settings, config
        self.vocabulary, self.source, self.augment = vocabulary, source, augment
        self._sheet: str | None = None

    def write(self) -> None:
        """Raises OSError; then the old page is intact."""
        out = Path(self.run.out)
        if self._sheet is None:  # decoded once
            self._sheet = self._contact_sheet()
        lines = read_metrics(out / METRICS)
        write_text(out / REPORT, self._page(lines))

    def _page(self, lines: Lines) -> str:
        run = self.run
        free = {name: getattr(run, name) for name in ("data", "framework", "device")}
        return run_page(
            Path(run.out).absolute().name,
            f"Step {steps_done(lines)} of {run.steps}, {run.preset}, trained on {run.data}.",
            lines,
            _CURVES,
            {"Retrieval": self._retrieval(lines), "Clips": self._sheet or ""},
            free | {name: value for name, value in self.settings.items() if name != "model"},
            self.config.to_json(),
        )

    def _retrieval(self, lines: Lines) -> str:
        found = ""
        for kind, title in _KINDS.items():
            names = {f"{kind}_{name}": told for name, told in _RETRIEVAL.items()}
            if table := measured(lines, names):
                found += f"<h3>{title}</h3>{table}"
        if found:
            return f"<p>On {html.escape(str(self.run.eval_data))}.</p>{found}"
        return "<p>Not measured; --eval-data names held-out clips.</p>"

    def _contact_sheet(self) -> str:
        """The first clips of each source: frames of the file, and of what a step sees."""
        try:
            batch = self._first_clips()
        except MediaError as error:
            return f"<p>None can be shown: {html.escape(str(error))}</p>"
        figures = []
        for row, file in enumerate(batch.files):
            ids = batch.text[row][batch.text_valid[row]]
            sentences = [" ".join(self.vocabulary.words[i] for i in one if i) for one in ids]
            shown = "<p>no picture</p>"
            if batch.video_valid[row]:
                shown = photo(_strip(batch.video[row]), f"frames of {file}")
                if self.augment is not None:
                    changed = self._augmented(batch.video[row], row)
                    shown += photo(_strip(changed), f"frames of {file}, augmented")
            told = "; ".join(map(html.escape, sentences)) or "no caption"
            name = html.escape(file)
            figures.append(
                f"<figure>{shown}<figcaption><b>{name}</b>: {told}</figcaption></figure>"
            )
        below = ", below it augmented" if self.augment is not None else ""
        return (
            f"<p>The middle of the first clips{below}; captions in the model's words.</p>"
            f'<div class="clips">{"".join(figures)}</div>'
        )

    def _first_clips(self) -> Batch:
        """Raises MediaError where none of the first ones can be read."""
        clips = ClipFolder(
            self.source, ClipSpec.from_config(self.config), vocabulary=self.vocabulary
        )
        arrays, names = clips.empty_batch(_CLIPS), list[str]()
        error: MediaError | None = None
        for example in itertools.islice(_in_turn(list(map(len, clips.parts))), _TRIED):
            try:
                clips.read_into(arrays, [len(names)], example, lambda count: spread(count, 1))
            except MediaError as found:
                error = error or found
                continue
            names.append(self.source.name(example))
            if len(names) == _CLIPS:
                break
        if not names:
            raise error or MediaError(f"{self.source.label} has no clips")
        return to_batch({name: values[: len(names)] for name, values in arrays.items()}, names, ())

    def _augmented(self, video: torch.Tensor, row: int) -> torch.Tensor:
        assert self.augment is not None
        key, (height, width) = Key(self.run.seed, 0, row), video.shape[1:3]
        box = self.augment.crop(key, height, width)
        video = video.clone() if box is None else crop_frames(video, box, height, width)
        return torch.from_numpy(self.augment.frames(key, video.contiguous().numpy()))


def _in_turn(counts: Sequence[int]) -> Iterator[int]:
    """The examples of several sources, the first of each, then the second of each, and so on."""
    starts = [0, *itertools.accumulate(counts)]
    for place in range(max(counts)):
        yield from (
            start + place for start, count in zip(starts, counts, strict=False) if place < count
        )


# -- pictures --------------------------------------------------------------------------------------


def _strip(video: torch.Tensor) -> np.ndarray:
    """A few frames of a clip (T, H, W, 3) side by side."""
    height, width = video.shape[1:3]
    rows = min(height, _HIGHEST)
    columns = max(1, round(width * rows / height))
    chosen = torch.stack(spread_over(list(video), _FRAMES))
    chosen = crop_frames(chosen, WHOLE, rows, columns)
    return np.concatenate(list(chosen.numpy()), axis=1)
