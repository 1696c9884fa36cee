"""Whole towers that a user would pick instead of our video tower, at its size.

VideoMAE of Hugging Face's transformers is the nearest: the same blocks over the same patches, some
of them dropped. It projects every patch and then drops, where our model reads kept ones only. It
has no AGG token, so one token less; its features are pooled by their mean.
"""

import torch
from torch import Tensor, nn

from vatt_fast.config import VATTConfig

# B batch, N patches, K kept


def videomae(config: VATTConfig, device: torch.device) -> nn.Module | str:
    """A VideoMAE encoder of ``config.video``'s sizes with random weights, or why there is none.

    It attends by torch's SDPA. Its last LayerNorm stays in it, as in our encoder; with
    ``use_mean_pooling`` the library leaves that to its classifier.
    """
    tower = config.video
    if config.agnostic:
        return "a modality_agnostic trunk has projections before and behind it; VideoMAE has none"
    if tower.num_heads * tower.head_dim != tower.dim:
        return (
            f"{tower.num_heads} heads of {tower.head_dim} do not make dim {tower.dim}; "
            "VideoMAE's do"
        )
    size = (config.frames, config.height, config.width)
    if any(length % patch for length, patch in zip(size, config.video_patch, strict=True)):
        return (
            f"a clip of {size} is no multiple of the patch {config.video_patch}; "
            "VideoMAE pads nothing"
        )
    try:
        from transformers import VideoMAEConfig, VideoMAEModel
    # RuntimeError: a torchvision made for another torch lies beside it
    except (ImportError, OSError, RuntimeError) as error:
        return f"transformers cannot be imported: {error}"
    model = VideoMAEModel(
        VideoMAEConfig(
            image_size=size[1:],
            num_frames=config.frames,
            patch_size=config.video_patch[1:],
            tubelet_size=config.video_patch[0],
            hidden_size=tower.dim,
            num_hidden_layers=tower.depth,
            num_attention_heads=tower.num_heads,
            intermediate_size=tower.mlp_dim,
            hidden_dropout_prob=config.dropout,
            attention_probs_dropout_prob=config.dropout,  # as ours: recipe "paper" has none
            use_mean_pooling=False,
            attn_implementation="sdpa",
        )
    ).to(device)
    # a plain attribute, which .to leaves behind: without this a GPU would wait for its copy from
    # the host in every step
    model.embeddings.position_embeddings = model.embeddings.position_embeddings.to(device)
    return model


def videomae_inputs(
    config: VATTConfig, clip: Tensor, keep: Tensor | None
) -> dict[str, Tensor | None]:
    """What ``videomae``'s tower takes for a batch of ours.

    Our patches and its tokens are both row-major over (time, height, width), so an index of ours is
    one of its own. A loader made for VideoMAE hands over such clips: making them here need not be
    timed, although our own op normalises within its time.

    Args:
        clip: (B, T, H, W, 3) uint8.
        keep: (K,) or (B, K) kept patches; None keeps all.

    Returns:
        pixel_values (B, T, C, H, W) fp32 in [-1, 1], and bool_masked_pos (B, N), True where
        dropped, or None.
    """
    dropped = None
    if keep is not None:
        shape = (clip.shape[0], config.num_video_patches)
        dropped = torch.ones(shape, dtype=torch.bool, device=clip.device)
        dropped.scatter_(1, keep.to(clip.device).long().expand(clip.shape[0], -1), False)
    return {
        "pixel_values": clip.permute(0, 1, 4, 2, 3).contiguous() * (2 / 255) - 1,
        "bool_masked_pos": dropped,
    }


def videomae_features(tower: nn.Module, inputs: dict[str, Tensor | None]) -> Tensor:
    """(B, dim): the mean over the tokens that were kept."""
    return tower(**inputs).last_hidden_state.mean(1)
