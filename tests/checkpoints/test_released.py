"""Released checkpoints become our models: sizes from shapes, every key in one place, outputs."""

import dataclasses
import functools
import json
import os
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import (
    CONFIGS,
    EMBEDDINGS,
    TOWERS,
    amplified_noise,
    array,
    assert_agrees,
    our_tensors,
    recording,
)
from released_keys import (
    ROOT,
    VALUE,
    arrays,
    fine_tuned_keys,
    random_model,
    released_keys,
    with_bookkeeping,
)
from tf_bundle_writer import write_bundle

from vatt_fast import VATT, TowerConfig, VATTConfig, create_model, preset
from vatt_fast.checkpoints.convert import convert
from vatt_fast.checkpoints.layouts import layout_of
from vatt_fast.checkpoints.released import read_released
from vatt_fast.checkpoints.words import read_word_list
from vatt_fast.classifier import Classifier, ClassifierConfig
from vatt_fast.cli import main
from vatt_fast.config import BASE, LARGE, MEDIUM
from vatt_fast.data.text import Vocabulary

PARTS = {
    "z_video_va": "v_toaud",
    "z_audio_va": "a_tovid",
    "z_video_vt": "v_totxt",
    "z_text_vt": "t_tovid",
}


# -- recorded checkpoints --------------------------------------------------------------------------


def recorded(name: str) -> tuple[Path, dict[str, int]]:
    """The recorded checkpoint beside the recording, and the size of its heads by tower."""
    folder = Path(
        os.environ.get("VATT_ORACLE") or Path(__file__).parents[1] / "support" / "x"
    ).parent
    prefix = folder / f"tiny_ckpt_{name}" / "ckpt-1"
    if not Path(f"{prefix}.index").is_file():
        pytest.skip(f"no checkpoint {name} beside the recording")
    sizes = json.loads(str(recording()["config_json"]))
    towers = {"video": "V", "audio": "A"} if name == "tx_fac" else {"video": "U", "audio": "U"}
    return prefix, {modality: sizes[key]["d_kv"] for modality, key in towers.items()}


def inputs(name: str) -> dict:
    video, audio = array(f"{name}/in_video"), array(f"{name}/in_audio").squeeze(-1)
    text = array(f"{name}/in_text").unflatten(0, (video.shape[0], -1))
    return dict(video=video, audio=audio, text=text)


@pytest.fixture(params=CONFIGS)
def converted(request, tmp_path):
    """Name, and the folder that convert wrote."""
    prefix, head_dim = recorded(request.param)
    convert(prefix, tmp_path / "out", head_dim=head_dim)
    return request.param, tmp_path / "out"


def test_sizes_are_those_of_the_recording(converted):
    name, folder = converted
    of_recording = CONFIGS[name]()
    config = create_model(folder).config
    assert config.dropout == 0.1 and config.texts_per_clip == 5
    assert dataclasses.replace(config, dropout=0.0, texts_per_clip=1) == dataclasses.replace(
        of_recording, batch_norm_momentum=config.batch_norm_momentum
    )


def test_weights_are_those_of_the_recording(converted):
    """The statistics are those after the recorded call."""
    name, folder = converted
    ours, weights = create_model(folder).state_dict(), our_tensors(f"{name}/w")
    for key, value in weights.items():
        assert torch.equal(ours[key], value) == (".running_" not in key), key
    model = VATT(CONFIGS[name]()).eval()
    model.load_state_dict(weights, strict=False)
    model.common_space.train()
    model(**inputs(name))
    for key, value in model.state_dict().items():
        if ".running_" in key:
            torch.testing.assert_close(ours[key], value, rtol=EMBEDDINGS, atol=1e-6, msg=key)


def test_outputs_end_to_end(converted):
    name, folder = converted
    model = create_model(folder)
    assert not model.training
    model.common_space.train()  # the recording's heads use the batch's statistics
    out = model(**inputs(name))
    for modality in ("video", "audio", "text"):
        assert_agrees(getattr(out, f"{modality}_pooled"), f"{name}/pooled_{modality}", TOWERS)
    for ours, theirs in PARTS.items():
        noise = amplified_noise(model, out, ours)
        assert_agrees(getattr(out, ours), f"head/{name}/{theirs}", EMBEDDINGS + noise)


