"""Linear evaluation: what linear classifiers learn from frozen features (paper 4.5 and Table 8).

The low-rank classifier has weights U V of rank n. Each step trains a random tenth of the n
components: W = U[:, S] V[S] n / |S|, which is U V on average, as dropout on the n-wide layer
between them that is the same for the whole batch. (The released code draws anew for each example.)

Shapes: N examples, W windows, D features, C classes, n rank.
"""

import math
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .probe import FOLDS, NEEDS_SKLEARN

Kind = Literal["lrc", "svm", "logistic"]
# inverses of the L2 penalty that cross-validation chooses among; the SVM's first one is noted in
# the released code
_STRENGTHS = {"svm": (6e-5, 1e-3, 1e-2, 0.1, 1.0), "logistic": (1e-3, 0.01, 0.1, 1.0, 10.0)}


@dataclass(frozen=True)
class LowRankSettings:
    """The low-rank classifier's training, as in the paper's appendix.

    Args:
        rank: n, components of the weights.
        share: of the components that a step trains.
        learning_rate: of Adam, constant.
        batch_size: examples a step, drawn with replacement of none until all were seen.
    """

    rank: int = 128
    share: float = 0.1
    learning_rate: float = 5e-4
    batch_size: int = 64
    steps: int = 50_000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "learning_rate", "batch_size", "steps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        if not 0 < self.share <= 1:
            raise ValueError(f"share is {self.share}; it lies in (0, 1]")

    @property
    def components(self) -> int:
        """How many a step trains."""
        return max(1, round(self.share * self.rank))


class LowRankClassifier(NamedTuple):
    """logits = features @ u @ v + bias, with u (D, n), v (n, C), bias (C,)."""

    u: Tensor
    v: Tensor
    bias: Tensor

    def logits(self, features: Tensor, components: Tensor | None = None) -> Tensor:
        """(B, D) -> (B, C), by some of the components as in training, or by all."""
        if components is None:
            return features @ self.u @ self.v + self.bias
        hidden = features @ self.u[:, components]
        scale = self.u.shape[1] / len(components)
        return scale * (hidden @ self.v[components]) + self.bias

    def scores(self, features: np.ndarray) -> np.ndarray:
        """(N, D) -> (N, C) probabilities."""
        rows = torch.from_numpy(np.ascontiguousarray(features, np.float32)).to(self.u.device)
        return self.logits(rows).softmax(-1).cpu().numpy()


def train_low_rank(
    features: np.ndarray,
    classes: np.ndarray,
    num_classes: int,
    settings: LowRankSettings = LowRankSettings(),
    device: torch.device | str = "cpu",
) -> LowRankClassifier:
    """Train on features (N, D) as they are and classes (N,) in 0 .. num_classes - 1.

    Examples come in shuffled epochs; the same seed gives the same classifier on one machine.

    Raises:
        ValueError: shapes or classes that do not fit, features that are not finite.
    """
    check_features("training", features, classes)
    if not 0 <= np.min(classes) <= np.max(classes) < num_classes:
        raise ValueError(
            f"classes span {np.min(classes)} .. {np.max(classes)}; there are {num_classes}"
        )
    draw = torch.Generator().manual_seed(settings.seed)
    inputs, rank = features.shape[1], settings.rank
    model = LowRankClassifier(
        _glorot_normal(inputs, rank, draw).to(device),
        _glorot_normal(rank, num_classes, draw).to(device),
        torch.zeros(num_classes, device=device),
    )
    for weight in model:
        weight.requires_grad_()
    x = torch.from_numpy(np.ascontiguousarray(features, np.float32)).to(device)
    y = torch.from_numpy(np.asarray(classes, np.int64)).to(device)
    adam = torch.optim.Adam(list(model), lr=settings.learning_rate)
    waiting = torch.empty(0, dtype=torch.int64)
    size = min(settings.batch_size, len(x))
    for _ in range(settings.steps):
        if len(waiting) < size:
            waiting = torch.randperm(len(x), generator=draw)
        rows, waiting = waiting[:size].to(device), waiting[size:]
        chosen = torch.randperm(rank, generator=draw)[: settings.components].to(device)
        loss = F.cross_entropy(model.logits(x[rows], chosen), y[rows])
        adam.zero_grad()
        loss.backward()
        adam.step()
    return LowRankClassifier(*(weight.detach() for weight in model))


