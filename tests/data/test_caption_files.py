"""Captions as other programs write them, and what is said of those that are none."""

import json
import math

import numpy as np
import pytest

from vatt_fast.data import captions
from vatt_fast.data.captions import (
    Sidecars,
    decode_text,
    from_entries,
    from_json,
    from_srt,
    from_table,
    from_vtt,
    has_no_spaces,
    read_sidecar,
    stream_entries,
)
from vatt_fast.data.listing import read_captions
from vatt_fast.data.text import Caption

SRT = """1
00:00:01,500 --> 00:00:02,000 X1:1
<i>Hello</i> {\\an8}there
friend

2
01:00:00,000 --> 01:00:01,250
It goes on

after an empty line
3
01:00:02,000 --> 01:00:03,000

"""
VTT = """WEBVTT - a title
Kind: captions

STYLE
::cue { color: red }

NOTE nothing --> here
is said

first
00:01.500 --> 00:02.000 align:start position:0%
<v Ann>so <c.loud>take</c> &amp; mix

00:00:02.000 --> 00:00:03.000
so take & mix
<00:00:02.500><c> it well</c>
"""


def plain(found):
    return [(one.start, one.end, one.text) for one in found]


def test_srt():
    assert plain(from_srt(SRT, "a.srt")) == [
        (1.5, 2.0, "Hello there friend"),
        (3600.0, 3601.25, "It goes on after an empty line"),
    ]


def test_vtt_with_rolling_lines():
    assert plain(from_vtt(VTT, "a.vtt")) == [(1.5, 2.0, "so take & mix"), (2.0, 3.0, "it well")]


def test_howto100m_table_and_lists():
    table = ',start,end,text\n0,1.0,2.5,"so, first"\n1,2,3,then\n'
    expected = [(1.0, 2.5, "so, first"), (2.0, 3.0, "then")]
    assert plain(from_table(table, "a.csv")) == expected
    lists = {"start": [1.0, 2], "end": [2.5, 3], "text": ["so, first", "then"]}
    assert plain(from_entries(lists, "a")) == expected
    assert plain(from_json(lists, "a")) == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"caption": " a  dog ", "key": "0"}, [(0.0, math.inf, "a dog")]),
        ({"captions": ["a dog", "a cat"]}, [(0.0, math.inf, "a dog"), (0.0, math.inf, "a cat")]),
        ([{"start": 1, "end": 2, "text": "a dog"}], [(1.0, 2.0, "a dog")]),
        ({"url": "x", "status": "success", "caption": None}, []),
        (
            # of a whole video: lines by language
            {
                "caption": "title",
                "yt_meta_dict": {
                    "subtitles": {
                        "en": [{"start": "00:00:01.000", "end": "00:00:02.000", "lines": ["a dog"]}]
                    }
                },
            },
            [(1.0, 2.0, "a dog")],
        ),
        (
            # of a clip that was cut from 10 s on: times are the video's
            {
                "clips": [[10.0, 15.0]],
                "clip_subtitles": [
                    {
                        "start": "00:00:11.000",
                        "end": "00:00:12.500",
                        "lines": {"en": ["a dog", "barks"]},
                    }
                ],
            },
            [(1.0, 2.5, "a dog barks")],
        ),
        (
            {
                "clips": [["00:00:10.000", "00:00:15.000"]],
                "subtitles": [{"start": 9, "end": 12, "line": "so"}],
            },
            [(-1.0, 2.0, "so")],
        ),
    ],
)
def test_json_of_shards(content, expected):
    assert plain(from_json(content, "a.json")) == expected


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-32-be"]
)
def test_encodings(encoding):
    text = "1\n00:00:00,000 --> 00:00:01,000\ncafe\u0301 no\u00ebl\n"
    data = text.encode(encoding)
    if encoding == "utf-16-le":
        with pytest.raises(ValueError, match=r"a\.srt holds zero bytes, as UTF-16 without"):
            read_sidecar("a.srt", data, "a.srt")
        return
    if encoding == "utf-32-be":
        data = b"\0\0\xfe\xff" + data
    assert plain(read_sidecar("a.srt", data, "a.srt")) == [(0.0, 1.0, "café noël")]


