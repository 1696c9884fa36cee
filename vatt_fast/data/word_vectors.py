"""Word vectors of others as a model's word table, with the vocabulary that they bring.

Read are word2vec's text and binary files, GloVe's text, which has no header, and the released
code's pair: ``word2vec.pkl`` with its word list ``howto100m_en.txt`` beside it.
"""

import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoints.words import read_word_list
from .text import PADDING, UNKNOWN, Vocabulary, split_words

RELEASED_WORDS = "howto100m_en.txt"


def read_word_vectors(
    path: str | Path, max_words: int | None = None
) -> tuple[Vocabulary, np.ndarray]:
    """The vocabulary and its table (V, dim) fp32; padding's row is 0, the unknown word's the mean.

    Words that a caption cannot hold (with capitals, punctuation or white space) are left out: of
    "Dog" and "dog" the table keeps "dog".

    Args:
        max_words: the most words, the two special ones included; the file's first ones are taken.

    Raises:
        ValueError: the file is none of the formats, is cut short, or holds no usable word.
    """
    path = Path(path)
    try:
        pairs = _released(path) if path.suffix == ".pkl" else _word2vec(path)
        vectors: dict[str, np.ndarray] = {}
        room = None if max_words is None else max_words - 2
        for word, vector in pairs:
            if word in vectors or word in (PADDING, UNKNOWN) or split_words(word) != [word]:
                continue
            if room is not None and len(vectors) >= room:
                break
            vectors[word] = vector
    except (ValueError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} cannot be read as word vectors: {error}") from error
    if not vectors:
        raise ValueError(f"{path} holds no word in lower case without punctuation")
    table = np.stack(list(vectors.values())).astype(np.float32)
    if not np.isfinite(table).all():
        raise ValueError(f"{path} holds values that are not finite")
    special = np.stack([np.zeros_like(table[0]), table.mean(0)])
    return Vocabulary([PADDING, UNKNOWN, *vectors]), np.concatenate([special, table])


def _word2vec(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    with open(path, "rb") as file:
        first = file.readline().split()
        header = len(first) == 2 and all(part.isdigit() for part in first)
        if not header:
            file.seek(0)
            yield from _text(file, None, None)
            return
        count, dim = map(int, first)
        begin = file.tell()
        line = file.readline()
        file.seek(begin)
        # a line of text has a word and numbers; in a binary file the bytes of floats follow
        try:
            text = len([float(part) for part in line.split()[1:]]) == dim
        except ValueError:
            text = False
        yield from _text(file, count, dim) if text else _binary(file, count, dim)


def _text(file, count: int | None, dim: int | None) -> Iterator[tuple[str, np.ndarray]]:
    seen = 0
    for line in file:
        word, *numbers = line.decode(errors="replace").rstrip().split(" ")
        dim = dim or len(numbers)
        if not dim or len(numbers) != dim:
            raise ValueError(
                f"line {seen + 1 + (count is not None)} has {len(numbers)} numbers, not {dim}"
            )
        yield word, np.array(numbers, np.float32)
        seen += 1
    if count is not None and seen != count:
        raise ValueError(f"its header promises {count} words, it has {seen}")


def _binary(file, count: int, dim: int) -> Iterator[tuple[str, np.ndarray]]:
    for number in range(count):
        letters = bytearray()
        while (letter := file.read(1)) != b" ":
            if not letter or len(letters) > 10_000:
                raise ValueError(f"its header promises {count} words of {dim}, it has {number}")
            letters += letter
        values = file.read(4 * dim)
        if len(values) != 4 * dim:
            raise ValueError(f"its header promises {count} words of {dim}, it has {number}")
        # words are followed by a line's end in some files
        yield letters.decode(errors="replace").lstrip("\n"), np.frombuffer(values, "<f4")


# -- the released code's ---------------------------------------------------------------------------


class _ArraysOnly(pickle.Unpickler):
    """Unpickles NumPy arrays in plain containers, and no other class: nothing else can run."""

    ALLOWED = frozenset(
        (module, name)
        for module in ("numpy.core.multiarray", "numpy._core.multiarray", "numpy")
        for name in ("_reconstruct", "ndarray", "dtype", "scalar")
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which is not loaded")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _released(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    words_path = path.with_name(RELEASED_WORDS)
    if not words_path.is_file():
        raise ValueError(f"its word list {RELEASED_WORDS} is not beside it")
    words = read_word_list(words_path)
    values = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    table = np.asarray(values["word_embeddings"] if isinstance(values, dict) else values)
    if table.ndim != 2 or len(table) != len(words):
        raise ValueError(
            f"its vectors are {table.shape}, and {RELEASED_WORDS} has {len(words)} words"
        )
    yield from zip(words, table, strict=True)
