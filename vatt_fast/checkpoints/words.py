"""The word list of the released text towers, ``misc/howto100m_en.txt``.

Read as the release's tokenizer does (DMVR's WordTokenizer): a line is a word, whose number is the
line's, or a number and a word. ``<pad>``, ``<bos>``, ``<eos>`` and ``<unk>`` are among the words.
Our vocabularies begin with ``<pad>`` and ``<unk>``, so the word table's rows may have to move.
"""

import json
import os
from pathlib import Path

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
            words = np.load(path, allow_pickle=False).ravel().tolist()
        elif path.suffix == ".json":
            words = json.loads(path.read_text(encoding="utf-8"))
        else:
            words = _lines(path.read_text(encoding="utf-8-sig"))
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError("it is not a list of words")
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing; give the word list of the text tower") from error
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is no word list: {error}") from error
    return words


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

    Raises:
        ValueError: there is not one word a row, the first is not ``<pad>``, none is ``<unk>``, or a
            word is there twice or holds white space.
    """
    if len(words) != rows:
        raise ValueError(
            f"{source} has {len(words)} words, the word table {rows} rows; give the list that "
            "belongs to the checkpoint"
        )
    if words[0] != PADDING or UNKNOWN not in words:
        raise ValueError(
            f"{source} begins {words[0]!r}; the first word must be {PADDING}, and {UNKNOWN} one of "
            "the others"
        )
    unknown = words.index(UNKNOWN)
    order = [0, unknown, *(row for row in range(1, rows) if row != unknown)]
    try:
        return Vocabulary([words[row] for row in order]), order
    except ValueError as error:
        raise ValueError(f"{source} is no word list: {error}") from error