def test_outputs_end_to_end_in_jax(converted):
    jax = pytest.importorskip("jax")
    from vatt_fast.on_jax import model as jax_model
    from vatt_fast.on_jax import weights

    name, folder = converted
    config, params, statistics = weights.load(folder)
    given = {key: value.numpy() for key, value in inputs(name).items()}
    # without a key there is no dropout
    forward = functools.partial(jax_model.forward, config=config, training=True)
    found, _ = jax.jit(lambda *a: forward(*a[:2], **a[2]))(params, statistics, given)
    model = create_model(folder)
    model.common_space.train()
    in_torch = model(**inputs(name))
    for modality in ("video", "audio", "text"):
        pooled = torch.from_numpy(np.array(getattr(found, f"{modality}_pooled")))
        assert_agrees(pooled, f"{name}/pooled_{modality}", TOWERS)
    for ours, theirs in PARTS.items():
        z = torch.from_numpy(np.array(getattr(found, ours)))
        noise = amplified_noise(model, in_torch, ours)
        assert_agrees(z, f"head/{name}/{theirs}", EMBEDDINGS + noise)


def test_create_model_converts_in_memory(converted):
    name, folder = converted
    prefix, head_dim = recorded(name)
    model, saved = create_model(prefix, head_dim=head_dim), create_model(folder)
    assert model.config == saved.config and not model.training
    for key, value in saved.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    for key, value in saved.named_parameters():
        assert value.requires_grad == model.get_parameter(key).requires_grad, key


# -- sizes -----------------------------------------------------------------------------------------


