"""The narration of a clip of the rendered world.

Some sentences name factors of the clip, some name nothing of it.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from .scene import FACTORS, SECONDS, Factors

# The share of each kind of caption, and how often a telling one names each factor. What is seen at
# a glance is named the least.
ABOUT_THE_CLIP, UNRELATED, ABOUT_ANOTHER = 0.70, 0.25, 0.05
NAMED = {"shape": 0.75, "colour": 0.5, "motion": 0.9, "background": 0.5}
WORDS_AT_MOST = 16

MOTION_WORDS = {
    "left": ("moving left", "sliding left", "going to the left"),
    "right": ("moving right", "sliding right", "going to the right"),
    "up": ("moving up", "floating up", "going all the way up"),
    "down": ("moving down", "sinking down", "going all the way down"),
    "grow": ("growing", "growing bigger", "growing larger"),
    "shrink": ("shrinking", "shrinking smaller", "shrinking to a small size"),
    "orbit": ("orbiting", "orbiting around", "orbiting in a loop"),
    "bounce": ("bouncing", "bouncing along", "bouncing off the floor"),
}
_OPENERS = (
    "",
    "",
    "now we see",
    "look there is",
    "here comes",
    "you can see",
    "and this is",
    "okay so we have",
    "next comes",
)
_ENDINGS = ("", "", "", "again", "as you see", "just like that", "for a while", "on the screen")
_NOUNS = ("background", "background", "wall", "backdrop")
_UNRELATED = (
    "please remember to subscribe to the channel",
    "let me know what you think in the comments",
    "{today} I had {food} with my {friend}",
    "we will be back after a short break",
    "thank you so much for watching {today}",
    "my {friend} told me a funny story {today}",
    "the weather was really nice {today}",
    "I should clean the kitchen before my {friend} arrives",
    "first you need some {food} and a little patience",
    "do not forget to add {food} to the shopping list",
    "the train was late {today} so I walked",
    "we talked about {food} and music for hours",
    "that is what my {friend} always says",
    "I have been thinking about buying a new camera",
    "the link is below if you want to learn more",
    "so anyway where was I before the phone rang",
)
_SLOTS = {
    "today": ("today", "yesterday", "this morning", "last week"),
    "food": ("coffee", "soup", "bread", "rice", "tea"),
    "friend": ("friend", "brother", "sister", "neighbour"),
}


def _pick(generator: np.random.Generator, options: Iterable[str]) -> str:
    options = tuple(options)
    return options[int(generator.integers(len(options)))]


def telling_sentence(factors: Factors, generator: np.random.Generator) -> str:
    """A sentence that names at least one factor, with filler words around it."""
    named: set[str] = set()
    while not named:
        named = {name for name in FACTORS if generator.random() < NAMED[name]}
    thing = [_pick(generator, ("a", "the", "this"))]
    if generator.random() < 0.2:
        thing.append(_pick(generator, ("nice", "little", "simple", "funny")))
    if "colour" in named:
        thing.append(factors.colour)
    thing.append(
        factors.shape if "shape" in named else _pick(generator, ("thing", "object", "figure"))
    )
    if "motion" in named:
        thing.append(_pick(generator, MOTION_WORDS[factors.motion]))
    if "background" in named:
        thing.append(_pick(generator, ("on a", "over a", "against a")))
        thing += [factors.background, _pick(generator, _NOUNS)]
    core = " ".join(thing)
    whole = " ".join(f"{_pick(generator, _OPENERS)} {core} {_pick(generator, _ENDINGS)}".split())
    return whole if len(whole.split()) <= WORDS_AT_MOST else core


def unrelated_sentence(generator: np.random.Generator) -> str:
    """A sentence that names no factor."""
    return _pick(generator, _UNRELATED).format(
        **{slot: _pick(generator, options) for slot, options in _SLOTS.items()}
    )


def query_sentence(factors: Factors) -> str:
    """The one full sentence that describes a clip: all four factors, in words of the captions."""
    moving = MOTION_WORDS[factors.motion][0]
    return f"a {factors.colour} {factors.shape} {moving} on a {factors.background} background"


def caption_clip(
    index: int, everyone: list[Factors], generator: np.random.Generator
) -> list[dict[str, Any]]:
    """5 to 8 captions in the order of time, spread over clip ``index``.

    Args:
        everyone: the factors of all clips of its split.
    """
    own = everyone[index]
    count = int(generator.integers(5, 9))
    captions = []
    for place in range(count):
        kind = generator.random()
        if kind < ABOUT_THE_CLIP:
            text = telling_sentence(own, generator)
        elif kind < ABOUT_THE_CLIP + UNRELATED:
            text = unrelated_sentence(generator)
        else:
            text = telling_sentence(_another(own, everyone, generator), generator)
        middle = (place + generator.random()) / count * SECONDS
        length = generator.uniform(0.4, 0.9)
        start, end = max(0.0, middle - length / 2), min(SECONDS, middle + length / 2)
        captions.append({"start": round(start, 2), "end": round(end, 2), "text": text})
    return captions


def _another(own: Factors, everyone: list[Factors], generator: np.random.Generator) -> Factors:
    """The factors of another clip that differ; where all clips are alike, those of all."""
    for _ in range(100):
        other = everyone[int(generator.integers(len(everyone)))]
        if other != own:
            return other
    return own
