"""Pre-train from tar shards and a manifest with weights, then from shards with augmentation.

    python examples/pretrain_from_shards.py --out runs/shards

Two worlds are made of the demo's rendered clips. In the first the captions name colours and
directions, so its clips stay as they are; a part of them has no captions and lies in a manifest, as
AudioSet beside HowTo100M. In the second nothing moves to the left or right and captions name no
colour, so clips are mirrored and change their colours. Each run ends with retrieval on held-out
clips, which are in tar shards too.
"""

import argparse
import json
from pathlib import Path

from vatt_fast.data.pack import Packing, pack
from vatt_fast.data.sources import open_source
from vatt_fast.demo.captions import MOTION_WORDS, query_sentence
from vatt_fast.demo.scene import SECONDS, Factors
from vatt_fast.demo.world import render_world
from vatt_fast.training.loop import PretrainConfig, pretrain
from vatt_fast.training.metrics import read_metrics

PACKING = Packing(short_side=64, key_frames=10, sample_rate_hz=16000, examples_per_shard=64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=600, help="to train on")
    parser.add_argument("--held-out", type=int, default=150)
    parser.add_argument("--steps", type=int, default=250, help="of each run")
    parser.add_argument("--batch-size", type=int, default=32)
    given = parser.parse_args()
    world = render_world(given.out / "world", num_train=given.clips, num_test=given.held_out)

    spoken = given.clips * 2 // 3
    first = given.out / "first"
    shards(world / "train", first / "spoken", chosen(world / "train", spoken))
    silent = [path.name for path in sorted((world / "train").glob("*.mp4"))[spoken:]]
    (first / "silent.csv").write_text("\n".join(["path", *silent]) + "\n")
    media = (world / "train").absolute()
    mix = (
        '[[source]]\npath = "spoken"\nweight = 0.7\n\n'
        f'[[source]]\npath = "silent.csv"\nweight = 0.3\nmedia = "{media}"\n'
    )
    (first / "mix.toml").write_text(mix)
    asked = {n: query_sentence(each) for n, each in factors_of(world / "test", False).items()}
    shards(world / "test", first / "held_out", told(asked))
    train(given, "colours and directions named, two sources", first, "mix.toml", "none")

    second = given.out / "second"
    for split, name in (("train", "spoken"), ("test", "held_out")):
        said = {n: undirected(each) for n, each in factors_of(world / split, True).items()}
        said = said if split == "train" else without_repeats(said)
        shards(world / split, second / name, told(said))
    train(given, "neither named, mirrored and recoloured", second, "spoken", "flip,colour")


def undirected(factors: Factors) -> str:
    moving = MOTION_WORDS[factors.motion][0]
    return f"a {factors.shape} {moving} on a {factors.background} background"


def factors_of(folder: Path, mirrored: bool) -> dict[str, Factors]:
    """What each clip shows; ``mirrored``: only of those whose mirror image is told alike."""
    everything = json.loads((folder / "factors.json").read_text())
    found = {name: Factors(**each) for name, each in everything.items()}
    return {
        name: each
        for name, each in found.items()
        if not (mirrored and each.motion in ("left", "right"))
    }


def chosen(folder: Path, count: int) -> dict[str, list[dict]]:
    """The narration of the first clips."""
    captions = json.loads((folder / "captions.json").read_text())
    return {name: captions[name] for name in sorted(captions)[:count]}


def told(sentences: dict[str, str]) -> dict[str, list[dict]]:
    return {
        name: [{"start": 0.0, "end": SECONDS, "text": text}] for name, text in sentences.items()
    }


def without_repeats(sentences: dict[str, str]) -> dict[str, str]:
    """Of clips that share a sentence, only the first."""
    first = {text: name for name, text in reversed(sentences.items())}
    return {name: text for name, text in sentences.items() if first[text] == name}


def shards(media: Path, out: Path, captions: dict[str, list[dict]]) -> None:
    """Tar shards of the clips that have captions here."""
    clips = out.with_name(f"{out.name}_clips")
    clips.mkdir(parents=True, exist_ok=True)
    for name in captions:
        if not (clips / name).exists():
            (clips / name).hardlink_to(media / name)
    (clips / "captions.json").write_text(json.dumps(captions))
    done = pack(open_source(clips), out, PACKING)
    size = f"{done.bytes / 1e6:.1f} MB"
    print(f"{out}: {done.clips} clips in {done.shards} shards, {size}", flush=True)


def train(given: argparse.Namespace, what: str, folder: Path, data: str, augment: str) -> None:
    rate = 1.5e-3
    run = PretrainConfig(
        data=str(folder / data),
        out=str(folder / "run"),
        preset="tiny",
        steps=given.steps,
        batch_size=given.batch_size,
        learning_rate=rate,
        final_learning_rate=rate / 20,
        warmup_steps=min(100, given.steps // 5),
        schedule="half_cosine",
        max_words=512,
        augment=augment,
        workers=1,
        eval_data=str(folder / "held_out"),
        eval_every=given.steps,
        checkpoint_every=max(1, given.steps // 4),
    )
    pretrain(run, progress=False)
    last = read_metrics(folder / "run" / "metrics.jsonl")[-1]
    clips = len(open_source(run.eval_data))
    chance = min(100.0, 1000 / clips)
    print(f"{what}: {given.steps} steps, {clips} held-out clips, chance R@10 {chance:.1f} %")
    for kind in ("text_to_video", "audio_to_video"):
        ranks = f"R@1 {last[f'{kind}_r1']:.1f} %, R@10 {last[f'{kind}_r10']:.1f} %"
        print(f"  {kind}: {ranks}, median rank {last[f'{kind}_median_rank']:.1f}", flush=True)


if __name__ == "__main__":
    main()
