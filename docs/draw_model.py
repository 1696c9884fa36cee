"""Draw the picture of the model that the README shows.

python docs/draw_model.py            # writes docs/figures/model.png; needs matplotlib
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

INK, PALE, EDGE = "#1f2937", "#f3f4f6", "#9ca3af"
OURS, OURS_EDGE = "#cfe3fb", "#2563a8"
SPACE, SPACE_EDGE = "#fdf6e3", "#c9a227"

# centres of the three rows, and left edge and width of the columns
ROWS = {"audio": 44.5, "video": 26.5, "text": 8.5}
INPUT, DROP, EMBED, ENCODER = (1, 13), (16.5, 12.5), (31.5, 12.5), (46.5, 17)
SPACES, LOSS = (67, 13), (84, 15)
HEIGHT = 12


def box(axes, x, y, width, height, *, fill=PALE, edge=EDGE, line=1.0):
    """A rounded box with its centre line at y."""
    shape = FancyBboxPatch(
        (x, y - height / 2),
        width,
        height,
        boxstyle="round,pad=0,rounding_size=1",
        facecolor=fill,
        edgecolor=edge,
        linewidth=line,
    )
    axes.add_patch(shape)


def write(axes, x, y, text, *, size=8.5, bold=False, mono=False, colour=INK):
    axes.text(
        x,
        y,
        text,
        ha="center",
        va="center",
        fontsize=size,
        color=colour,
        fontweight="bold" if bold else "normal",
        family="DejaVu Sans Mono" if mono else "DejaVu Sans",
        linespacing=1.35,
    )


def arrow(axes, start, end):
    style = dict(arrowstyle="-|>", color=INK, linewidth=1.1, shrinkA=0, shrinkB=0)
    axes.annotate("", end, start, arrowprops=style)


def titled(axes, column, y, title, below, *, ours=False, height=HEIGHT):
    """A box of one column: its title, and under it what it does."""
    x, width = column
    fill, edge = (OURS, OURS_EDGE) if ours else (PALE, EDGE)
    box(axes, x, y, width, height, fill=fill, edge=edge, line=1.6 if ours else 1.0)
    centre = x + width / 2
    lines = below.count("\n") + 1
    write(axes, centre, y + 1.3 * lines, title, bold=True, mono=ours)
    write(axes, centre, y - 1.5, below, size=7.5)


def tower(axes, y, blocks):
    """The encoder of one modality: attention and MLP."""
    x, width = ENCODER
    box(axes, x, y, width, HEIGHT)
    write(axes, x + width / 2, y + 4, f"Transformer, {blocks} blocks", size=7.5, bold=True)
    box(axes, x + 1.2, y - 1.7, 9.4, 5.6, fill=OURS, edge=OURS_EDGE, line=1.6)
    write(axes, x + 5.9, y - 1.7, "attention", mono=True, bold=True)
    box(axes, x + 11.6, y - 1.7, 4.2, 5.6, fill="white")
    write(axes, x + 13.7, y - 1.7, "MLP", size=7.5)


def draw(axes) -> None:
    inputs = {
        "audio": ("Audio", "waveform\n153600 samples"),
        "video": ("Video", "32 frames\n224 x 224, uint8"),
        "text": ("Text", "5 sentences\nof 16 words"),
    }
    for name, y in ROWS.items():
        titled(axes, INPUT, y, *inputs[name])
        tower(axes, y, 6 if name == "text" else 12)
        arrow(axes, (EMBED[0] + EMBED[1], y), (ENCODER[0], y))
        arrow(axes, (ENCODER[0] + ENCODER[1], y), (SPACES[0] + 1.2, y))
    for name, kept in (("audio", "600 of 1200"), ("video", "784 of 1568")):
        y = ROWS[name]
        titled(axes, DROP, y, "drop_token", f"DropToken keeps\n{kept}", ours=True)
        titled(axes, EMBED, y, "patch_embed", "kept patches to\ntokens, AGG first", ours=True)
        arrow(axes, (INPUT[0] + INPUT[1], y), (DROP[0], y))
        arrow(axes, (DROP[0] + DROP[1], y), (EMBED[0], y))
    y = ROWS["text"]
    titled(axes, EMBED, y, "Word table", "words to tokens,\nAGG first")
    arrow(axes, (INPUT[0] + INPUT[1], y), (EMBED[0], y))

    spaces(axes)
    legend(axes)


def spaces(axes) -> None:
    """The two common spaces, how video reaches both, and their losses."""
    x, width = SPACES
    centre, video = x + width / 2, ROWS["video"]
    vectors = {
        "S_va": {"z_audio_va": ROWS["audio"], "z_video_va": video},
        "S_vt": {"z_video_vt": video - 8, "z_text_vt": ROWS["text"]},
    }
    for (space, places), loss in zip(vectors.items(), ("NCE", "MIL-NCE"), strict=True):
        top, bottom = max(places.values()), min(places.values())
        middle = (top + bottom) / 2
        box(axes, x, middle, width, top - bottom + 6.4, fill=SPACE, edge=SPACE_EDGE)
        write(axes, centre, middle, f"common space\n{space}", size=7.8, bold=True)
        for name, y in places.items():
            box(axes, x + 1.2, y, width - 2.4, 4, fill="white", edge=SPACE_EDGE)
            write(axes, centre, y, name, size=7.3, mono=True)
        at = ROWS["audio"] - 9 if space == "S_va" else ROWS["text"] + 5
        other = "audio" if space == "S_va" else "text"
        titled(axes, LOSS, at, "contrastive_lse", f"{loss}\nof video and {other}", ours=True)
        arrow(axes, (x + width, at), (LOSS[0], at))
    arrow(axes, (centre, video - 2), (centre, video - 6))
    write(
        axes, LOSS[0] + LOSS[1] / 2, (ROWS["audio"] + ROWS["text"]) / 2 - 2, "+", size=11, bold=True
    )


def legend(axes) -> None:
    y = 54
    for x, fill, edge, text in (
        (1, OURS, OURS_EDGE, "our kernels: Triton (GPU), Pallas (TPU), C++ (CPU)"),
        (50, PALE, EDGE, "plain torch or JAX"),
        (72, SPACE, SPACE_EDGE, "common spaces"),
    ):
        box(axes, x, y, 2.4, 2.4, fill=fill, edge=edge, line=1.4)
        axes.text(x + 3.6, y, text, ha="left", va="center", fontsize=8, color=INK)


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "figures/model.png")
    figure = plt.figure(figsize=(9, 5), dpi=200, facecolor="white")
    axes = figure.add_axes((0.005, 0.005, 0.99, 0.99))
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 57)
    axes.axis("off")
    draw(axes)
    figure.savefig(out, facecolor="white")
    print(out)


if __name__ == "__main__":
    main()
