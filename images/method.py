"""Draw images/method.png, the README's picture of BYOL: `python images/method.py` from the repository's root."""
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import load_split  # noqa: E402
from plots import BLUE, GRAY, ORANGE  # noqa: E402
from views import denormalize, two_views  # noqa: E402

INK = "#222222"


def main(path: Path = ROOT / "images" / "method.png") -> None:
    figure = Figure(figsize=(10, 3.9))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, 20), ylim=(0, 7.8))
    axis.axis("off")

    image = load_split("patterns", "unlabeled", "", 96).pixels[3:4]
    views = two_views(image, 96, torch.Generator().manual_seed(5))
    pictures = [image[0] / 255] + [denormalize(view)[0].clamp(0, 1) for view in views]
    for picture, (x, y), name in zip(pictures, [(0.4, 2.9), (4.0, 4.9), (4.0, 0.9)], ["image x", "view 1", "view 2"]):
        inset = axis.inset_axes((x, y, 2, 2), transform=axis.transData)
        inset.imshow(picture.permute(1, 2, 0).numpy())
        inset.axis("off")
        axis.text(x + 1, y - 0.35, name, ha="center", va="center", color=INK, fontsize=11)

    def box(x, y, text, color):
        axis.text(x, y, text, ha="center", va="center", fontsize=11, color="white",
                  bbox=dict(boxstyle="round,pad=0.55", fc=color, ec="none"))

    def arrow(start, end, color=INK, style="-", width=1.4):
        axis.annotate("", end, start, arrowprops=dict(arrowstyle="-|>", color=color, lw=width, ls=style))

    for y in (5.9, 1.9):
        arrow((2.5, 3.9), (3.95, y))
        arrow((6.1, y), (7.0, y))
    for y, color, names in ((5.9, BLUE, ["encoder $f_\\theta$", "projector $g_\\theta$", "predictor $q_\\theta$"]),
                            (1.9, GRAY, ["encoder $f_\\xi$", "projector $g_\\xi$"])):
        for x, name in zip((8.2, 11.5, 14.8), names):
            box(x, y, name, color)
            if x > 9:
                arrow((x - 1.95, y), (x - 1.3, y))
    axis.text(7.0, 7.2, "online network: trained by the optimizer", color=BLUE, fontsize=11)
    axis.text(7.0, 0.6, "target network: a slow average of the online one, no gradient", color=GRAY, fontsize=11)
    for x in (8.2, 11.5):
        arrow((x, 5.2), (x, 2.6), GRAY, "--")
    axis.text(9.85, 3.9, "$\\xi \\leftarrow \\tau\\,\\xi + (1 - \\tau)\\,\\theta$", ha="center", va="center", fontsize=12,
              color=INK)
    axis.text(18.2, 3.9, "loss\n$2 - 2\\,\\cos(p, z)$", ha="center", va="center", color="white", fontsize=11,
              bbox=dict(boxstyle="round,pad=0.6", fc=ORANGE, ec="none"))
    arrow((16.15, 5.9), (17.6, 4.75))
    arrow((12.85, 1.9), (17.4, 3.05))
    axis.text(17.15, 5.65, "$p$", fontsize=13, color=INK)
    axis.text(15.4, 2.05, "$z$  (stop gradient)", fontsize=11, color=INK)
    figure.savefig(path, dpi=150)  # not plots.save_figure, which takes formulas for names


if __name__ == "__main__":
    main()
