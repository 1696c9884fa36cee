"""VATT under transformers' Trainer, with a folder for the hub at its end.

    python examples/transformers_vatt.py --steps 5 --out hub

Needs transformers 5 and accelerate. The clips are random; a data set of media files is the same
with their paths in place of the arrays, and with VATTModel.from_pretrained(run) a trained model.
"""

import argparse

import numpy as np
from transformers import AutoModel, AutoProcessor, Trainer, TrainingArguments

from vatt_fast import preset
from vatt_fast.data.text import Vocabulary
from vatt_fast.integrations.transformers_model import (
    VATTModel,
    VATTPretrainedConfig,
    VATTProcessor,
    register,
)

register()  # from here on AutoModel knows the model
CAPTIONS = ["a red dog", "a blue star", "a green ring", "a red star"]


def rows(count: int = 16) -> list[dict]:
    """Half-second clips of noise; one without sound, one without a sentence."""
    rng = np.random.default_rng(0)
    clips = [
        dict(
            video=rng.integers(0, 256, (8, 32, 32, 3), np.uint8),
            audio=rng.uniform(-1, 1, 8000).astype(np.float32),
            text=[CAPTIONS[i % 4]],
        )
        for i in range(count)
    ]
    clips[0]["audio"], clips[1]["text"] = None, []
    return clips


def main(steps: int, out: str) -> None:
    vocabulary = Vocabulary.build(CAPTIONS)
    model = VATTModel(VATTPretrainedConfig.of(preset("tiny")))
    model.vatt.vocabulary = vocabulary  # travels with the weights
    processor = VATTProcessor(model.vatt.config, vocabulary)

    def collate(batch: list[dict]):
        columns = {name: [row[name] for row in batch] for name in batch[0]}
        return processor(**columns, return_loss=True)

    settings = TrainingArguments(
        out, max_steps=steps, per_device_train_batch_size=8, learning_rate=1e-3, logging_steps=1,
        report_to="none", save_strategy="no", disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    trainer = Trainer(model, settings, data_collator=collate, train_dataset=rows())
    trainer.train()
    model.save_pretrained(out)  # model.push_to_hub(name) puts the same files there
    processor.save_pretrained(out)

    again, batch = AutoModel.from_pretrained(out), collate(rows(4))
    same = AutoProcessor.from_pretrained(out).vocabulary == vocabulary
    moved = (again(**batch).z_text_vt - model.eval()(**batch).z_text_vt).abs().max().item()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    for step, loss in enumerate(losses):
        print(f"step {step:2d}  loss {loss:.6f}")
    print(f"loaded: same words {same}, greatest difference {moved:.1e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", default="hub")
    given = parser.parse_args()
    main(given.steps, given.out)
