"""The ``paper`` recipe once more, as naively as possible, in NumPy fp64.

One clip, one token, one head, one pair at a time.
"""

import math

import numpy as np


def layer_norm(x, w, prefix):
    return (x - x.mean()) / math.sqrt(x.var() + 1e-6) * w[f"{prefix}.weight"] + w[f"{prefix}.bias"]


def rms_norm(x, w, prefix):
    return x / math.sqrt((x * x).mean() + 1e-6) * w[f"{prefix}.weight"]


def gelu(x):
    return np.array([value / 2 * (1 + math.erf(value / math.sqrt(2))) for value in x])


def dense(x, w, prefix):
    return w[f"{prefix}.weight"] @ x + w.get(f"{prefix}.bias", 0.0)


def video_rows(clip, patch):
    """Patches in (t, h, w) order, values in (t, h, w, c) order; uint8 to [-1, 1]."""
    frames, rows, columns = patch
    for t in range(0, clip.shape[0], frames):
        for y in range(0, clip.shape[1], rows):
            for x in range(0, clip.shape[2], columns):
                yield clip[t : t + frames, y : y + rows, x : x + columns].reshape(-1) / 127.5 - 1


def video_positions(w, prefix, grid):
    for t in range(grid[0]):
        for y in range(grid[1]):
            for x in range(grid[2]):
                tables = [
                    w[f"{prefix}.position.tables.{axis}"][at] for axis, at in enumerate((t, y, x))
                ]
                yield layer_norm(sum(tables), w, f"{prefix}.position.norm")


def encoder(tokens, w, prefix, tower, attended, t5):
    """tokens: list of vectors; attended: which of them are keys. Returns the pooled vector."""
    norm = rms_norm if t5 else layer_norm
    for layer in range(tower.depth):
        at = f"{prefix}.blocks.{layer}"
        packed = [dense(norm(x, w, f"{at}.attention_norm"), w, f"{at}.qkv") for x in tokens]
        qkv = [p.reshape(3, tower.num_heads, tower.head_dim) for p in packed]
        updated = []
        for i, x in enumerate(tokens):
            heads = []
            for h in range(tower.num_heads):
                weights = []
                for j in range(len(tokens)):
                    score = qkv[i][0, h] @ qkv[j][1, h]
                    score = (
                        score + w[f"{prefix}.relative_bias"][bucket(i - j), h]
                        if t5
                        else score / math.sqrt(tower.head_dim)
                    )
                    weights.append(math.exp(score) if attended[j] else 0.0)
                heads.append(sum(p * qkv[j][2, h] for j, p in enumerate(weights)) / sum(weights))
            updated.append(x + dense(np.concatenate(heads), w, f"{at}.out"))
        tokens = [
            x
            + dense(
                gelu(dense(layer_norm(x, w, f"{at}.mlp_norm"), w, f"{at}.mlp_in")),
                w,
                f"{at}.mlp_out",
            )
            for x in updated
        ]
    return norm(tokens[0], w, f"{prefix}.norm")


def bucket(n):
    base, n = (16 if n < 0 else 0), abs(n)
    return base + (n if n < 8 else min(15, 8 + int(math.log(n / 8) / math.log(8) * 8)))


def pooled_video(clip, w, config, keep):
    rows = list(video_rows(clip.astype(np.float64), config.video_patch))
    positions = list(video_positions(w, "video_tokens", config.video_grid))
    tokens = [dense(rows[n], w, "video_tokens.project") + positions[n] for n in keep]
    tokens = [w["video_tokens.agg"], *tokens]
    return encoder(tokens, w, "video_encoder", config.video, [True] * len(tokens), t5=False)


def pooled_audio(wave, w, config, keep):
    size = config.audio_patch
    tokens = [w["audio_tokens.agg"]]
    for n in keep:
        position = layer_norm(
            w["audio_tokens.position.tables.0"][n], w, "audio_tokens.position.norm"
        )
        tokens.append(dense(wave[n * size : (n + 1) * size], w, "audio_tokens.project") + position)
    return encoder(tokens, w, "audio_encoder", config.audio, [True] * len(tokens), t5=False)


def pooled_text(ids, w, config):
    tokens = [w["text_tokens.agg"], *(w["text_tokens.table.weight"][i] for i in ids)]
    return encoder(tokens, w, "text_encoder", config.text, [True, *(i != 0 for i in ids)], t5=True)


def batch_norm(rows, w, prefix, valid):
    used = np.stack([row for row, ok in zip(rows, valid, strict=True) if ok])
    return [
        (row - used.mean(0)) / np.sqrt(used.var(0) + 1e-5) * w[f"{prefix}.weight"]
        + w[f"{prefix}.bias"]
        for row in rows
    ]


def unit(z):
    return z / math.sqrt(z @ z)


def nce(x, y, valid, y_valid, temperature):
    """Mean over valid clips of -log(positives / (positives + pairs of its row and column)).

    Positives count once.
    """
    losses = []
    for i in range(len(x)):
        if not (valid[i] and any(y_valid[i])):
            continue
        positives = sum(
            math.exp(x[i] @ t / temperature) for t, ok in zip(y[i], y_valid[i], strict=True) if ok
        )
        negatives = 0.0
        for j in range(len(x)):
            if j == i:
                continue
            negatives += sum(
                math.exp(x[i] @ t / temperature)
                for t, ok in zip(y[j], y_valid[j], strict=True)
                if ok
            )
            if valid[j]:
                negatives += sum(
                    math.exp(x[j] @ t / temperature)
                    for t, ok in zip(y[i], y_valid[i], strict=True)
                    if ok
                )
        losses.append(-math.log(positives / (positives + negatives)))
    return sum(losses) / len(losses)


def loss(
    w, config, video, audio, text, video_keep, audio_keep, video_valid, audio_valid, text_valid
):
    """Total loss of a batch; w: state dict of fp64 arrays."""
    clips, space = range(len(video)), "common_space"
    hidden = [
        dense(pooled_video(video[b], w, config, video_keep), w, f"{space}.video_hidden")
        for b in clips
    ]
    hidden = [
        np.maximum(h, 0) for h in batch_norm(hidden, w, f"{space}.video_hidden_norm", video_valid)
    ]
    va = batch_norm(
        [dense(h, w, f"{space}.video_va") for h in hidden], w, f"{space}.video_va_norm", video_valid
    )
    vt = batch_norm(
        [dense(z, w, f"{space}.video_vt") for z in va], w, f"{space}.video_vt_norm", video_valid
    )
    sound = [
        dense(pooled_audio(audio[b], w, config, audio_keep), w, f"{space}.audio_va") for b in clips
    ]
    sound = batch_norm(sound, w, f"{space}.audio_va_norm", audio_valid)
    flat = [
        dense(pooled_text(ids, w, config), w, f"{space}.text_vt") for b in clips for ids in text[b]
    ]
    flat = batch_norm(flat, w, f"{space}.text_vt_norm", text_valid.reshape(-1))
    per_clip = text.shape[1]
    words = [[unit(z) for z in flat[b * per_clip : (b + 1) * per_clip]] for b in clips]
    va, vt, sound = ([unit(z) for z in rows] for rows in (va, vt, sound))
    l_va = nce(va, [[z] for z in sound], video_valid, audio_valid[:, None], config.temperature)
    l_vt = nce(vt, words, video_valid, text_valid, config.temperature)
    return l_va + config.vt_weight * l_vt
