"""Labels: the files people own give the same examples, classes and splits; mistakes are named."""

import json
import math
import pickle
import random
import wave

import pytest
import torch

from vatt_fast.data.annotations import AnnotatedClip, read_annotations
from vatt_fast.data.labels import evaluation_split, open_labels


def touch(folder, *names):
    """Empty media files: labels are read without opening them."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def told(data):
    """{path: (classes, split)} and segments where there are any."""
    found = {}
    for example in data.examples:
        key = example.path
        if example.segment != (0.0, math.inf):
            key = (key, *example.segment)
        found[key] = (example.classes, example.split)
    return found


def test_a_folder_for_each_class(tmp_path):
    touch(tmp_path, "dog/a.mp4", "dog/deep/b.mp4", "cat/c.webm", "cat/notes.txt", ".git/d.mp4")
    data = open_labels(tmp_path)
    assert data.classes == ("cat", "dog")
    assert told(data) == {
        "cat/c.webm": (("cat",), "train"),
        "dog/a.mp4": (("dog",), "train"),
        "dog/deep/b.mp4": (("dog",), "train"),
    }


def test_a_class_without_media_is_named(tmp_path):
    """Not a folder of something else, as of a run."""
    touch(tmp_path, "dog/a.mp4", "bird/b.wmv", "runs/1/metrics.jsonl").joinpath("emu/x").mkdir(
        parents=True
    )
    data = open_labels(tmp_path)
    assert data.classes == ("bird", "dog", "emu")
    with pytest.raises(ValueError, match="bird, emu are without a training example"):
        data.check_training()
    split = touch(tmp_path / "split", "train/dog/a.mp4", "test/dog/b.mp4")
    for name in ("test/emu", "other/owl"):
        (split / name).mkdir(parents=True)
    assert open_labels(split).classes == ("dog", "emu")


def test_image_folder_with_splits(tmp_path):
    touch(tmp_path, "train/n01/1.jpg", "train/n02/2.jpg", "val/n01/3.jpg", "validation/n02/4.jpg")
    data = open_labels(tmp_path)
    assert data.splits == {"train": 2, "val": 2} and evaluation_split(data) == "val"
    source = data.source("val", "video")
    assert [source.name(i) for i in range(len(source))] == ["val/n01/3.jpg", "validation/n02/4.jpg"]
    targets = source.targets(["validation/n02/4.jpg", "val/n01/3.jpg"])
    assert torch.equal(targets, torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    assert source.has == (True, False, False)
    again = pickle.loads(pickle.dumps(source))
    assert again.classes_of("val/n01/3.jpg") == (0,) and again.place(1) == source.place(1)


def test_labels_csv_has_several_classes_and_segments(tmp_path):
    touch(tmp_path, "a.wav", "b.wav")
    write(
        tmp_path / "labels.csv",
        "file,class,split,start,end\na.wav,dog;bell,train,0,2\na.wav,cat,train,2,4\n"
        "a.wav,rain,train,2,4\nb.wav,dog,test,,\n",
    )
    for given in (tmp_path, tmp_path / "labels.csv"):
        data = open_labels(given)
        assert told(data) == {
            ("a.wav", 0, 2): (("dog", "bell"), "train"),
            ("a.wav", 2, 4): (("cat", "rain"), "train"),
            "b.wav": (("dog",), "test"),
        }
        assert data.has_several
        source = data.source("train", "audio")
        assert source.segment(1) == (2, 4) and source.name(1) == "a.wav@2-4"
        assert source.counts().tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(
    "content",
    [
        {"a.wav": "dog", "b.wav": ["cat", "dog"]},
        {"a.wav": {"class": "dog"}, "b.wav": {"labels": ["cat", "dog"], "split": "train"}},
        [{"file": "a.wav", "label": "dog"}, {"path": "b", "classes": ["cat", "dog"]}],
    ],
)
def test_labels_json(tmp_path, content):
    touch(tmp_path, "a.wav", "b.wav")
    write(tmp_path / "labels.json", json.dumps(content))
    expected = {"a.wav": (("dog",), "train"), "b.wav": (("cat", "dog"), "train")}
    assert told(open_labels(tmp_path)) == expected


def test_kinetics(tmp_path):
    header = "label,youtube_id,time_start,time_end,split,is_cc\n"
    row = "abseiling,-3B32lodo2M,59,69,train,0\n"
    write(tmp_path / "lists" / "train.csv", header + row)
    write(tmp_path / "lists" / "validate.csv", header + "air drumming,0ABC,1,11,validate,0\n")
    media = touch(
        tmp_path / "videos",
        "train/abseiling/-3B32lodo2M_000059_000069.mp4",
        "val/air drumming/0ABC_000001_000011.mp4",
    )
    data = open_labels(tmp_path / "lists", media=media)
    assert told(data) == {
        "train/abseiling/-3B32lodo2M_000059_000069.mp4": (("abseiling",), "train"),
        "val/air drumming/0ABC_000001_000011.mp4": (("air drumming",), "val"),
    }
    with pytest.raises(ValueError, match="air drumming is without a training example"):
        data.check_training()


def test_kinetics_as_json(tmp_path):
    about = {"annotations": {"label": "abseiling", "segment": [59.0, 69.0]}, "subset": "train"}
    held = {"annotations": {"label": "air drumming", "segment": [1.0, 11.0]}, "subset": "validate"}
    write(tmp_path / "k.json", json.dumps({"-3B32lodo2M": about, "0ABC": held}))
    touch(tmp_path, "abseiling/-3B32lodo2M_000059_000069.mp4", "-x/0ABC_000001_000011.mp4")
    assert told(open_labels(tmp_path / "k.json")) == {
        "abseiling/-3B32lodo2M_000059_000069.mp4": (("abseiling",), "train"),
        "-x/0ABC_000001_000011.mp4": (("air drumming",), "val"),
    }


def test_a_folder_of_kinetics_may_have_either_kind_or_both(tmp_path):
    for name, split in (("abc", "train"), ("xyz", "validate")):
        about = {"annotations": {"label": "dog", "segment": [59, 69]}, "subset": split}
        write(tmp_path / f"{split}.json", json.dumps({name: about}))
    touch(tmp_path, "abc_000059_000069.mp4", "xyz_000059_000069.mp4")
    expected = {
        "abc_000059_000069.mp4": (("dog",), "train"),
        "xyz_000059_000069.mp4": (("dog",), "val"),
    }
    assert told(open_labels(tmp_path)) == expected
    write(tmp_path / "train.csv", "youtube_id,label,time_start,time_end\nabc,cat,59,69\n")
    assert open_labels(tmp_path).classes == ("cat",)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", "is no JSON"),
        ("3", "is a JSON int; write"),
        ('{"a.wav": 3}', "'a.wav' is 3; write a class"),
        ('[{"class": "dog"}]', "entry 1 has no file"),
        ('[{"file": "a.wav"}]', "entry 1 has the class None"),
        ('{"a.wav": []}', r"'a.wav' has the class \[\]"),
        ('{"a.wav": {"class": "dog", "split": ""}}', "'a.wav' has no split"),
    ],
)
def test_json_that_is_none_of_labels(tmp_path, content, match):
    touch(tmp_path, "a.wav")
    write(tmp_path / "labels.json", content)
    with pytest.raises(ValueError, match=match):
        open_labels(tmp_path)


def wav(path, seconds):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(8000)
        file.writeframes(b"\0\0" * 8000 * seconds)


@pytest.mark.parametrize(("seconds", "segment"), [(3, (0, math.inf)), (9, (2, 5))])
def test_files_by_id_are_whole_videos_or_their_segments_cut_out(tmp_path, seconds, segment):
    """The same name is used for both; the length of one file tells."""
    write(tmp_path / "train.csv", "youtube_id,label,time_start,time_end\nabc,dog,2,5\n")
    wav(tmp_path / "abc.wav", seconds)
    (example,) = open_labels(tmp_path).examples
    assert example.segment == segment


@pytest.mark.parametrize("cut", [False, True])
def test_the_latest_segment_of_several_files_tells(tmp_path, cut):
    """Not one that is hardly longer than its segment, nor one that cannot be read."""
    segments = {"a": (1, 4), "b": (20, 23), "broken": (30, 33), "begun": (0, 3)}
    rows = [f"{name},dog,{start},{end}" for name, (start, end) in segments.items()]
    header = "youtube_id,label,time_start,time_end"
    write(tmp_path / "train.csv", "\n".join([header, *rows]))
    for name, (_, end) in segments.items():
        wav(tmp_path / f"{name}.wav", 3 if cut else end)
    (tmp_path / "broken.wav").write_bytes(b"no sound")
    found = {example.path: example.segment for example in open_labels(tmp_path).examples}
    whole = {f"{name}.wav": segment for name, segment in segments.items()}
    assert found == (dict.fromkeys(whole, (0, math.inf)) if cut else whole)


def test_moments(tmp_path):
    write(tmp_path / "trainingSet.csv", "adult/a.mp4,adult,3,1\nbaking/b.mp4,baking,2,0\n")
    write(tmp_path / "validationSet.csv", "adult/c.mp4,adult,2,0\n")
    write(tmp_path / "moments_categories.txt", "baking,0\nadult,1\n")
    touch(tmp_path, "training/adult/a.mp4", "training/baking/b.mp4", "validation/adult/c.mp4")
    data = open_labels(tmp_path)
    assert data.classes == ("baking", "adult")
    assert told(data) == {
        "training/adult/a.mp4": (("adult",), "train"),
        "training/baking/b.mp4": (("baking",), "train"),
        "validation/adult/c.mp4": (("adult",), "val"),
    }


def test_ucf101_and_hmdb51(tmp_path):
    lists = tmp_path / "ucf"
    for fold, (train, test) in {1: ("g08", "g01"), 2: ("g01", "g08")}.items():
        write(lists / f"trainlist0{fold}.txt", f"Archery/v_Archery_{train}.avi 1\n")
        write(lists / f"testlist0{fold}.txt", f"Archery/v_Archery_{test}.avi\n")
    write(lists / "classInd.txt", "1 Archery\n")
    media = touch(tmp_path / "UCF-101", "Archery/v_Archery_g01.avi", "Archery/v_Archery_g08.avi")
    for fold, test in ((1, "g01"), (2, "g08")):
        data = open_labels(lists, media=media, fold=fold)
        held = [example.path for example in data.examples if example.split == "test"]
        assert held == [f"Archery/v_Archery_{test}.avi"] and data.classes == ("Archery",)
    coded = touch(tmp_path / "coded", "Archery/v_Archery_g01.mp4", "Archery/v_Archery_g08.webm")
    held = [e.path for e in open_labels(lists, media=coded).examples if e.split == "test"]
    assert held == ["Archery/v_Archery_g01.mp4"]
    hmdb = tmp_path / "hmdb"
    write(hmdb / "brush_hair_test_split1.txt", "a.avi 1 \nb.avi 2 \nc.avi 0 \n")
    media = touch(tmp_path / "HMDB", "brush_hair/a.avi", "brush_hair/b.avi", "brush_hair/c.avi")
    assert told(open_labels(hmdb, media=media)) == {
        "brush_hair/a.avi": (("brush_hair",), "train"),
        "brush_hair/b.avi": (("brush_hair",), "test"),
    }
    with pytest.raises(ValueError, match="fold is 4"):
        open_labels(hmdb, media=media, fold=4)


def test_esc50(tmp_path):
    write(
        tmp_path / "meta" / "esc50.csv",
        "filename,fold,target,category,esc10,src_file,take\n"
        "1-1-A-0.wav,1,0,dog,True,1,A\n2-1-A-14.wav,2,14,rain,False,2,A\n",
    )
    touch(tmp_path, "audio/1-1-A-0.wav", "audio/2-1-A-14.wav")
    for given in (tmp_path, tmp_path / "meta" / "esc50.csv"):
        data = open_labels(given, fold=2)
        assert told(data) == {
            "audio/1-1-A-0.wav": (("dog",), "train"),
            "audio/2-1-A-14.wav": (("rain",), "test"),
        }


def test_audioset(tmp_path):
    write(
        tmp_path / "eval_segments.csv",
        "# Segments csv created Sun Mar  5 10:54:25 2017\n# num_ytids=2, num_segs=2\n"
        '# YTID, start_seconds, end_seconds, positive_labels\n--4gqARaEJE, 0.000, 10.000, "/m/1,'
        '/m/2"\n--BfvyPmVMo, 20.000, 30.000, "/m/2"\n',
    )
    write(
        tmp_path / "class_labels_indices.csv",
        'index,mid,display_name\n0,/m/2,"Speech, male"\n1,/m/1,Dog\n',
    )
    touch(tmp_path, "wavs/Y--4gqARaEJE.wav", "wavs/--BfvyPmVMo_20000_30000.flac")
    data = open_labels(tmp_path / "eval_segments.csv")
    assert data.classes == ("Speech, male", "Dog")
    assert told(data) == {
        "wavs/Y--4gqARaEJE.wav": (("Dog", "Speech, male"), "test"),
        "wavs/--BfvyPmVMo_20000_30000.flac": (("Speech, male",), "test"),
    }


def test_names_that_several_folders_have_are_told_by_their_folders(tmp_path):
    touch(tmp_path, "media/train/dog/1.jpg", "media/train/cat/1.jpg", "media/cat2/1.jpg")
    absolute = tmp_path / "media" / "cat2" / "1.jpg"
    text = f"file,class\ndog/1.jpg,dog\n./train/cat/1,cat\n{absolute},cat2\n"
    labels = write(tmp_path / "labels.csv", text)
    assert told(open_labels(labels, media=tmp_path / "media")) == {
        "train/dog/1.jpg": (("dog",), "train"),
        "train/cat/1.jpg": (("cat",), "train"),
        "cat2/1.jpg": (("cat2",), "train"),
    }


def test_mistakes_are_named_in_one_line(tmp_path):
    touch(tmp_path, "a.wav", "x/b.wav", "y/b.wav")
    labels = tmp_path / "labels.csv"

    def refused(text, match, classes=None):
        write(labels, text)
        if classes is not None:
            write(tmp_path / "classes.txt", classes)
        with pytest.raises(ValueError, match=match) as error:
            open_labels(tmp_path)
        assert "\n" not in str(error.value)

    refused("file,class\n", "has no rows")
    refused("a,b\n1,2\n", r"has the columns a, b; it needs file and class")
    refused("file,class\na.wav\n", "line 2 has 1 values under 2 columns")
    refused("file,class\na.wav,\n", "line 2 has no class")
    refused("file,class\nlost.wav,dog\na.wav,dog\n", r"lost.wav \(.*line 2\) is not there below")
    refused("file,class\nb.wav,dog\n", r"line 2 names b.wav, and there are x/b.wav and y/b.wav")
    refused("file,class,start,end\na.wav,dog,4,2\n", "line 2 has a segment from 4 to 2 s")
    refused("file,class,start,end\na.wav,dog,now,2\n", "line 2: 'now' is no time")
    refused("file,class,split\na.wav,dog,train\na.wav,cat,test\n", "an example has one split")
    refused(
        "file,class\na.wav,dgo\n",
        r"line 2 has the class 'dgo', which is none of .*classes.txt's 2 classes; is it 'dog'\?",
        classes="dog\ncat\n",
    )
    refused("file,class\na.wav,dog\n", "classes.txt names 'dog' twice", classes="dog\ndog\n")
    with pytest.raises(ValueError, match="is not there; name a folder"):
        open_labels(tmp_path / "nowhere")


def test_folders_that_are_none_of_classes(tmp_path):
    with pytest.raises(ValueError, match="has no media and no file of labels"):
        open_labels(tmp_path)
    touch(tmp_path, "dog/a.mp4", "b.mp4")
    with pytest.raises(ValueError, match=r"b.mp4 lies in no class's folder"):
        open_labels(tmp_path)
    touch(tmp_path, "train/dog/a.mp4").joinpath("b.mp4").unlink()
    with pytest.raises(ValueError, match="has train, a split, beside dog"):
        open_labels(tmp_path)


def test_missing_files_can_be_left_out(tmp_path):
    touch(tmp_path, "a.wav")
    write(tmp_path / "labels.csv", "file,class\nlost.wav,dog\na.wav,dog\n")
    data = open_labels(tmp_path, skip_missing=True)
    assert [example.path for example in data.examples] == ["a.wav"]
    assert data.missing[0].startswith("lost.wav")


def test_a_share_of_each_class_is_held_out(tmp_path):
    names = [f"{name}/{i}.wav" for name in ("cat", "dog") for i in range(10)] + ["rare/0.wav"]
    data = open_labels(touch(tmp_path, *names)).held_out(0.3)
    source = data.source("test", "audio")
    assert source.counts().tolist() == [3, 3, 0]
    data.check_training()
    assert data.held_out(0.9) == data  # which has splits by now
    touch(tmp_path, "bird/0.wav", "bird/1.wav")
    others = open_labels(tmp_path).held_out(0.3)
    held = {e.path for e in others.examples if e.split == "test" and not e.path.startswith("bird")}
    assert held == {e.path for e in data.examples if e.split == "test"}
    with pytest.raises(ValueError, match="hold_out is 1"):
        data.held_out(1)


def test_a_share_of_all_is_held_out_where_they_have_several_classes(tmp_path):
    """As many as asked for; of no class all."""
    rng = random.Random(0)
    names = [f"c{i}" for i in range(20)]
    classes = {f"{i}.wav": sorted(rng.sample(names, 3)) for i in range(300)}
    classes |= {"300.wav": ["c0", "rare"]}
    write(tmp_path / "labels.json", json.dumps(classes))
    data = open_labels(touch(tmp_path, *classes)).held_out(0.2)
    assert data.splits == {"test": 60, "train": 241}
    data.check_training()
    few = open_labels(tmp_path).held_out(0.999)
    few.check_training()
    assert few.splits["train"] < 20


def test_marks_are_of_what_is_in_a_file(tmp_path):
    """Silence in the middle does not make two sounds one."""
    for name, around in (("a", b"\1"), ("b", b"\2")):
        for folder in ("dog", "cat"):
            (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / "dog" / f"{name}.wav").write_bytes(around * 9 + bytes(20_000) + b"\3")
        (tmp_path / "cat" / f"{name}.wav").write_bytes(b"\4" + bytes(20_000) + around * 9)
    data = open_labels(tmp_path)
    marks = data.marks("train")
    assert len(marks) == 4 and len(data.trained_on("train", marks)) == 4
    (tmp_path / "dog" / "a.wav").rename(tmp_path / "dog" / "moved.wav")
    moved = open_labels(tmp_path)
    assert moved.marks("train") == marks
    (tmp_path / "dog" / "moved.wav").unlink()
    assert len(moved.marks("train")) == 3
    kept = moved.without(moved.trained_on("train", marks))
    assert [example.path for example in kept.examples] == ["dog/moved.wav"]


def test_a_models_classes_are_checked(tmp_path):
    data = open_labels(touch(tmp_path, "dog/a.wav", "cat/b.wav"))
    assert data.source("train", "audio", ["dog", "cat"]).targets(["dog/a.wav"]).tolist() == [[1, 0]]
    with pytest.raises(ValueError, match="class 'cat', which is none of the model's 2 classes"):
        data.source("train", "audio", ["dog", "bat"])
    with pytest.raises(ValueError, match=r"no examples of split 'val'; it has train \(2\)"):
        data.source("val", "audio")


def test_annotations_of_retrieval(tmp_path):
    content = {
        "videos": [{"video_id": "video0", "split": "train"}, {"video_id": "v1", "split": "test"}],
        "sentences": [
            {"video_id": "v1", "caption": "a man sings", "sen_id": 1},
            {"video_id": "video0", "caption": " a car ", "sen_id": 0},
            {"video_id": "v1", "caption": "a song", "sen_id": 2},
        ],
    }
    path = write(tmp_path / "videodatainfo.json", json.dumps(content))
    assert read_annotations(path) == [
        AnnotatedClip("video0", ("a car",), "train"),
        AnnotatedClip("v1", ("a man sings", "a song"), "test"),
    ]
    path = write(tmp_path / "jsfusion.csv", "key,vid_key,video_id,sentence\nr0,m,v9,a cat\n")
    assert read_annotations(path) == [AnnotatedClip("v9", ("a cat",), "test")]
    steps = [{"segment": [90, 102], "id": 0, "sentence": "spread margarine"}]
    database = {"GLd3aX16zBg": {"subset": "training", "annotations": steps}}
    path = write(tmp_path / "youcookii.json", json.dumps({"database": database}))
    clip = AnnotatedClip("GLd3aX16zBg", ("spread margarine",), "train", (90, 102))
    assert read_annotations(path) == [clip]
    steps[0]["segment"] = [102, 90]
    write(path, json.dumps({"database": database}))
    with pytest.raises(ValueError, match="GLd3aX16zBg has a segment from 102 to 90 s"):
        read_annotations(path)
    content["sentences"].append({"video_id": "v7", "caption": "who"})
    write(path, json.dumps(content))
    with pytest.raises(ValueError, match="sentences of v7, which is none of its videos"):
        read_annotations(path)
    with pytest.raises(ValueError, match="neither MSR-VTT's annotation"):
        read_annotations(write(path, "{}"))