def shapes_of(config: VATTConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        tensors = released_keys(config, VATT(config).state_dict())
    return {key.removesuffix(VALUE): tuple(value.shape) for key, value in tensors.items()}


@pytest.mark.parametrize("name", ["bbs", "mbs", "lbs", "ma", "xbs"])
def test_the_published_sizes_are_found_from_their_shapes(name):
    """And the released configs' largest tower, of which no file is published."""
    config = preset("bbs" if name == "xbs" else name, "released")
    if name == "xbs":
        config = dataclasses.replace(config, video=XLARGE)
    layout = layout_of(shapes_of(config))
    assert layout.config == config and not layout.notes
    assert {w.key: w.shape for w in layout.weights} == shapes_of(config)
    with torch.device("meta"):
        ours = VATT(config).state_dict()
    assert {w.name for w in layout.weights} == set(ours) - {"log_scale"}


@pytest.mark.parametrize(
    ("name", "without", "millions"),
    [("bbs", (), 213.5), ("mbs", (), 280.6), ("lbs", (), 431.7), ("ma", ("common_space",), 180.94)],
)
def test_the_published_layouts_have_the_released_number_of_parameters(name, without, millions):
    """As counted on the released layers at full size; of ma the trunk and the words' table."""
    layout = layout_of(shapes_of(preset(name, "released")))
    left = ("running_mean", "running_var")
    counted = [w for w in layout.weights if not w.name.endswith(left)]
    counted = [w for w in counted if w.name.partition(".")[0] not in without]
    assert abs(sum(np.prod(w.shape) for w in counted) / 1e6 - millions) < 0.05


XLARGE = TowerConfig(depth=24, dim=1536, mlp_dim=4096, num_heads=24)
TOWER = TowerConfig(depth=2, dim=24, mlp_dim=40, num_heads=3, head_dim=8)
VARIANTS = {
    "deeper": dict(
        video=dataclasses.replace(TOWER, depth=5), audio=dataclasses.replace(TOWER, depth=1)
    ),
    "twelve_layers": dict(text=TowerConfig(12, 16, 20, 2, 8)),
    "wider_heads_than_dim": dict(
        video=dataclasses.replace(TOWER, num_heads=7), text=TowerConfig(1, 16, 16, 5, 8)
    ),
    "other_patches": dict(
        video_patch=(2, 8, 4), frames=6, height=24, width=12, audio_patch=10, samples=70
    ),
    "paper_words": dict(word_dim=None, vocab_size=31, relative_buckets=16),
    "wide_spaces": dict(d_va=30, d_vt=44),
    "agnostic": dict(kind="modality_agnostic", text=TOWER, words=9),
    "agnostic_post_proj": dict(
        kind="modality_agnostic", text=TOWER, words=5, post_proj_dim=10, vocab_size=64
    ),
}


def variant(name: str) -> VATTConfig:
    small = dict(
        video=TOWER,
        audio=TOWER,
        text=TowerConfig(2, 16, 20, 2, 8),
        frames=4,
        height=8,
        width=12,
        video_patch=(2, 4, 4),
        samples=64,
        audio_patch=8,
        vocab_size=20,
        word_dim=6,
        d_va=10,
        d_vt=6,
    )
    return dataclasses.replace(VATTConfig().with_recipe("released"), **small | VARIANTS[name])


@pytest.mark.parametrize("name", VARIANTS)
def test_other_sizes_come_back(tmp_path, name):
    model = random_model(variant(name))
    tensors = with_bookkeeping(released_keys(model.config, model.state_dict()))
    options = {"shards": 3, "reverse": True, "block_entries": 11}
    write_bundle(tmp_path / "ckpt-7", arrays(tensors), **options)
    found = read_released(tmp_path / "ckpt-7", head_dim=8)
    assert found.config == model.config and not found.mismatch
    assert found.left_out["step counters"] == 1 and found.left_out["optimizer slots"] > 100
    ours = model.state_dict()
    assert found.tensors.keys() == ours.keys()
    for key, value in ours.items():
        torch.testing.assert_close(found.tensors[key], value, rtol=0, atol=0, msg=key)


@pytest.fixture
def small(tmp_path):
    """A function that writes a small checkpoint with changes, and the model in it."""
    model = random_model(variant("wide_spaces"))

    def write(change=lambda tensors: None, **options) -> Path:
        tensors = with_bookkeeping(released_keys(model.config, model.state_dict()))
        change(tensors)
        write_bundle(tmp_path / "ckpt-7", arrays(tensors), **options)
        return tmp_path / "ckpt-7"

    return write, model


KERNEL = f"{ROOT}_base_layer/vid_backbone/_base/tx/layers/1/mha/q/kernel{VALUE}"
TABLE = f"{ROOT}_base_layer/txt_backbone/embedding/embeddings{VALUE}"


def test_heads_are_told_or_asked_for(small):
    write, model = small
    prefix = write()
    found = read_released(prefix)  # as the text tower's, and it says so
    assert found.config == model.config
    with pytest.warns(UserWarning, match="3 heads of 8, as in the text tower"):
        create_model(prefix)
    assert [note for note in found.notes if "3 heads of 8, as in the text tower" in note]
    wide = read_released(prefix, head_dim={"video": 24}).config
    assert (wide.video.num_heads, wide.audio.num_heads) == (1, 3)
    for head_dim, words in ((5, "no multiple of 5; give .*--head-dim N"), ({"text": 8}, "text")):
        with pytest.raises(ValueError, match=words):
            read_released(prefix, head_dim=head_dim)


def test_heads_that_nothing_tells_are_asked_for(small, tmp_path):
    """A model without a text tower of its own, and one whose heads are no part of the others."""
    model = random_model(variant("agnostic"))
    tensors = released_keys(model.config, model.state_dict())
    write_bundle(tmp_path / "ckpt", arrays(tensors))
    with pytest.raises(
        ValueError, match=r"cannot be told, q is 24 wide.*convert --head-dim N, .*head_dim=N"
    ):
        create_model(tmp_path / "ckpt")
    assert create_model(tmp_path / "ckpt", head_dim=8).config == model.config
    text = TowerConfig(depth=2, dim=16, mlp_dim=20, num_heads=2, head_dim=9)
    shapes = shapes_of(dataclasses.replace(variant("wide_spaces"), text=text))
    with pytest.raises(ValueError, match=r"q is 24 wide, no multiple of 9; give"):
        layout_of(shapes)
    assert layout_of(shapes, head_dim=8).config.video == TOWER


def test_published_widths_have_published_heads_at_any_depth():
    """It is said, because only whole towers are published."""
    trunk = TowerConfig(depth=3, dim=1024, mlp_dim=4096, num_heads=16)
    config = dataclasses.replace(preset("ma", "released"), video=trunk, audio=trunk, text=trunk)
    layout = layout_of(shapes_of(config))
    assert layout.config == config
    assert "16 heads of 64, as in published towers of this width" in layout.notes[0]
    assert "--head-dim" in layout.notes[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_recorded_checkpoints_ask_for_what_nothing_tells_only(name):
    """The words' tower proves 8 of tx_fac, and says that the others' are taken; ut_fac has none."""
    prefix, head_dim = recorded(name)
    if name == "tx_fac":
        with pytest.warns(UserWarning, match="heads of 8, as in the text tower.*--head-dim"):
            found = create_model(prefix)
        assert found.config == create_model(prefix, head_dim=head_dim).config
    else:
        with pytest.raises(
            ValueError, match=r"q is 32 wide.*give the size of a head: convert --head-dim N"
        ):
            create_model(prefix)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_become_fp32(small, dtype):
    write, model = small

    def cast(tensors):
        for key, value in tensors.items():
            if key.endswith(VALUE):
                value = value.to(dtype)
                tensors[key] = value
                if dtype == torch.bfloat16:
                    raw = value.view(torch.int16).numpy().tobytes()
                    tensors[key] = ("bfloat16", tuple(value.shape), raw)

    found = read_released(write(cast), head_dim=8)
    for key, value in model.state_dict().items():
        if key != "log_scale":
            assert found.tensors[key].dtype == torch.float32
            assert torch.equal(found.tensors[key], value.to(dtype).float()), key


@pytest.mark.parametrize("name", ["wide_spaces", "agnostic_post_proj", "paper_words"])
def test_any_shape_is_understood_or_refused(name):
    """One shape of another rank or size, or gone: no other error, and never unnoticed."""
    of_model, draw, refused = shapes_of(variant(name)), random.Random(name), 0
    for _ in range(400):
        shapes, key = dict(of_model), draw.choice(list(of_model))
        shape = list(shapes.pop(key))
        if place := draw.randrange(3):
            shape[draw.randrange(len(shape))] = draw.choice([0, 1, 2, 3, 5, 17, 100, 2**40])
            shapes[key] = tuple(shape if place == 1 else shape[draw.randrange(2) :])
        try:
            layout = layout_of(shapes, head_dim=8)
        except ValueError:
            refused += 1
            continue
        fits = {w.key: w.shape for w in layout.weights} == shapes
        assert not fits or shapes == of_model or layout.config != variant(name)
        if fits:
            with torch.device("meta"):
                VATT(layout.config)
        refused += not fits
    assert refused > 300


# -- what training keeps beside the weights --------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizers", "settings"),
    [
        ({"optimizer": "momentum"}, ("decay", "iter", "learning_rate", "momentum")),
        ({"opt": "m v"}, ("beta_1", "beta_2", "iter", "learning_rate")),
        ({"_optimizer": "m v vhat"}, ("beta_1", "learning_rate")),
        ({"base_optimizer": "rms"}, ("rho",)),
        ({"trainer/sgd": "momentum"}, ("iter",)),
        ({"ema": "average", "ema/_optimizer": "momentum"}, ("iter", "average_decay")),
    ],
    ids=lambda value: "-".join(value),
)
def test_optimizers_of_any_name_are_left_out(small, optimizers, settings):
    """Their slots tell where they lie; what else lies there is theirs, vectors included."""
    write, model = small

    def change(tensors):
        for key in [key for key in tensors if "optimizer" in key]:
            del tensors[key]
        tensors |= {
            key.replace(VALUE, f"/.OPTIMIZER_SLOT/{at}/{slot}{VALUE}"): value
            for key, value in tensors.items()
            for at, slots in optimizers.items()
            for slot in slots.split()
            if key.endswith(f"kernel{VALUE}")
        }
        at = next(iter(optimizers))
        tensors |= {f"{at}/{name}{VALUE}": torch.ones(()) for name in settings}
        tensors[f"{at}/per_layer_rate{VALUE}"] = torch.ones(3)

    found = read_released(write(change), head_dim=8)
    assert found.left_out["optimizer settings"] == len(settings) + 1
    assert found.left_out["optimizer slots"] > 40 and not found.mismatch
    for key, value in model.state_dict().items():
        assert torch.equal(found.tensors[key], value), key


def test_slots_under_the_optimizers_own_name_are_left_out(small):
    """Keras 2.11 and later keep them there; the rate and the step tell what it is."""
    write, _ = small

    def change(tensors):
        for key in [key for key in tensors if "optimizer" in key]:
            del tensors[key]
        tensors |= {f"opt/_variables/{i}{VALUE}": torch.ones(24, 24) for i in range(9)}
        tensors[f"opt/_learning_rate{VALUE}"] = torch.ones(())
        tensors[f"opt/_iterations{VALUE}"] = torch.tensor(5)

    assert read_released(write(change), head_dim=8).left_out["optimizer settings"] == 11


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("learning_rate", torch.ones(()), "scalars outside the model"),
        ("current_step", torch.tensor(7), "integers and texts"),
        ("epoch", torch.tensor(7), "step counters"),
        ("loss_scale/current_loss_scale", torch.ones(()), "scalars outside the model"),
        ("metrics/0/total", torch.ones(()), "metrics"),
        ("model/keras_api/metrics/1/true_positives", torch.ones(200), "metrics"),
        ("model/dropout_rng/_state_var", torch.tensor([1, 2, 3]), "integers and texts"),
        ("model/note", [b"text"], "integers and texts"),
    ],
)
def test_what_else_training_keeps_is_left_out_and_counted(small, key, value, kind):
    write, _ = small
    before = read_released(write(), head_dim=8).left_out.get(kind, 0)
    found = read_released(write(lambda t: t.update({f"{key}{VALUE}": value})), head_dim=8)
    assert found.left_out[kind] == before + 1 and not found.mismatch


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("extra/kernel", (3, 4)),
        ("ema/model/agg_embedding", (24,)),
        (f"{ROOT}_head_layer/temperature", ()),
        (f"{ROOT}_base_layer/vid_backbone/_base/mask_embedding", (24,)),
        ("model/learning_rate", ()),
    ],
)
def test_a_weight_without_a_place_is_named_wherever_it_lies(small, key, shape):
    """Also where a scalar beside the model has an optimizer's name."""
    write, _ = small
    extra = {f"{key}{VALUE}": torch.ones(shape)}
    if key == "model/learning_rate":
        key, extra = f"{ROOT}more", extra | {f"{ROOT}more{VALUE}": torch.ones(2)}
    with pytest.raises(ValueError, match=f"no place here: {key} "):
        read_released(write(lambda t: t.update(extra)), head_dim=8)


