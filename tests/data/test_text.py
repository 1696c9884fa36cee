"""Word rules, the vocabulary, the nearest sentences and what captions may hold."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vatt_fast.data.captions import load_captions
from vatt_fast.data.text import Caption, Vocabulary, nearest_sentences, split_words


@pytest.mark.parametrize(
    ("sentence", "words"),
    [
        ("A Dog barks.", ["a", "dog", "barks"]),
        ("It's a dog, barking!", ["its", "a", "dog", "barking"]),
        ("  two\twords\n", ["two", "words"]),
        ("well-known $5 C++", ["wellknown", "5", "c"]),
        ("“Ça va?” « ÉTÉ »", ["ça", "va", "été"]),
        ("... !?", []),
        ("", []),
    ],
)
def test_split_words(sentence, words):
    assert split_words(sentence) == words


def test_build_orders_by_count_then_alphabet():
    vocabulary = Vocabulary.build(["the red dog", "the blue dog", "The cat."])
    assert vocabulary.words == ("<pad>", "<unk>", "the", "dog", "blue", "cat", "red")
    assert Vocabulary.build(["the red dog", "the blue dog", "The cat."], max_size=4).words == (
        "<pad>",
        "<unk>",
        "the",
        "dog",
    )
    assert "dog" in vocabulary and "bird" not in vocabulary and len(vocabulary) == 7


@pytest.mark.parametrize(
    ("sentences", "size", "message"),
    [(["a"], 2, "max_size is 2"), (["...", ""], 10, "no sentence holds a word")],
)
def test_build_refuses_nothing_to_build(sentences, size, message):
    with pytest.raises(ValueError, match=message):
        Vocabulary.build(sentences, size)


def test_encode_pads_cuts_and_marks_unknown():
    vocabulary = Vocabulary(["<pad>", "<unk>", "a", "dog"])
    numbers = vocabulary.encode(["A dog.", "a dog a dog a", "bird", ""], 4)
    assert numbers.dtype == np.int32
    assert numbers.tolist() == [[2, 3, 0, 0], [2, 3, 2, 3], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert vocabulary.decode(numbers[0]) == "a dog"
    assert vocabulary.encode([], 4).shape == (0, 4)
    with pytest.raises(TypeError, match="list of sentences"):
        vocabulary.encode("a dog", 4)
    with pytest.raises(ValueError, match="words is 0"):
        vocabulary.encode(["a dog"], 0)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(max_size=40), min_size=1, max_size=8))
def test_known_words_survive_encoding(sentences):
    if not any(split_words(sentence) for sentence in sentences):
        return
    vocabulary = Vocabulary.build(sentences)
    for sentence, row in zip(sentences, vocabulary.encode(sentences, 50), strict=True):
        assert vocabulary.decode(row) == " ".join(split_words(sentence))


@pytest.mark.parametrize("name", ["vocabulary.txt", "vocabulary.json"])
def test_save_and_load(tmp_path, name):
    vocabulary = Vocabulary.build(["the red dog", "été"])
    vocabulary.save(tmp_path / name)
    assert Vocabulary.load(tmp_path / name) == vocabulary
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("v.txt", "dog\ncat\n", "must be <pad> and <unk>"),
        ("v.txt", "<pad>\n<unk>\ndog\ndog\n", "'dog' is twice"),
        ("v.txt", "<pad>\n<unk>\na dog\n", "not one word"),
        ("v.json", '{"a": 1}', "not a list of words"),
        ("v.json", "[1, 2]", "not a list of words"),
        ("v.json", '["<pad>", "<unk>"', "no vocabulary"),
        ("v.txt", b"\x80\x04\x95\xff.", "no vocabulary"),  # a pickle
    ],
)
def test_load_refuses(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as error:
        Vocabulary.load(tmp_path / name)
    assert name in str(error.value)


CAPTIONS = [Caption(0, 1, "a"), Caption(0.8, 1.2, "b"), Caption(2, 3, "c"), Caption(5, 6, "d")]


@pytest.mark.parametrize(
    ("window", "count", "expected"),
    [
        ((0, 2), 4, [1, 0, 2, 3]),  # centre 1: inside a and b, whose middle is nearer
        ((2, 4), 2, [2, 1]),  # centre 3: inside c; b ended 1.8 before, d begins 2 later
        ((4, 4), 1, [2]),  # c and d are both 1 away; so are their middles: the earlier one
        ((0, 20), 3, [3, 2, 1]),
        ((0, 2), 9, [1, 0, 2, 3]),
    ],
)
def test_nearest_sentences(window, count, expected):
    assert nearest_sentences(CAPTIONS, window, count) == expected
    assert nearest_sentences([], window, count) == []


def test_nearest_sentences_refuses_windows_without_a_centre():
    with pytest.raises(ValueError, match="two finite times in order"):
        nearest_sentences(CAPTIONS, (2, 1), 3)


def test_load_captions(tmp_path):
    path = tmp_path / "captions.json"
    path.write_text(
        json.dumps(
            {"a.mp4": [{"start": 0, "end": 1.5, "text": "a dog", "speaker": 3}], "b.mp4": []}
        )
    )
    assert load_captions(path) == {"a.mp4": (Caption(0.0, 1.5, "a dog"),), "b.mp4": ()}
    path.write_text('{"a.mp4": {"start": [0], "end": [1.5], "text": ["a <i>dog</i>\\n&amp; co"]}}')
    assert load_captions(path) == {"a.mp4": (Caption(0.0, 1.5, "a dog & co"),)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"start": 0}]', "holds a JSON list; it must be an object"),
        (
            '{"a.mp4": {"start": 0}}',
            r"'a.mp4' has \['start'\]; it must have lists start, end and text",
        ),
        ('{"a.mp4": ["hello"]}', "'a.mp4' caption 0 is a JSON string"),
        ('{"a.mp4": [{"start": 0, "end": 1}]}', "caption 0 has no 'text'"),
        (
            '{"a.mp4": [{"start": 0, "end": 1, "text": "x"}, {"start": 2, "end": 1, "text": "x"}]}',
            "caption 1 has end 1 before start 2.*swap",
        ),
        (
            '{"a.mp4": [{"start": "0", "end": 1, "text": "x"}]}',
            "start '0', a JSON string; give it as a number",
        ),
        ('{"a.mp4": [{"start": true, "end": 1, "text": "x"}]}', "start True, a JSON boolean"),
        ('{"a.mp4": [{"start": 0, "end": NaN, "text": "x"}]}', "end nan; times are finite"),
        ('{"a.mp4": [{"start": 0, "end": Infinity, "text": "x"}]}', "end inf; times are finite"),
        (
            '{"a.mp4": [{"start": 0, "end": 1, "text": null}]}',
            "text None, a JSON null; give it as a string",
        ),
        ('{"a.mp4": [], "a.mp4": []}', "'a.mp4' is there 2 times"),
        ('{"a.mp4": [', "cannot be read as JSON"),
    ],
)
def test_bad_captions_name_file_caption_value_rule_and_remedy(tmp_path, content, message):
    path = tmp_path / "captions.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        load_captions(path)
    assert str(path) in str(error.value)
