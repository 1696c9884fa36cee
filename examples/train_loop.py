"""A training loop of your own on a folder of clips: loader, DropToken, loss, optimizer, save.

    python examples/train_loop.py --data clips --out runs/mine --steps 100

``vatt-fast pretrain`` does the same with checkpoints, a schedule, logs and resuming.
"""

import argparse
import dataclasses

import torch

import vatt_fast as vf
from vatt_fast.data.clips import ClipSpec, DropToken
from vatt_fast.data.dataset import ClipDataset
from vatt_fast.data.loader import loader
from vatt_fast.training.loop import vocabulary_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of media files and captions.json")
    parser.add_argument("--out", required=True, help="folder for the trained model")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    given = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vocabulary = vocabulary_of(given.data, max_words=65536)
    config = dataclasses.replace(vf.preset("tiny"), vocab_size=len(vocabulary))
    model = vf.VATT(config).to(device).train()
    model.vocabulary = vocabulary
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-3)
    spec = ClipSpec.from_config(config)
    half = DropToken(config, 0.5)  # batches hold the kept half of the patches
    dataset = ClipDataset(
        given.data, spec, vocabulary=vocabulary, batch_size=given.batch_size, drop_token=half
    )

    for step, batch in enumerate(loader(dataset, 0, given.steps, workers=0)):
        batch = batch.to(device)
        keep = dict(video_keep=batch.video_keep, audio_keep=batch.audio_keep)
        # a file without sound, picture or captions is no error: it is marked, and left out
        valid = {key: getattr(batch, key) for key in ("video_valid", "audio_valid", "text_valid")}
        output = model(batch.video, batch.audio, batch.text, **keep, **valid)
        loss = vf.vatt_loss(output, config, scale=model.scale(), **valid)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        print(f"step {step}  loss {loss.total.item():.3f}", flush=True)
    model.save_pretrained(given.out)
    print(f"saved {given.out}; load it with vatt_fast.create_model({given.out!r})")


if __name__ == "__main__":
    main()