# -- what does not match ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(KERNEL), "missing: .*layers/1/mha/q/kernel"),
        (lambda t: t.update({f"{ROOT}more{VALUE}": torch.ones(2)}), "no place here: .*/more"),
        (lambda t: t.update({KERNEL: torch.ones(24, 16)}), r"has shape \(24, 16\), .* \(24, 24\)"),
        (lambda t: t.pop(TABLE), "missing: .*embedding/embeddings"),
        (
            lambda t: [t.pop(key) for key in list(t) if "aud_backbone" in key],
            "no .*aud_backbone.* which tells sizes",
        ),
        (
            lambda t: [t.pop(key) for key in list(t) if "vid_backbone/_base/tx/layers/0" in key],
            "no .*vid_backbone.* which tells sizes",
        ),
        (
            lambda t: t.update({KERNEL.replace("layers/1", "layers/9"): torch.ones(24, 24)}),
            r"layers of .* are 0, 1, 9; they must be numbered from 0",
        ),
        (lambda t: t.update({KERNEL: torch.full((24, 24), torch.nan)}), "not finite"),
        (lambda t: t.clear(), "holds no VATT that is known here: no weights at all"),
    ],
    ids=range(9),
)
def test_what_does_not_match_is_named(small, change, words):
    write, _ = small
    with pytest.raises(ValueError, match=words) as caught:
        read_released(write(change), head_dim=8)
    assert "\n" not in str(caught.value)


