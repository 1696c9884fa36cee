"""The word list of the released text towers, ``misc/howto100m_en.txt``.

Read as the release's tokenizer does (DMVR's WordTokenizer): a line is a word, whose number is the
line's, or a number and a word. ``<pad>``, ``<bos>``, ``<eos>`` and ``<unk>`` are among the words.
Our vocabularies begin with ``<pad>`` and ``<unk>``, so the word table's rows may have to move. A
list may also lack these two, as MIL-NCE's ``dict.npy`` does, where the table has rows for them.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from ..data.text import PADDING, UNKNOWN, Vocabulary


def read_word_list(path: str | os.PathLike) -> list[str]:
    """The words in the order of their numbers.

    A .json file is a list of words, as ``Vocabulary.save`` writes it, an .npy file an array of
    strings, any other file text in the form above.

    Raises:
        ValueError: the file holds something else, or a number is missing or there twice.
    """
    path = Path(path)
    try:
        if path.suffix == ".npy":
            words = _array(np.load(path, allow_pickle=False))
        elif path.suffix == ".json":
            words = json.loads(path.read_text(encoding="utf-8"))
        else:
            words = _lines(path.read_text(encoding="utf-8-sig"))
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError("it is not a list of words")
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing; give the word list of the text tower") from error
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} is no word list: {error}") from error
    return words


def _array(words: Any) -> list[str]:
    if not isinstance(words, np.ndarray):
        raise ValueError("it holds several arrays")
    if words.ndim != 1 or words.dtype.kind not in "US":
        raise ValueError(f"it holds {words.dtype} of shape {words.shape}, not a row of words")
    return [word.decode() if isinstance(word, bytes) else word for word in words.tolist()]


def _lines(text: str) -> list[str]:
    number_of: dict[int, str] = {}
    for line_number, line in enumerate(text.removesuffix("\n").split("\n")):
        parts = line.split()
        if len(parts) == 1:
            number = line_number
        elif len(parts) == 2 and parts[0].isdecimal():
            number = int(parts[0])
        else:
            raise ValueError(
                f"line {line_number + 1} is {line[:40]!r}; it must be a word, or a number and a "
                "word"
            )
        if number in number_of:
            raise ValueError(f"two words have number {number}")
        number_of[number] = parts[-1]
    if max(number_of) >= len(number_of):
        gap = next(number for number in range(len(number_of)) if number not in number_of)
        raise ValueError(f"no word has number {gap}")
    return [number_of[number] for number in range(len(number_of))]


def unknown_second(words: list[str], *, rows: int, source: str) -> tuple[Vocabulary, list[int]]:
    """Our vocabulary of these words, and for each of its words the row of the word table.

    Where ``<pad>``, or it and ``<unk>``, are not among the words and there are as many more rows,
    these are the table's first.

    Raises:
        ValueError: there is not one word a row, the first is not ``<pad>``, none is ``<unk>``, or a
            word is there twice or holds white space.
    """
    lacking = [word for word in (PADDING, UNKNOWN) if word not in words]
    if len(words) + len(lacking) == rows and UNKNOWN not in lacking[:1]:
        words = [*lacking, *words]
    if len(words) != rows:
        without = f" (without {' and '.join(lacking)})" if lacking else ""
        raise ValueError(
            f"{source} has {len(words)} words{without}, the word table {rows} rows; give the list "
            "that belongs to the checkpoint"
        )
    if words[0] != PADDING or UNKNOWN not in words:
        raise ValueError(
            f"{source} has a word for each of the {rows} rows and begins {words[0]!r}; the first "
            f"word must be {PADDING}, and {UNKNOWN} one of the others"
        )
    unknown = words.index(UNKNOWN)
    order = [0, unknown, *(row for row in range(1, rows) if row != unknown)]
    try:
        return Vocabulary([words[row] for row in order]), order
    except ValueError as error:
        raise ValueError(f"{source} is no word list: {error}") from error
