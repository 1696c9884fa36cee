"""What a pre-training step takes on so many devices, before any is rented: memory, exchanges, time.

Computed, not measured: sizes by formula; activations by running the real model on tensors without
memory, and noting what lives. Times are floors: a step cannot be faster.
"""

import dataclasses
import functools
import math
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .config import MODALITIES, Recipe, VATTConfig, preset
from .flops import true_flops
from .kernels.drop_token import num_kept
from .losses import vatt_loss
from .model import VATT, BatchNorm, Block
from .recompute import Recompute

_HOST_DEVICES = 8  # that exchange over the fast link


@dataclasses.dataclass(frozen=True)
class Device:
    """One device by its maker's data sheet: dense bf16, memory, and links in one direction."""

    tflops: float
    memory_gb: float
    memory_gb_per_s: float
    link_gb_per_s: float  # to devices of the same host
    network_gb_per_s: float = 50.0  # to other hosts: 400 Gb/s a device


# NVIDIA's data sheets of the SXM modules
DEVICES = {
    "a100": Device(312, 80, 2039, 300, 25),
    "h100": Device(989, 80, 3350, 450),
    "h200": Device(989, 141, 4800, 450),
    "b200": Device(2250, 180, 8000, 900),
}


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """A pre-training step and the devices it is for."""

    # base_base_small (bbs), medium_base_small (mbs), large_base_small (lbs), agnostic_medium (ma)
    # or tiny
    preset: str = "medium_base_small"

    recipe: Recipe = "paper"  # the paper's choices, or the released code's
    devices: tuple[int, ...] = (8,)  # how many; several make a table
    batch: tuple[int, ...] = (2048,)  # clips of a step, on all devices; one, or one each
    device: Literal["a100", "h100", "h200", "b200"] = "h200"
    strategy: Literal["ddp", "fsdp2"] = "ddp"  # all weights on each, or in shards
    recompute: Recompute = "none"  # as pretrain's
    micro_batch: int | None = None  # as pretrain's: clips of a device that are encoded at once
    precision: Literal["bf16", "fp32"] = "bf16"
    drop_rate: float = 0.5  # of DropToken
    words: int = 65536  # size of the vocabulary

    # clips a second that a CPU core decodes and augments: 10 of 320x240 in H.264; `vatt-fast pack`
    # measures it
    clips_per_core: float = 10.0

    json: bool = False  # print JSON

    def __post_init__(self):
        for name in ("devices", "batch"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; each must be at least 1")
        if len(self.batch) not in (1, len(self.devices)):
            raise ValueError(
                f"batch has {len(self.batch)} numbers, devices {len(self.devices)}: give one batch "
                "for all, or one each"
            )
        for devices, batch in self.cases:
            if batch % devices or batch < 2:
                raise ValueError(
                    f"batch is {batch}; {devices} devices cannot share it evenly: take a multiple"
                )
        if not 0 <= self.drop_rate < 1:
            raise ValueError(f"drop_rate is {self.drop_rate}; it lies in [0, 1)")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(f"micro_batch is {self.micro_batch}; it must be at least 1")
        if self.clips_per_core <= 0:
            raise ValueError(f"clips_per_core is {self.clips_per_core}; it must be more than 0")
        if self.words < 2:
            raise ValueError(f"words is {self.words}; padding and the unknown word are 2")

    @property
    def cases(self) -> list[tuple[int, int]]:
        batches = self.batch if len(self.batch) > 1 else self.batch * len(self.devices)
        return list(zip(self.devices, batches, strict=True))


def plan(run: PlanConfig, *, model_config: VATTConfig | None = None) -> list[dict[str, Any]]:
    """What a step takes, for each pair of ``devices`` and ``batch``.

    Returns:
        of each: devices, batch, memory_gb (of one device, by kind, and "all"), fits,
        activations_gb (by way of recompute), exchanged_mb (what one device sends in a step, by
        collective), tflops (of one device), floor_ms (by what sets it), clips_per_second at most,
        and decoding_cores that this keeps busy.
    """
    config = model_config or preset(run.preset, run.recipe)
    config = dataclasses.replace(config, vocab_size=run.words)
    return [_plan(run, config, devices, batch) for devices, batch in run.cases]


def _plan(run: PlanConfig, config: VATTConfig, devices: int, batch: int) -> dict[str, Any]:
    device, clips = DEVICES[run.device], batch // devices
    encoded = min(clips, run.micro_batch or clips)
    bf16 = run.precision == "bf16"
    ways: dict[Recompute, dict[str, float]] = {
        how: activations(config, encoded, run.drop_rate, how, bf16)
        for how in ("none", "blocks", "ops")
    }
    kinds = state_bytes(config, devices, run.strategy) | ways[run.recompute]
    kinds["batch"] = 3 * _batch_bytes(
        config, clips, run.drop_rate
    )  # this one, and the next on its way
    kinds["loss"] = _loss_bytes(config, clips, devices)
    if encoded < clips:  # pooled vectors and their gradients
        kinds["loss"] += 8 * clips * sum(map(config.pooled_dim, MODALITIES))
    memory = {name: value / 1e9 for name, value in kinds.items()}
    memory["all"] = sum(memory.values())
    sent = exchanged_bytes(config, clips, devices, run.strategy)
    flops = clips * _flops(config, run, encoded < clips)
    peak = device.tflops * (1 if bf16 else 0.0625) * 1e12  # fp32 outside of tensor cores
    link = device.link_gb_per_s if devices <= _HOST_DEVICES else device.network_gb_per_s
    # what a step reads and writes at least: weights, gradients, Adam's state; and activations
    moved = 8 * kinds["weights"] + 2 * (kinds["activations"] * clips / encoded)
    floors = {
        "arithmetic": flops / peak * 1e3,
        "memory": moved / (device.memory_gb_per_s * 1e9) * 1e3,
        "exchanges": sum(sent.values()) / (link * 1e9) * 1e3,
    }
    rate = batch / max(floors.values()) * 1e3
    return {
        "devices": devices,
        "batch": batch,
        "memory_gb": memory,
        "fits": memory["all"] <= device.memory_gb,
        "activations_gb": {how: each["activations"] / 1e9 for how, each in ways.items()},
        "exchanged_mb": {name: value / 1e6 for name, value in sent.items()},
        "tflops": flops / 1e12,
        "floor_ms": floors,
        "clips_per_second": rate,
        "decoding_cores": rate / run.clips_per_core,
    }


def _flops(config: VATTConfig, run: PlanConfig, encoded_twice: bool) -> float:
    """Of one clip: forward and backward, and what is computed again."""

    def count(mode: Any) -> int:
        return sum(true_flops(config, run.drop_rate, features=False, mode=mode).values())

    again = int(run.recompute != "none") + int(encoded_twice)
    return count("fwd+bwd") + again * count("fwd")


# -- memory ----------------------------------------------------------------------------------------


def state_bytes(config: VATTConfig, devices: int, strategy: str = "ddp") -> dict[str, float]:
    """Of one device: weights with batch statistics, gradients, Adam's two moments; all fp32.

    In shards, also the two blocks that are whole at a time.
    """
    model = _shapes(config)
    weights = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    statistics = 4 * sum(x.numel() for x in model.buffers())
    split = devices if strategy == "fsdp2" else 1
    found: dict[str, float] = {
        "weights": 4 * weights / split + statistics,
        "gradients": 4 * trained / split,
        "adam": 8 * trained / split,
    }
    if split > 1:
        blocks = [
            sum(p.numel() for p in m.parameters()) for m in model.modules() if type(m) is Block
        ]
        rest = weights - sum(blocks)  # is whole from the first forward to the last backward
        # weights of two blocks, and gradients of one
        found["joined shards"] = 4 * (3 * max(blocks) + 2 * rest)
    return found


@functools.lru_cache(8)
def _shapes(config: VATTConfig) -> VATT:
    with torch.device("meta"):
        return VATT(config)


def activations(
    config: VATTConfig,
    clips: int,
    drop_rate: float,
    recompute: Recompute,
    bf16: bool,
    gpu: bool = True,
) -> dict[str, float]:
    """Bytes that a forward pass of so many clips leaves, and what the backward pass adds to them.

    Traced under a CPU's autocast. On a GPU layer norms keep an fp32 copy of their input: with
    ``gpu`` these are added.
    """
    kept, beside = traced(config, clips, drop_rate, recompute, bf16)
    if gpu and bf16 and recompute == "none":
        kept += 2 * clips * _normed_values(config, drop_rate)
    return {"activations": kept, "backward": beside}


def _normed_values(config: VATTConfig, drop_rate: float) -> int:
    """Elements that layer norms of the encoders see, of one clip."""
    found = 0
    for modality, tokens in _tokens(config, drop_rate).items():
        tower = getattr(config, modality)
        found += (2 * tower.depth + 1) * tokens * tower.dim
    return found


def _tokens(config: VATTConfig, drop_rate: float) -> dict[str, int]:
    """Of one clip, AGG included; of all its sentences."""
    return {
        "video": num_kept(config.num_video_patches, drop_rate) + 1,
        "audio": num_kept(config.num_audio_patches, drop_rate) + 1,
        "text": config.texts_per_clip * (config.words + 1),
    }


@functools.lru_cache(64)
def traced(
    config: VATTConfig, clips: int, drop_rate: float, recompute: Recompute, bf16: bool
) -> tuple[int, int]:
    """Bytes of a real step on tensors without memory: see ``live_bytes``."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.device("meta"):
        model = VATT(config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model.to_empty(device="cpu").train()
        model.set_execution(recompute=recompute)
        return live_bytes(model, empty_batch(config, clips, drop_rate), bf16)


def empty_batch(config: VATTConfig, clips: int, drop_rate: float) -> dict[str, Tensor]:
    """Inputs of a training step, of the right shapes."""
    video = num_kept(config.num_video_patches, drop_rate)
    audio = num_kept(config.num_audio_patches, drop_rate)
    words = torch.zeros(clips, config.texts_per_clip, config.words, dtype=torch.long)
    return {
        "video": torch.zeros(clips, video, config.video_patch_values, dtype=torch.uint8),
        "audio": torch.zeros(clips, *config.loaded_audio(audio)),
        "text": words,
        "video_keep": torch.arange(video),
        "audio_keep": torch.arange(audio),
    }


def live_bytes(model: VATT, batch: Mapping[str, Tensor], bf16: bool) -> tuple[int, int]:
    """Bytes that a forward pass leaves alive, and how many more there are at the peak of both.

    Weights, gradients (which are there all the time, as DistributedDataParallel has them) and
    batch are not counted.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    given = [*model.parameters(), *model.buffers(), *batch.values(), *gradients]
    with _Live(given) as live:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = vatt_loss(model(**batch), model.config, scale=model.scale())
        kept = live.now
        loss.total.backward()
        return kept, live.peak - kept


class _Live(TorchDispatchMode):
    """Bytes of the storages that operators have made and that still live."""

    def __init__(self, given: Iterable[Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self._seen: Any = weakref.WeakKeyDictionary()
        for tensor in given:
            self._seen[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: Any) -> None:
        if storage in self._seen:
            return
        size = storage.nbytes()
        self._seen[storage] = True
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.now -= size


def _batch_bytes(config: VATTConfig, clips: int, drop_rate: float) -> int:
    video = num_kept(config.num_video_patches, drop_rate) * config.video_patch_values
    audio = 4 * math.prod(config.loaded_audio(num_kept(config.num_audio_patches, drop_rate)))
    return clips * (video + audio + 8 * config.texts_per_clip * config.words)


def _loss_bytes(config: VATTConfig, clips: int, devices: int) -> int:
    """The embeddings of all devices and their gradients, and log-sums; no score is stored."""
    everywhere = clips * devices
    embeddings = config.d_va + config.texts_per_clip * config.d_vt
    sums = 4 * everywhere * (1 + config.texts_per_clip)
    return 2 * 4 * everywhere * embeddings + 2 * sums


# -- exchanges -------------------------------------------------------------------------------------


def exchanged_bytes(
    config: VATTConfig, clips: int, devices: int, strategy: str = "ddp"
) -> dict[str, float]:
    """What one device sends in a step, by collective, with ring algorithms.

    Args:
        clips: of one device.
    """
    if devices == 1:
        return {}
    W, M, P = devices, clips, config.texts_per_clip
    others = (W - 1) / W
    model = _shapes(config)
    trained = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = 4 * sum(p.numel() for p in model.parameters())
    if strategy == "fsdp2":
        found = {
            "all-gather of weights": 2 * weights * others,
            "reduce-scatter of gradients": trained * others,
        }
    else:
        found = {"all-reduce of gradients": 2 * trained * others}
    # a pair's texts or sounds go round forward; their gradients come back
    pairs = 4 * M * (config.d_va + P * config.d_vt) * (W - 1)
    norms = sum(m.weight.numel() for m in model.modules() if isinstance(m, BatchNorm))
    sums = 4 * M * (1 + P) * (W - 1)
    return found | {
        "all-gather of embeddings": pairs,
        "reduce-scatter of embeddings": pairs,
        "all-to-all of log-sums": 2 * sums,
        "batch norms": 2 * 4 * 2 * norms * (W - 1),
    }


# -- text ------------------------------------------------------------------------------------------


def markdown(run: PlanConfig, cases: list[dict[str, Any]]) -> str:
    """A table, a line for each case."""
    lines = [
        "| devices | batch | GB a device | fits | activations | none / blocks / ops | GB sent "
        "| floor ms, set by | clips/s at most | cores to decode |",
        "|---:|---:|---:|---|---:|---|---:|---|---:|---:|",
    ]
    for case in cases:
        memory, ways = case["memory_gb"], case["activations_gb"]
        floor = max(case["floor_ms"], key=case["floor_ms"].__getitem__)
        lines.append(
            f"| {case['devices']} | {case['batch']} | {memory['all']:.1f} "
            f"| {'yes' if case['fits'] else 'no'} | {memory['activations']:.1f} "
            f"| {' / '.join(f'{value:.1f}' for value in ways.values())} "
            f"| {sum(case['exchanged_mb'].values()) / 1e3:.2f} "
            f"| {case['floor_ms'][floor]:.0f}, {floor} | {case['clips_per_second']:.0f} "
            f"| {case['decoding_cores']:.0f} |"
        )
    return "\n".join(lines)