def _glorot_normal(inputs: int, outputs: int, draw: torch.Generator) -> Tensor:
    return torch.randn(inputs, outputs, generator=draw) * math.sqrt(2 / (inputs + outputs))


def linear_scores(
    kind: Kind,
    train_features: np.ndarray,
    train_classes: np.ndarray,
    test_features: np.ndarray,
    num_classes: int,
    *,
    settings: LowRankSettings = LowRankSettings(),
    device: torch.device | str = "cpu",
) -> tuple[np.ndarray, dict[str, Any]]:
    """Train on one window an example, and score the others by the mean over their windows.

    Args:
        kind: "lrc" the paper's low-rank classifier, "svm" a linear support vector machine,
            "logistic" a logistic regression; the penalties of these two are chosen by
            cross-validation on the training features, which are standardised for them.
        train_features: (N, D). train_classes: (N,) integers.
        test_features: (M, W, D); rows of a window that is not there are nan.

    Returns:
        scores (M, C): of the SVM means of margins, else of probabilities; and what was chosen.

    Raises:
        ValueError: shapes that do not fit, an example without a window, fewer than two classes.
        ImportError: scikit-learn is not there for "svm" or "logistic".
    """
    if kind not in get_args(Kind):
        raise ValueError(f"classifier {kind!r}; it is one of {', '.join(get_args(Kind))}")
    check_features("training", train_features, train_classes)
    there = np.isfinite(test_features).all(-1)
    if test_features.ndim != 3 or not there.any(1).all():
        raise ValueError(
            f"test features are {test_features.shape}, {(~there.any(-1)).sum()} examples without a "
            "window; they must be (M, W, D) with a window each"
        )
    if test_features.shape[2] != train_features.shape[1]:
        raise ValueError(
            f"features are {train_features.shape[1]} wide in training, "
            f"{test_features.shape[2]} in the test"
        )
    if len(np.unique(train_classes)) < 2:
        raise ValueError("the training examples are all of one class; it takes at least two")
    rows = test_features[there]  # one behind the other
    chosen: dict[str, Any] = {}
    if kind == "lrc":
        model = train_low_rank(train_features, train_classes, num_classes, settings, device)
        scores = model.scores(rows)
    else:
        scores, chosen = _with_sklearn(kind, train_features, train_classes, rows, num_classes)
    total = np.zeros((*there.shape, scores.shape[1]))
    total[there] = scores
    return total.sum(1) / there.sum(1, keepdims=True), chosen


def _with_sklearn(
    kind: str, features: np.ndarray, classes: np.ndarray, rows: np.ndarray, num_classes: int
) -> tuple[np.ndarray, dict[str, Any]]:
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import GridSearchCV, StratifiedKFold
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
        from sklearn.svm import LinearSVC
    except ImportError as error:
        raise ImportError(NEEDS_SKLEARN.format(kind)) from error
    folds = min(FOLDS, max(Counter(classes.tolist()).values()))
    if folds < 2:
        raise ValueError("every class has one training example; choosing the penalty takes two")
    one: Any = LinearSVC(max_iter=10_000) if kind == "svm" else LogisticRegression(max_iter=2000)
    search = GridSearchCV(
        make_pipeline(StandardScaler(), one),
        {f"{type(one).__name__.lower()}__C": list(_STRENGTHS[kind])},
        cv=StratifiedKFold(folds, shuffle=True, random_state=0),
    )
    with warnings.catch_warnings():
        # rare classes miss some folds
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        search.fit(features, classes)
    found = search.decision_function(rows) if kind == "svm" else search.predict_proba(rows)
    if found.ndim == 1:  # of two classes
        found = np.stack((-found, found), 1)
    scores = np.full((len(rows), num_classes), found.min() - 1)  # classes without training example
    scores[:, search.classes_] = found
    (strength,) = search.best_params_.values()
    return scores, {"C": strength}


def check_features(name: str, features: np.ndarray, classes: np.ndarray) -> None:
    """Raises ValueError unless features are (N, D) and finite, and classes (N,) integers."""
    if features.ndim != 2 or not len(features) or np.shape(classes) != (len(features),):
        raise ValueError(
            f"{name} features are {features.shape} for classes {np.shape(classes)}; "
            "they must be (N, D) and (N,), N above 0"
        )
    if not np.isfinite(features).all():
        raise ValueError(f"{name} features hold values that are not finite; leave those out")