def test_a_refusal_lists_a_few_and_counts_the_rest(small):
    write, _ = small
    extra = {f"{ROOT}more/{i}{VALUE}": torch.ones(2) for i in range(8)}
    with pytest.raises(ValueError, match=r"more/4; and 3 more .*--partial"):
        read_released(write(lambda t: t.update(extra)), head_dim=8)


def test_partial_goes_on_and_lists_all(small, tmp_path):
    write, model = small

    def change(tensors):
        del tensors[KERNEL], tensors[TABLE]
        tensors[f"{ROOT}more{VALUE}"] = torch.ones(2)

    found = convert(write(change), tmp_path / "out", head_dim=8, partial=True)
    assert len(found["not matched"]) == 3
    ours = create_model(tmp_path / "out").state_dict()
    assert len(ours["text_tokens.table.weight"]) == 65536  # as published, where nothing tells
    differing = {
        key
        for key, value in model.state_dict().items()
        if value.shape != ours[key].shape or not torch.equal(value, ours[key])
    }
    assert differing == {"video_encoder.blocks.1.qkv.weight", "text_tokens.table.weight"}
    again = convert(write(change), tmp_path / "again", head_dim=8, partial=True)
    assert again == found
    random = create_model(tmp_path / "again").state_dict()
    assert all(torch.equal(value, random[key]) for key, value in ours.items())


def test_words_give_a_missing_table_its_size(small, tmp_path):
    write, _ = small
    (tmp_path / "words.txt").write_text("\n".join(WORDS[:9]))
    options = dict(words=tmp_path / "words.txt", head_dim=8)
    prefix = write(lambda t: t.pop(TABLE))
    with pytest.raises(ValueError, match=r"missing: .*embedding/embeddings"):
        read_released(prefix, **options)
    convert(prefix, tmp_path / "out", partial=True, **options)
    found = create_model(tmp_path / "out")
    assert len(found.vocabulary) == len(found.text_tokens.table.weight) == 9


def test_other_ways_to_the_common_spaces_are_found(small):
    write, model = small

    def change(tensors):
        for key in list(tensors):
            tensors[key.replace("_head_layer/_bridge_heads/0", "_head_layer/bridge")] = tensors.pop(
                key
            )

    found = read_released(write(change), head_dim=8)
    assert torch.equal(
        found.tensors["common_space.audio_va.weight"], model.common_space.audio_va.weight
    )


def test_other_names_of_the_classifier_are_found(tower, tmp_path):
    model, _, clips = tower
    tensors = fine_tuned_keys(model.config, model.state_dict())
    renamed = {key.replace("_ops/cls", "_ops/logits"): value for key, value in tensors.items()}
    write_bundle(tmp_path / "ckpt-9", arrays(renamed))
    found = Classifier.from_released(read_released(tmp_path / "ckpt-9", head_dim=8))
    assert torch.equal(found(clips), model(clips))
    beside = {
        key.replace(f"{ROOT}_ops/cls", "model/layer_with_weights-1"): value
        for key, value in tensors.items()
    }
    write_bundle(tmp_path / "ckpt-9", arrays(beside))
    found = Classifier.from_released(read_released(tmp_path / "ckpt-9", head_dim=8))
    assert torch.equal(found(clips), model(clips))
    write_bundle(tmp_path / "ckpt-9", arrays(renamed | tensors))
    with pytest.raises(ValueError, match=r"one classifier beside .*_ops/cls/kernel, .*_ops/logits"):
        read_released(tmp_path / "ckpt-9", head_dim=8)


