"""Captions and words that programs of all kinds write: repaired or refused when they are read."""

import json

import pytest
from tried import tried

from vatt_fast.data.captions import load_captions
from vatt_fast.data.text import Vocabulary, split_words

CAPTIONS = "captions that cannot be written back, byte-order marks"
WORDS = "words"


def write(path, text, name="a.mp4"):
    entry = {"start": 0, "end": 1, "text": text}
    path.write_text(json.dumps({name: [entry, {**entry, "text": "fine"}]}))


@tried(CAPTIONS, "half an emoji in a sentence", "U+FFFD, with a warning naming file and caption")
@pytest.mark.parametrize("half", [chr(0xD83D), chr(0xDC36), chr(0xDC36) + chr(0xD83D)])
def test_half_an_emoji(tmp_path, half):
    path = tmp_path / "captions.json"
    write(path, f"nice {half} dog")
    with pytest.warns(UserWarning, match=r"captions\.json has 1 texts.*'a\.mp4' caption 0") as seen:
        captions = load_captions(path)["a.mp4"]
    assert len(seen) == 1
    assert [one.text for one in captions] == [f"nice {'�' * len(half)} dog", "fine"]
    vocabulary = Vocabulary.build(one.text for one in captions)
    vocabulary.save(tmp_path / "vocabulary.txt")
    assert Vocabulary.load(tmp_path / "vocabulary.txt").words[2:] == ("dog", "fine", "nice")


@tried(CAPTIONS, "half an emoji in a vocabulary", "refused; no file is left over")
def test_vocabularies_without_halves(tmp_path):
    vocabulary = Vocabulary.build([json.loads('"nice \\ud83d dog\\ud83d"')])
    assert vocabulary.words[2:] == ("dog", "nice")
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        Vocabulary(["<pad>", "<unk>", "dog\ud83d"])
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError):
        vocabulary.save(tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@tried(CAPTIONS, "UTF-8 with a byte-order mark, UTF-16, UTF-32", "read")
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_encodings_of_captions(tmp_path, encoding):
    path = tmp_path / "captions.json"
    text = json.dumps({"é.mp4": [{"start": 0, "end": 1, "text": "Ça va"}]}, ensure_ascii=False)
    path.write_bytes(text.encode(encoding))
    assert load_captions(path)["é.mp4"][0].text == "Ça va"


@tried(CAPTIONS, "a vocabulary with a byte-order mark, with Windows' line ends", "read")
@pytest.mark.parametrize("name", ["v.txt", "v.json"])
def test_byte_order_marks_of_vocabularies(tmp_path, name):
    vocabulary = Vocabulary(["<pad>", "<unk>", "dog", "été"])
    vocabulary.save(tmp_path / name)
    content = (tmp_path / name).read_bytes().replace(b"\n", b"\r\n")
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content)
    assert Vocabulary.load(tmp_path / name) == vocabulary


@tried(CAPTIONS, "times of 400 digits, JSON nested 100000 deep", "ValueError with the file")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a.mp4": [{"start": 1' + "0" * 400 + ', "end": 1, "text": "x"}]}', "start of 1329 bits"),
        ('{"a.mp4": [{"start": 1e999, "end": 1, "text": "x"}]}', "start inf"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a.mp4": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ("", "cannot be read as JSON"),
        ("\0\0\0\0", "cannot be read as JSON"),
    ],
)
def test_absurd_captions(tmp_path, content, message):
    (tmp_path / "captions.json").write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        load_captions(tmp_path / "captions.json")
    assert "captions.json" in str(error.value) and len(str(error.value)) < 1000


@tried(WORDS, "accents composed in two ways", "one word")
def test_forms_of_accents():
    composed, decomposed = "a caf\u00e9 \u00c9T\u00c9", "a cafe\u0301 E\u0301TE\u0301"
    assert split_words(composed) == split_words(decomposed) == ["a", "caf\u00e9", "\u00e9t\u00e9"]
    vocabulary = Vocabulary.build([decomposed])
    assert vocabulary.encode([composed], 3).tolist() == vocabulary.encode([decomposed], 3).tolist()
    assert 1 not in vocabulary.encode([composed], 3)


@tried(WORDS, "notes, emoji, currencies, zero-width characters, a mark inside", "no words of them")
@pytest.mark.parametrize(
    ("sentence", "words"),
    [
        ("\u266a la la \u266a", ["la", "la"]),
        ("\u266a \u266b", []),
        ("\u20ac5 $5 \u00a35", ["5", "5", "5"]),
        ("dog\u200b \ufeffdog", ["dog", "dog"]),
        ("a \U0001f436 dog", ["a", "dog"]),
        ("\u202bdog\u202c", ["dog"]),
        ("\ufffd dog\ufffd", ["dog"]),
        ("\u0939\u093f\u0928\u094d\u0926\u0940", ["\u0939\u093f\u0928\u094d\u0926\u0940"]),
    ],
)
def test_symbols_are_no_words(sentence, words):
    assert split_words(sentence) == words
