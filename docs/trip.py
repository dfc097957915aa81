"""Draws docs/trip.png, the trip of a tensor: python docs/trip.py (needs matplotlib)."""

from pathlib import Path

# name: (column, row, what happens, file)
BOXES = {
    "verb": (1, 0, "verb: checks, device, model", "anyup_fast/api.py"),
    "forward": (1, 1, "AnyUp.forward: which path", "anyup_fast/model.py"),
    "guidance": (0, 2, "guidance: 3 encoders over the pixels", "anyup_fast/ops/guidance.py"),
    "unification": (2, 2, "unit length, unification", "anyup_fast/ops/unification.py"),
    "queries": (0, 3, "3x3 convolution, norm, projection", "anyup_fast/ops/queries.py"),
    "keys": (2, 3, "keys merged and projected", "anyup_fast/ops/keys.py"),
    "windows": (0, 5, "windows, integers", "anyup_fast/ops/windows.py"),
    "attention": (1, 5, "attention over each pixel's window", "anyup_fast/ops/attention.py"),
    "output": (1, 6, "output (B, C, H', W'), a view", "anyup_fast/decoder.py"),
}
# from, to, what travels
ARROWS = [
    ("verb", "forward", "image (B, 3, H, W), features (B, C, h, w)"),
    ("forward", "guidance", "image"),
    ("forward", "unification", "features"),
    ("guidance", "queries", "(B, H', W', D) stored"),
    ("guidance", "keys", "image's part (B, h, w, D) float32"),
    ("unification", "keys", "(B, M, h, w) float32"),
    ("queries", "attention", "(B, H', W', 4, d) stored"),
    ("keys", "attention", "(B, h, w, 4, d)"),
    ("windows", "attention", "(H', 2), (W', 2) int32"),
    ("forward", "attention", "features, raw"),
    ("attention", "output", "(B, H', W', C) in the features' dtype"),
]
CHOICE = "anyup_fast/ops/choice.py"
ROOMS = [("kernels/", "Triton"), ("anyup_fast/plain/", "plain PyTorch")]
WIDE, HIGH, COLUMN, ROW = 3.3, 0.62, 4.4, 1.35
CHOOSES = ("guidance", "unification", "queries", "attention")  # boxes whose back end ops/choice.py chooses


def place(name):
    """Centre of a box in the drawing."""
    column, row, *_ = BOXES[name]
    return column * COLUMN, -row * ROW


def draw(path):
    """Write the drawing to `path`."""
    from matplotlib import pyplot
    from matplotlib.patches import FancyBboxPatch

    figure, axes = pyplot.subplots(figsize=(12.5, 9.6))
    for name, (_, _, text, file) in BOXES.items():
        x, y = place(name)
        face = "#dcebf7" if name in CHOOSES else "#f1f1ee"
        corner = x - WIDE / 2, y - HIGH / 2
        style = "round,pad=0.04,rounding_size=0.12"
        axes.add_patch(FancyBboxPatch(corner, WIDE, HIGH, boxstyle=style, facecolor=face, edgecolor="#456", zorder=2))
        axes.text(x, y + 0.11, text, ha="center", va="center", fontsize=11, zorder=3)
        axes.text(x, y - 0.16, file, ha="center", va="center", fontsize=9.5, family="monospace", color="#345", zorder=3)
    for start, end, text in ARROWS:
        (x0, y0), (x1, y1) = place(start), place(end)
        if y0 == y1:
            x0, x1, share = x0 + WIDE / 2 + 0.06, x1 - WIDE / 2 - 0.06, 0.5
        else:
            share = 0.3 if abs(x0 - x1) > COLUMN else 0.5
            y0, y1 = y0 - HIGH / 2 - 0.06, y1 + HIGH / 2 + 0.06
        arrow = dict(arrowstyle="-|>", color="#567", linewidth=1.4)
        axes.annotate("", (x1, y1), (x0, y0), arrowprops=arrow, zorder=1)
        straight = x0 == x1
        x, y = x0 + share * (x1 - x0) + 0.08 * straight, y0 + share * (y1 - y0) + 0.46 * (y0 == y1)
        box = dict(facecolor="white", edgecolor="none", pad=1.0, alpha=0.9)
        align = "left" if straight else "center"
        axes.text(x, y, text, fontsize=9.5, color="#222", zorder=4, ha=align, va="center", bbox=box)
    rooms = ", ".join(f"{folder} ({what})" for folder, what in ROOMS)
    note = f"Blue: {CHOICE} chooses the back end, and the file of the same name computes:\n{rooms}. Grey: one way."
    axes.text(-WIDE / 2, -6.75 * ROW, note, fontsize=10.5, va="center", color="#333")
    axes.set(xlim=(-2.0, 2 * COLUMN + 2.0), ylim=(-7.05 * ROW, 0.6))
    axes.set_axis_off()
    figure.subplots_adjust(0, 0, 1, 1)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    pyplot.close(figure)


if __name__ == "__main__":
    draw(Path(__file__).with_name("trip.png"))