def test_towers_without_a_model_here_are_refused(tmp_path):
    tensors = {f"{ROOT}_base/spectrum_to_patch/kernel{VALUE}": np.ones((16, 5, 1, 8), np.float32)}
    write_bundle(tmp_path / "ckpt", tensors)
    with pytest.raises(ValueError, match="spectrogram"):
        read_released(tmp_path / "ckpt")
    write_bundle(tmp_path / "ckpt", {"layer/kernel": np.ones(1, np.float32)})
    with pytest.raises(ValueError, match="holds no VATT that is known here: layer/kernel"):
        read_released(tmp_path / "ckpt")


def test_create_model_names_what_does_not_belong(small, tmp_path):
    write, _ = small
    prefix = write()
    with pytest.raises(ValueError, match="leave recipe out"):
        create_model(prefix, recipe="paper")
    for option in ({"head_dim": 8}, {"words": "words.txt"}):
        with pytest.raises(ValueError, match="no released checkpoint"):
            create_model("tiny", **option)
    with pytest.raises(ValueError, match=r"there is no .*ckpt-8\.index"):
        create_model(tmp_path / "ckpt-8")


# -- words -----------------------------------------------------------------------------------------


WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"word{i}" for i in range(16))]


@pytest.mark.filterwarnings("ignore:.*words for 20 rows")
@pytest.mark.parametrize(
    ("kind", "left_out"),
    [
        *((kind, 0) for kind in ("lines", "numbered", "json", "npy", "npy of bytes", "ours")),
        ("lines", 1),  # no <pad>
        ("ours", 2),  # nor <unk>
        ("ours npy", 2),
    ],
)
def test_word_lists_become_the_vocabulary(small, tmp_path, kind, left_out):
    """Whatever the list's form, a word keeps its row, and the unknown word's is second."""
    write, model = small
    path, words = tmp_path / "words.txt", list(WORDS)
    if "ours" in kind:
        words = ["<pad>", "<unk>", *WORDS[4:], "x", "y"]
    given = words[left_out:]
    if "npy" in kind:
        np.save(path := tmp_path / "dict.npy", np.array(given, "S" if "bytes" in kind else "U"))
    elif kind == "json":
        (path := tmp_path / "words.json").write_text(json.dumps(given))
    elif kind == "numbered":
        lines = [f"{number} {word}" for number, word in enumerate(given)]
        path.write_text("\n".join(lines[::-1]) + "\n")
    else:
        path.write_text("\n".join(given) + "\n")
    notes = convert(write(), tmp_path / "out", words=path, head_dim=8).get("notes", [])
    special = ["<pad>", "<unk>"][:left_out]
    assert [note for note in notes if "for 20 rows" in note] == [
        f"{path} has {20 - left_out} words for 20 rows; taken as the table's first: "
        f"{', '.join(special)}"
    ][: len(special)]
    found = create_model(tmp_path / "out")
    table, rows = found.text_tokens.table.weight, model.text_tokens.table.weight
    assert found.vocabulary.words[:2] == ("<pad>", "<unk>")
    for word, number in found.vocabulary.number_of.items():
        assert torch.equal(table[number], rows[words.index(word)]), word
    sentence, ids = "Word3, WORD0 never", [words.index(w) for w in ("word3", "word0", "<unk>")]
    expected = model(text=torch.tensor([ids + [0] * 13])).z_text_vt[0]
    in_memory = create_model(tmp_path / "ckpt-7", words=path, head_dim=8)
    for each in (found, in_memory):
        embedding = each.encode(text=[sentence])["z_text_vt"].flatten()
        torch.testing.assert_close(embedding, expected / expected.norm())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<pad>\n<unk>\na", "has 3 words, the word table 20 rows"),
        ("\n".join(["x", *WORDS[1:]]), "each of the 20 rows and begins 'x'.* must be <pad>"),
        ("\n".join(WORDS[4:]), "16 words .without <pad> and <unk>., the word table 20 rows"),
        ("\n".join(w for w in WORDS if w != "<unk>"), "19 words .without <unk>., .* 20 rows"),
        ("\n".join(f"w{i}" for i in range(19)), "19 words .without <pad> and <unk>., .* 20 rows"),
        ("\n".join(w if w != "<unk>" else "u" for w in WORDS), "<unk> one of the others"),
        ("\n".join([*WORDS[:-1], "word0"]), "'word0' is twice"),
        ("\n".join([*WORDS[:-1], "two of them"]), "line 20 is 'two of them'"),
        ("\n".join(f"{n + (n > 3)} {w}" for n, w in enumerate(WORDS)), "no word has number 4"),
        ("3 a\n3 b", "two words have number 3"),
        ("", "line 1 is ''"),
    ],
    ids=range(11),
)
def test_other_word_lists_are_refused(small, tmp_path, text, words):
    write, _ = small
    path = tmp_path / "words.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=words) as caught:
        read_released(write(), words=path, head_dim=8)
    assert str(path) in str(caught.value)
    with pytest.raises(ValueError, match="is missing"):
        read_released(tmp_path / "ckpt-7", words=tmp_path / "none.txt", head_dim=8)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.array(["<pad>", "<unk>", 3], object), "Object arrays cannot be loaded"),
        (np.arange(20), r"int64 of shape \(20,\), not a row of words"),
        (np.full((4, 5), "x"), r"of shape \(4, 5\), not a row of words"),
        (np.array([b"\xff"] * 20), "can't decode"),
    ],
    ids=range(4),
)
def test_arrays_without_words_are_refused(tmp_path, array, words):
    for content in (b"", b"\x93NUMPY"):
        (tmp_path / "cut.npy").write_bytes(content)
        with pytest.raises(ValueError, match=r"cut\.npy is no word list"):
            read_word_list(tmp_path / "cut.npy")
    with open(tmp_path / "several.npy", "wb") as file:
        np.savez(file, a=array, b=array)
    with pytest.raises(ValueError, match=r"several\.npy is no word list: it holds several"):
        read_word_list(tmp_path / "several.npy")
    np.save(tmp_path / "dict.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match=rf"dict\.npy is no word list: .*{words}"):
        read_word_list(tmp_path / "dict.npy")


# -- fine-tuned towers -----------------------------------------------------------------------------


def fine_tuned(name: str, modality: str, classes: int = 7) -> Classifier:
    config = variant(name)
    changed = {"frames_per_second": 12.5} if modality == "video" else {"sample_rate_hz": 24000}
    unread = {m: getattr(VATTConfig(), m) for m in ("video", "audio", "text") if m != modality}
    config = dataclasses.replace(config, **changed, **({} if config.agnostic else unread))
    torch.manual_seed(1)
    model = Classifier(ClassifierConfig(config, modality, classes)).eval()
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.ndim == 1:
                value.uniform_(-1, 1)
    return model


CLIPS = {"video": (2, 4, 8, 12, 3), "audio": (2, 64)}


@pytest.fixture(params=["specific-video", "specific-audio", "agnostic-video", "agnostic-audio"])
def tower(request, tmp_path):
    """A fine-tuned tower, its checkpoint and clips for it."""
    kind, modality = request.param.split("-")
    model = fine_tuned("agnostic_post_proj" if kind == "agnostic" else "wide_spaces", modality)
    tensors = with_bookkeeping(fine_tuned_keys(model.config, model.state_dict()))
    write_bundle(tmp_path / "ckpt-9", arrays(tensors), shards=2)
    clips = torch.rand(CLIPS[modality], generator=torch.Generator().manual_seed(0)) * 2 - 1
    return model, tmp_path / "ckpt-9", clips


def test_fine_tuned_towers_come_back(tower, tmp_path):
    model, prefix, clips = tower
    (tmp_path / "labels").write_text("\n".join("abcdefg"))
    found = convert(prefix, tmp_path / "out", head_dim=8, labels=tmp_path / "labels")
    assert found["classes"] == 7
    saved = Classifier.from_pretrained(tmp_path / "out")
    assert saved.labels == list("abcdefg") and not saved.training
    in_memory = Classifier.from_released(read_released(prefix, head_dim=8))
    config, modality = model.config, model.settings.modality
    for each in (saved, in_memory):
        assert getattr(each.config, modality) == getattr(config, modality)
        assert each.config.kind == config.kind
        grid = "video_grid" if modality == "video" else "num_audio_patches"
        assert getattr(each.config, grid) == getattr(config, grid)
        for key, value in model.state_dict().items():
            assert torch.equal(each.state_dict()[key], value), key
        assert torch.equal(each(clips), model(clips))
    jax = pytest.importorskip("jax")
    from vatt_fast.on_jax import classifier

    settings, params = classifier.load(tmp_path / "out")
    forward = jax.jit(functools.partial(classifier.forward, config=settings))
    logits = forward(params, clips.numpy())
    np.testing.assert_allclose(np.array(logits), model(clips).detach(), atol=1e-5, rtol=1e-5)


def test_a_classifier_is_its_tower_and_a_product(tower):
    model, _, clips = tower
    modality = model.settings.modality
    whole = VATT(model.config).eval()
    result = whole.load_state_dict(model.state_dict(), strict=False)
    assert set(result.unexpected_keys) == {"classifier.weight", "classifier.bias"}
    pooled = getattr(whole(**{modality: clips}), f"{modality}_pooled")
    by_hand = pooled @ model.classifier.weight.T + model.classifier.bias
    torch.testing.assert_close(model(clips), by_hand)


@pytest.mark.parametrize(
    ("tower", "modality", "agnostic"),
    [
        (BASE, "video", False),
        (MEDIUM, "video", False),
        (LARGE, "video", False),
        (XLARGE, "video", False),
        (MEDIUM, "video", True),
        (BASE, "audio", False),
        (MEDIUM, "audio", True),
    ],
)
def test_published_fine_tuned_sizes_are_found(tower, modality, agnostic):
    """Position tables of 320 x 320 pixels, as the paper fine-tunes; 64 wide heads, unasked."""
    name = "ma" if agnostic else "bbs"
    towers = dict.fromkeys(("video", "audio", "text") if agnostic else (modality,), tower)
    config = dataclasses.replace(preset(name, "released"), height=320, width=320, **towers)
    with torch.device("meta"):
        model = Classifier(ClassifierConfig(config, modality, 400))
    tensors = fine_tuned_keys(config, model.state_dict())
    shapes = {key.removesuffix(VALUE): tuple(value.shape) for key, value in tensors.items()}
    layout = layout_of(shapes)
    assert getattr(layout.config, modality) == tower and not layout.notes
    assert (layout.modality, layout.num_classes) == (modality, 400)
    if modality == "video":
        assert (layout.config.height, layout.config.frames) == (320, 32)
    assert {w.key: w.shape for w in layout.weights} == shapes


def test_what_is_loaded_as_what(tower, small, tmp_path):
    _, prefix, _ = tower
    convert(prefix, tmp_path / "tower", head_dim=8)
    for name in (prefix, tmp_path / "tower"):
        with pytest.raises(ValueError, match="classifier"):
            create_model(name, **({} if name.is_dir() else {"head_dim": 8}))
    write, _ = small
    with pytest.raises(ValueError, match="pre-trained and has no classifier"):
        Classifier.from_released(read_released(write(), head_dim=8))
    convert(tmp_path / "ckpt-7", tmp_path / "whole", head_dim=8)
    with pytest.raises(ValueError, match="no classifier's config"):
        Classifier.from_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        Classifier.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [("a\nb", "has 2 names, the classifier 7 outputs"), ("a\n" * 7, "'a' is empty or there twice")],
    ids=["few", "twice"],
)
def test_other_labels_are_refused(tower, tmp_path, text, words):
    _, prefix, _ = tower
    (tmp_path / "labels.txt").write_text(text)
    with pytest.raises(ValueError, match=words):
        convert(prefix, tmp_path / "out", labels=tmp_path / "labels.txt", head_dim=8)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="cannot be read as labels"):
        convert(prefix, tmp_path / "out", labels=tmp_path / "none", head_dim=8)
    (tmp_path / "words.txt").write_text("\n".join(WORDS))
    with pytest.raises(ValueError, match="no text tower"):
        convert(prefix, tmp_path / "out", words=tmp_path / "words.txt", head_dim=8)


