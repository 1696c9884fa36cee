"""Sentences to word numbers, and which sentences belong to a clip.

The rules are those of the released code: punctuation is removed, letters are lower-cased, and white
space separates words. Symbols (notes, emoji, currencies) go as punctuation does, and so do
characters without a shape; one accented letter is the same however it is composed. Number 0 is
padding and 1 an unknown word. Nothing marks the beginning or the end of a sentence.
"""

import json
import math
import os
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_text

PADDING, UNKNOWN = "<pad>", "<unk>"
PADDING_ID, UNKNOWN_ID = 0, 1


def split_words(sentence: str) -> list[str]:
    """The words of a sentence: "It's a dog, barking." gives ["its", "a", "dog", "barking"]."""
    if sentence.isascii():
        return sentence.translate(_NO_PUNCTUATION).lower().split()
    composed = unicodedata.normalize("NFC", sentence)
    kept = "".join(c for c in composed if unicodedata.category(c) not in _NO_LETTERS)
    return unicodedata.normalize("NFC", kept.lower()).split()


def composed(text: str) -> str:
    """``text`` with its accented letters in one form (NFC), so that equal names are equal."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


# punctuation, symbols, shapeless characters, halves of a surrogate pair
_NO_LETTERS = {"Pc", "Pd", "Pe", "Pf", "Pi", "Po", "Ps", "Sc", "Sk", "Sm", "So", "Cf", "Cs"}
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Vocabulary:
    """Words and their numbers.

    ``len()`` is the size of a model's word table: it counts padding and the unknown word too.
    """

    def __init__(self, words: Sequence[str]) -> None:
        """``words`` in the order of their numbers.

        Raises ValueError where the first two are not ``<pad>`` and ``<unk>``.
        """
        self.words = tuple(words)
        if self.words[:2] != (PADDING, UNKNOWN):
            raise ValueError(
                f"a vocabulary begins {self.words[:2]}; its first two words must be {PADDING} and "
                f"{UNKNOWN}"
            )
        self.number_of = {word: number for number, word in enumerate(self.words)}
        if len(self.number_of) < len(self.words):
            twice = next(word for word, count in Counter(self.words).items() if count > 1)
            raise ValueError(f"{twice!r} is twice in the vocabulary; each word has one number")
        for word in self.words[2:]:
            if word.split() != [word]:
                raise ValueError(
                    f"{word!r} is not one word; words hold no white space and are not empty"
                )
            if not is_writable(word):
                raise ValueError(f"{word!r} holds half of a surrogate pair; no file can hold it")

    @classmethod
    def build(cls, sentences: Iterable[str], max_size: int | None = None) -> "Vocabulary":
        """The most frequent words of ``sentences``; ties in alphabetical order.

        Args:
            max_size: the most words, the two special ones included.

        Raises:
            ValueError: ``max_size`` has no room for a word, or no sentence holds one.
        """
        if max_size is not None and max_size < 3:
            raise ValueError(
                f"max_size is {max_size}; {PADDING}, {UNKNOWN} and one word need at least 3"
            )
        counts = Counter(word for sentence in sentences for word in split_words(sentence))
        if not counts:
            raise ValueError(
                "no sentence holds a word, so there is no vocabulary to build; "
                "give captions with words"
            )
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        return cls([PADDING, UNKNOWN, *ranked[: None if max_size is None else max_size - 2]])

    def encode(self, sentences: Sequence[str], words: int) -> np.ndarray:
        """(n, words) int32: each sentence's word numbers, cut or padded with 0.

        Raises:
            TypeError: one string instead of a list of them.
            ValueError: no room for a word.
        """
        if isinstance(sentences, str):
            raise TypeError(
                "encode takes a list of sentences, not one string: "
                f"encode([{sentences[:40]!r}], {words})"
            )
        if words < 1:
            raise ValueError(f"words is {words}; a text has room for at least 1 word")
        numbers = np.full((len(sentences), words), PADDING_ID, np.int32)
        for row, sentence in zip(numbers, sentences, strict=True):
            found = [self.number_of.get(word, UNKNOWN_ID) for word in split_words(sentence)[:words]]
            row[: len(found)] = found
        return numbers

    def decode(self, numbers: Iterable[int]) -> str:
        """The words of one row, without its padding."""
        return " ".join(self.words[number] for number in numbers if number != PADDING_ID)

    def save(self, path: str | os.PathLike) -> None:
        """Write a JSON list into a .json file, one word a line into any other.

        The file is written whole or not at all.
        """
        path = Path(path)
        text = "\n".join(self.words)
        if path.suffix == ".json":
            text = json.dumps(self.words, ensure_ascii=False, indent=0)
        write_text(path, text + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Vocabulary":
        """Read what ``save`` wrote. Raises ValueError where the file holds something else."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8-sig")
            as_json = path.suffix == ".json"
            words = json.loads(text) if as_json else text.removesuffix("\n").split("\n")
            if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
                raise ValueError("it is not a list of words")
            return cls(words)
        # bytes that are no text and text that is no JSON are ValueErrors too
        except ValueError as error:
            raise ValueError(
                f"{path} is no vocabulary ({error}); write one with Vocabulary.save"
            ) from error

    def __len__(self) -> int:
        return len(self.words)

    def __contains__(self, word: str) -> bool:
        return word in self.number_of

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.words == other.words

    def __hash__(self) -> int:
        return hash(self.words)

    def __repr__(self) -> str:
        return f"Vocabulary({len(self)} words)"


