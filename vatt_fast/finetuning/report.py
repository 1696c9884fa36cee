"""report.html of a fine-tuning: curves, scores of held-out examples, what is confused, settings."""

import dataclasses
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..config import VATTConfig
from ..evaluation.classify import confusion_figure
from ..files import write_text
from ..training.metrics import METRICS, read_metrics
from ..training.run_page import REPORT, Lines, measured, picture, run_page, steps_done
from .settings import FineTuneConfig

_SCORES = {
    "eval_top1": "top-1 (%)",
    "eval_top5": "top-5 (%)",
    "eval_mean_class": "mean of the classes (%)",
    "eval_mAP": "mAP (%)",
    "eval_AUC": "AUC (%)",
    "eval_d_prime": "d'",
    "eval_examples": "examples",
}
_CURVES: dict[str, dict[str, str]] = {
    "Loss": {"loss": ""},
    "Right in training (%)": {"train_top1": ""},
    "Held-out examples (%)": {"eval_top1": "top-1", "eval_top5": "top-5", "eval_mAP": "mAP"},
}


@dataclasses.dataclass
class Report:
    """The page of one run, written anew at each checkpoint.

    Args:
        settings: what the run records of itself (``settings.describe``).
        confusion: (C, C) of the last measurement, where each example has one class.
    """

    run: FineTuneConfig
    settings: Mapping[str, Any]
    model: VATTConfig
    labels: Sequence[str]
    confusion: np.ndarray | None = None

    def write(self) -> None:
        """Raises OSError; then the old page is intact."""
        run, out = self.run, Path(self.run.out)
        lines = read_metrics(out / METRICS)
        hidden = ("model", "classes")
        settings = {name: getattr(run, name) for name in ("data", "init", "framework", "device")}
        settings |= {name: value for name, value in self.settings.items() if name not in hidden}
        classes = f"<p>{len(self.labels)}: {html.escape(', '.join(self.labels))}</p>"
        page = run_page(
            out.absolute().name,
            f"Step {steps_done(lines)} of {run.steps}, task {run.task}, recipe {run.recipe}, "
            f"trained on {run.data}.",
            lines,
            _CURVES,
            {"Held-out examples": self._held_out(lines), "Classes": classes},
            settings,
            self.model.to_json(),
        )
        write_text(out / REPORT, page)

    def _held_out(self, lines: Lines) -> str:
        table = measured(lines, _SCORES)
        if not table:
            return "<p>Not measured; --eval-split names held-out examples.</p>"
        told = f"<p>Split {html.escape(str(self.run.eval_split))}, one view a clip.</p>{table}"
        if self.confusion is None:
            return told
        file = io.BytesIO()
        try:
            confusion_figure(self.confusion, self.labels).savefig(file, format="png", dpi=100)
        except ImportError as error:
            return f"{told}<p>No confusion matrix: {html.escape(str(error))}</p>"
        return f"{told}<h3>Confusion</h3>{picture(file.getvalue(), 'png', 'confusion matrix')}"
