"""A tiny model with random weights and a few words, for tests of everything but training."""

import dataclasses

import torch

from vatt_fast import VATT, preset
from vatt_fast.data.text import Vocabulary

WORDS = ("red", "blue", "star", "ring", "dog")


def small_model():
    """64 x 64 pixels, 16 frames, 1.6 s, as the preset tiny; batch norms as after some steps."""
    torch.manual_seed(0)
    vocabulary = Vocabulary(["<pad>", "<unk>", *WORDS])
    model = VATT(dataclasses.replace(preset("tiny"), vocab_size=len(vocabulary)))
    model.vocabulary = vocabulary
    return model.eval()