REFUSED = [
    ("a.srt", "hello\n".encode("utf-16-be"), "holds zero bytes"),
    ("a.srt", b"1\n00:00:00,000 --> 00:00:01,000\ncaf\xe9\n", r"a\.srt line 3 is not UTF-8 \(byte"),
    ("a.srt", b"\xff\xfea\xd8b", "begins as UTF-16-LE and goes on otherwise"),
    ("a.srt", b"hello\n", "line 1 is 'hello'; SubRip begins with a number"),
    ("a.srt", b"1\n00:00:01,000 -->\nx\n", "line 2 has the times"),
    ("a.srt", b"1\n00:00:01,000 --> 00:00:00,500\nx\n", "line 2 ends at 0.5 s, before its start"),
    ("a.vtt", b"hello\n", "line 1 is 'hello'; WebVTT begins with WEBVTT"),
    ("a.vtt", b"WEBVTT\n\nx --> y\n", "line 3 has the times 'x --> y'"),
    ("a.csv", b"start,end\n1,2\n", "has no column 'text'"),
    ("a.csv", b"start,end,text\n1,2\n", "line 2 has 2 values under 3 columns"),
    ("a.csv", b"start,end,text\n1,x,a\n", "line 2: 'x' is no time"),
    ("a.csv", b"start,end,text\n1,nan,a\n", "line 2: 'nan' is no time"),
    ("a.csv", b"text,text\n1,2\n", "two columns 'text'"),
    ("a.csv", b'start,end,text\n1,2,"a\n', "is no row of a table"),
    ("a.json", b"{", r"a\.json cannot be read as JSON"),
    ("a.json", b"3", "holds a JSON number"),
    ("a.json", b'{"a": 1, "a": 2}', "'a' is there 2 times"),
    ("a.json", b"[" * 100_000, "nested too deeply"),
    ("a.json", b'{"subtitles": [{"start": 1}]}', "subtitles 0 has no start and end"),
    ("a.json", b'{"start": [1], "end": [], "text": []}', "1 starts, 0 ends and 0 texts"),
    ("a.json", b'[{"start": 1, "end": 2, "text": 3}]', "caption 0 has text 3"),
]