@dataclass(frozen=True)
class Caption:
    """A sentence spoken or written about a file between two times, in seconds."""

    start: float
    end: float
    text: str


def nearest_sentences(
    captions: Sequence[Caption], window: tuple[float, float], count: int
) -> list[int]:
    """Which sentences are nearest in time to the centre of a window.

    A sentence that the centre falls into is at distance 0. Ties go to the sentence whose middle is
    nearer, then to the one that is earlier in the list.

    Args:
        window: start and end in seconds.

    Returns:
        positions in ``captions``, nearest first; fewer than ``count`` where there are fewer.
    """
    times = np.array([(caption.start, caption.end) for caption in captions]).reshape(-1, 2)
    return nearest_times(times, window, count).tolist()


def nearest_times(times: np.ndarray, window: tuple[float, float], count: int) -> np.ndarray:
    """``nearest_sentences`` of starts and ends (n, 2) in seconds."""
    start, end = window
    if not (math.isfinite(start) and math.isfinite(end) and start <= end):
        raise ValueError(f"window is {window}; it must be two finite times in order")
    centre = (start + end) / 2
    outside = np.maximum(np.maximum(times[:, 0] - centre, centre - times[:, 1]), 0.0)
    return np.lexsort((np.abs(times.mean(1) - centre), outside))[:count]


def read_json(path: Path) -> Any:
    """A JSON file in UTF-8, 16 or 32, with or without a byte-order mark, each name once.

    Raises:
        ValueError: anything else, with the file.
    """
    try:
        return json.loads(path.read_bytes(), object_pairs_hook=refuse_repeats)
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply; rewrite it") from error
    except ValueError as error:
        raise ValueError(
            f"{path} cannot be read as JSON ({error}); repair or rewrite it"
        ) from error


def is_writable(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text)


def writable(text: str) -> str:
    """``text`` with U+FFFD for halves of surrogate pairs."""
    return "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text)


def caption_of(entry: Any, where: str) -> Caption:
    if not isinstance(entry, Mapping):
        raise ValueError(
            f"{where} is a JSON {kind_of(entry)}; "
            'write {"start": seconds, "end": seconds, "text": "..."}'
        )
    for key in ("start", "end", "text"):
        if key not in entry:
            raise ValueError(
                f"{where} has no {key!r}, only {sorted(entry)}; "
                "each caption has start, end and text"
            )
    for key in ("start", "end"):
        value = entry[key]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(
                f"{where} has {key} {value!r}, a JSON {kind_of(value)}; "
                "give it as a number of seconds"
            )
        if not (math.isfinite(value) if isinstance(value, float) else abs(value) < 2**63):
            raise ValueError(
                f"{where} has {key} {value:.6g}; times are finite: correct or remove the caption"
                if isinstance(value, float)
                else f"{where} has a {key} of {value.bit_length()} bits; correct or remove it"
            )
    if not isinstance(entry["text"], str):
        raise ValueError(
            f"{where} has text {entry['text']!r:.80}, a JSON {kind_of(entry['text'])}; "
            "give it as a string"
        )
    if entry["end"] < entry["start"]:
        raise ValueError(
            f"{where} has end {entry['end']} before start {entry['start']}; "
            "a caption ends at or after its start: swap or correct them"
        )
    text = unicodedata.normalize("NFC", entry["text"])
    return Caption(float(entry["start"]), float(entry["end"]), text)


def refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON silently keeps the last of several entries of one name; captions would vanish."""
    counts = Counter(key for key, _ in pairs)
    if repeated := [key for key, count in counts.items() if count > 1]:
        raise ValueError(f"{repeated[0]!r} is there {counts[repeated[0]]} times")
    return dict(pairs)


def kind_of(value: Any) -> str:
    if value is None:
        return "null"
    names = {
        bool: "boolean",
        int: "number",
        float: "number",
        str: "string",
        list: "list",
        dict: "object",
    }
    return names.get(type(value), type(value).__name__)
