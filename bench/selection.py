"""Cases by name, and those that a CPU is judged by."""

import dataclasses
from collections.abc import Sequence

from vatt_fast.kernels.cases import CASES, Case, NCECase, tag


def _from_clips(case: Case) -> Case:
    """A video case whose patches are still in the clip."""
    return dataclasses.replace(
        case, name=f"{case.name}_clip", clip=(32, 224, 224, 3), patch=(4, 16, 16)
    )


def at_batch(case: Case, batch: int) -> Case:
    """Another batch; where x holds all clips, all of them."""
    more = {"clips": batch} if isinstance(case, NCECase) and case.batch == case.clips else {}
    return dataclasses.replace(case, batch=batch, name=f"{case.name}_b{batch}", **more)


# what a CPU is judged by: the presets' own sizes, at batches that it finishes in a fraction of a second
FOR_CPU: dict[str, tuple[Case, ...]] = {
    "attention": (
        *(
            at_batch(CASES["attention"][name], 1)
            for name in ("video_bbs_drop50", "video_bbs_drop0", "audio_bbs_drop50")
        ),
        at_batch(CASES["attention"]["video_mbs_drop50"], 2),
        CASES["attention"]["text_bbs"],
        CASES["attention"]["video_tiny_drop50"],
    ),
    "drop_token": (
        CASES["drop_token"]["video_mbs_drop50"],
        CASES["drop_token"]["video_mbs_drop50_per_clip"],
    ),
    "contrastive_lse": (
        CASES["contrastive_lse"]["va_bbs_one_device"],
        CASES["contrastive_lse"]["vt_bbs_one_device"],
        at_batch(CASES["contrastive_lse"]["va_bbs_one_device"], 8192),
        CASES["contrastive_lse"]["vt_bbs"],
    ),
    "patch_embed": (
        _from_clips(at_batch(CASES["patch_embed"]["video_mbs_drop50"], 2)),
        at_batch(CASES["patch_embed"]["video_mbs_drop50"], 2),
        at_batch(CASES["patch_embed"]["video_mbs_drop0"], 2),
        CASES["patch_embed"]["audio_bbs_drop50"],
        CASES["patch_embed"]["video_tiny_drop50"],
    ),
}


def select(op: str, names: Sequence[str]) -> list[Case]:
    """Cases by name, those a CPU is judged by included; "primary" and "parity" are all of a tag, "cpu" all of the CPU's.

    Raises:
        ValueError: an unknown name.
    """
    for_cpu = {case.name: case for case in FOR_CPU[op]}
    named = CASES[op] | for_cpu
    chosen: dict[str, Case] = {}
    for name in names:
        if name == "cpu":
            chosen |= for_cpu
        elif name in ("primary", "parity"):
            chosen |= {case.name: case for case in CASES[op].values() if tag(case) == name}
        elif name in named:
            chosen[name] = named[name]
        else:
            raise ValueError(
                f"unknown case {name!r}; {op} has primary, parity, cpu, {', '.join(named)}"
            )
    return list(chosen.values())