# -- the command -----------------------------------------------------------------------------------


def test_the_command_writes_a_model(small, tmp_path, capsys):
    write, model = small
    (tmp_path / "words.txt").write_text("\n".join(WORDS))
    command = ["convert", "--checkpoint", str(write()), "--out", str(tmp_path / "out")]
    main([*command, "--words", str(tmp_path / "words.txt"), "--head-dim", "video=8,audio=8"])
    assert "3 heads of 8" in capsys.readouterr().out
    found = create_model(tmp_path / "out")
    assert found.config == model.config and isinstance(found.vocabulary, Vocabulary)
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 2
    assert re.search(r"out holds a model already; name another folder$", capsys.readouterr().err)
    with pytest.raises(SystemExit):
        main([*command, "--head-dim", "eight"])
    assert "--head-dim is 'eight'" in capsys.readouterr().err


def test_the_command_reports_what_it_left_out(small, tmp_path, capsys):
    write, _ = small
    prefix = write(lambda t: t.update({f"{ROOT}more{VALUE}": torch.ones(2)}))
    command = ["convert", "--checkpoint", str(prefix), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        main(command)
    assert "no place here" in capsys.readouterr().err and not (tmp_path / "out").exists()
    main([*command, "--partial", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["not matched"] == [f"no place here: {ROOT}more"]
    assert found["left out"]["step counters"] == 1
