"""Linear probe: what a logistic regression learns from arrays of frozen features.

``linear.py`` has the paper's classifiers, and ``vatt-fast probe`` measures labelled media.
"""

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

FOLDS = 5
NEEDS_SKLEARN = "{} needs scikit-learn: pip install 'vatt_fast[eval]'"


def linear_probe(
    train_features: np.ndarray,
    train_labels: Sequence[Any],
    test_features: np.ndarray,
    test_labels: Sequence[Any],
    *,
    strengths: Sequence[float] = (0.01, 0.1, 1.0, 10.0),
) -> float:
    """Test accuracy in percent of a logistic regression fitted to the training features.

    Args:
        train_features, test_features: (n, D) float; both are standardised with the mean and the
            deviation of the training features.
        train_labels, test_labels: n labels, any hashable values.
        strengths: inverses of the L2 penalty (scikit-learn's C). Cross-validation on the training
            features chooses among them, the test set never does.

    Raises:
        ValueError: shapes that do not match, features that are not finite, fewer than two classes.
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import GridSearchCV, StratifiedKFold
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ImportError(NEEDS_SKLEARN.format("linear_probe")) from error
    _check("train", train_features, train_labels)
    _check("test", test_features, test_labels)
    if np.shape(train_features)[1] != np.shape(test_features)[1]:
        raise ValueError(
            f"features are {np.shape(train_features)[1]} wide in training, "
            f"{np.shape(test_features)[1]} in the test"
        )
    if len(set(train_labels)) < 2:
        raise ValueError("the training labels are all alike; a probe needs at least two classes")
    folds = min(FOLDS, max(Counter(train_labels).values()))
    if folds < 2:
        raise ValueError(
            "every training label occurs once; "
            "choosing the penalty takes a class with at least two clips"
        )
    # by number: scikit-learn would make a matrix of labels that are tuples
    number_of = {label: number for number, label in enumerate(dict.fromkeys(train_labels))}
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    chosen = GridSearchCV(
        classifier,
        {"logisticregression__C": list(strengths)},
        cv=StratifiedKFold(folds, shuffle=True, random_state=0),
    )
    with warnings.catch_warnings():
        # rare classes miss some folds
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        chosen.fit(train_features, [number_of[label] for label in train_labels])
    right = chosen.predict(test_features) == [number_of.get(label, -1) for label in test_labels]
    return 100 * np.count_nonzero(right) / len(test_labels)


def _check(name: str, features: np.ndarray, labels: Sequence[Any]) -> None:
    if np.ndim(features) != 2 or len(features) == 0 or len(features) != len(labels):
        raise ValueError(
            f"{name}_features is {np.shape(features)} for {len(labels)} labels; "
            "it takes (n, D) and n labels, n > 0"
        )
    if not np.isfinite(features).all():
        raise ValueError(f"{name}_features holds values that are not finite; leave those clips out")