@pytest.mark.parametrize(("name", "data", "message"), REFUSED)
def test_what_is_none_is_refused_in_a_line(name, data, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_sidecar(name, data, name)
    assert str(caught.value).startswith(name) and "\n" not in str(caught.value)


VALID = {
    "a.srt": SRT.encode(),
    "a.vtt": VTT.encode(),
    "a.csv": b'start,end,text\n0,1,"a, b"\n1:02:03.5,2:00:00,so\n',
    "a.tsv": b"start\tend\ttext\n0\t1\ta\n",
    "a.json": json.dumps(
        {
            "clips": [[1, 2]],
            "yt_meta_dict": {
                "subtitles": {"en": [{"start": "00:00:01.5", "end": 2, "lines": [""]}]}
            },
            "captions": [{"start": 0, "end": 1e3, "text": "é"}],
            "caption": "x",
        }
    ).encode(),
    "a.txt": "é".encode(),
}


@pytest.mark.parametrize("name", VALID)
def test_bytes_changed_anywhere_give_captions_or_a_line(name):
    random = np.random.default_rng(0)
    parts = [
        b"",
        b"9" * 400,
        b"-->",
        b"\n",
        b"[",
        b"{}",
        b"null",
        b"1e999",
        b"\xff",
        b":",
        b'"',
        b"-",
    ]
    refused = 0
    for _ in range(600):
        data = bytearray(VALID[name])
        for _ in range(int(random.integers(1, 4))):
            place = int(random.integers(len(data) + 1))
            data[place : place + int(random.integers(3))] = parts[int(random.integers(len(parts)))]
        try:
            found = read_sidecar(name, bytes(data), name)
        except ValueError as error:
            refused += 1
            told = str(error)
        else:
            told = name
            assert all(math.isfinite(c.start) and c.start <= c.end and c.text for c in found)
        assert told.startswith(name) and "\n" not in told
    assert refused > 10


def test_halves_of_surrogate_pairs():
    found = from_json({"caption": "dog \ud83d barks"}, "a.json")
    assert found[0].text == "dog \ufffd barks"


def test_scripts_without_spaces():
    assert has_no_spaces("我爱北京") and has_no_spaces("สวัสดี") and has_no_spaces("ひらがな")
    assert not any(map(has_no_spaces, ["dog", "chien à Noël", "собака", "개가 짖는다", "كلب"]))


ENTRIES = {
    "é.mp4": [{"start": 0, "end": 1, "text": 'a "dog", {barks}'}],
    "vid": {"start": [0.5], "end": [1.5], "text": ["雪 snow"]},
    "none": [],
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("chunk", [4, 7, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_large_files_are_read_piece_by_piece(tmp_path, encoding, chunk, indent):
    path = tmp_path / "caption.json"
    path.write_bytes(json.dumps(ENTRIES, ensure_ascii=False, indent=indent).encode(encoding))
    assert dict(stream_entries(path, chunk_bytes=chunk)) == ENTRIES


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "holds no JSON object"),
        ("", "holds no JSON object"),
        ('{"a": []', "no ',' after"),
        ('{"a": [}', "cannot be read as JSON"),
        ('{"a" []}', "no ':' after 'a'"),
        ('{"a": [],}', "a comma before the end"),
        ('{"a": []} x', "more after the object's end"),
        ("{3: []}", "a name that is no string"),
        ('{"a": {"b": 1, "b": 2}}', "'b' is there 2 times"),
    ],
)
@pytest.mark.parametrize("chunk", [4, 1 << 20])
def test_damaged_large_files(tmp_path, text, message, chunk):
    path = tmp_path / "caption.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        list(stream_entries(path, chunk_bytes=chunk))
    assert str(path) in str(caught.value)


def test_a_large_file_is_never_held(tmp_path, monkeypatch):
    """What is decoded at once is a chunk and one entry, however long the file is."""
    path = tmp_path / "caption.json"
    entry = {"start": [0.0] * 50, "end": [1.0] * 50, "text": ["so we stir it"] * 50}
    path.write_text(json.dumps({f"v{i:05d}": entry for i in range(400)}))
    longest = 0

    class Watched(json.JSONDecoder):
        def raw_decode(self, text, place=0):
            nonlocal longest
            longest = max(longest, len(text))
            return super().raw_decode(text, place)

    monkeypatch.setattr(captions.json, "JSONDecoder", Watched)
    assert sum(1 for _ in stream_entries(path, chunk_bytes=4096)) == 400
    assert longest < 20_000 < path.stat().st_size / 20


def test_text_of_a_whole_file():
    assert read_sidecar("a.txt", b"a dog\nbarks\n", "a") == [Caption(0.0, math.inf, "a dog barks")]
    assert read_sidecar("a.txt", b" \n", "a") == []
    assert decode_text(b"", "a") == ""


def test_which_files_beside_media_are_theirs():
    files = Sidecars(
        ["show.s01e02.srt", "a.txt", "a.en.vtt", "a.srt", "b/c.txt", "x.y.TXT", "a.mp3"]
    )
    assert files.of("show.s01e02.mp4") == (("show.s01e02.srt",),)
    assert files.of("show.s01e01.mp4") == ()  # of the same key, and another one's
    assert files.of("a.mp4") == (("a.srt", "a.en.vtt", "a.txt"),)
    assert files.of("a.left.mp4") == (("a.srt", "a.txt"),)
    assert files.of("b/c.mp4") == (("b/c.txt",),) and files.of("c.mp4") == ()
    assert files.of("x.y.mp4") == (("x.y.TXT",),)


def test_two_files_of_one_name_in_a_folder_of_captions(tmp_path):
    """The one that counts is the one that would count beside the media."""
    (tmp_path / "a.txt").write_text("of the whole file")
    (tmp_path / "a.json").write_text('{"n": 1}')
    (tmp_path / "b.txt").write_text("not")
    (tmp_path / "b.srt").write_text(SRT)
    found = dict(read_captions(tmp_path))
    assert [one.text for one in found["a"]] == ["of the whole file"]
    assert plain(found["b"]) == plain(from_srt(SRT, "b.srt"))
