"""The figures that the scripts write, each from numbers that lie in the run's folder too."""
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from torch import Tensor

from utils import whole_file
from views import denormalize

BLUE, ORANGE, GRAY = "#0072b2", "#d55e00", "#666666"  # Okabe & Ito's, for all eyes
SIDE = 0.86  # of an image among others, which are 1 apart


def save_figure(figure: Figure, path: Path) -> None:
    """Names in it are text, never markup, and no reason to warn where the font lacks their characters."""
    for text in figure.findobj(Text):
        text.set(parse_math=False, text=text.get_text().encode(errors="replace").decode())
    with whole_file(path) as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        figure.savefig(file, format="png", dpi=150)


def plot_views(path: Path, images: Tensor, view1: Tensor, view2: Tensor) -> None:
    """A dozen images, uint8 [N,3,H,W], each above the two views [N,3,S,S] that the networks get of it."""
    figure = Figure(figsize=(0.8 * len(images) + 0.5, 2.5), layout="constrained")
    axis = figure.subplots()  # one for all: 36 take several times as long
    rows = [("image", images / 255), ("view 1", denormalize(view1)), ("view 2", denormalize(view2))]
    for y, (name, batch) in enumerate(rows):
        axis.text(-0.1, y + SIDE / 2, name, ha="right", va="center")
        for x, image in enumerate(batch.clamp(0, 1)):
            place_image(axis, image, x, y)
    axis.set(xlim=(-0.1, len(images)), ylim=(len(rows), -0.1))
    axis.set_axis_off()
    save_figure(figure, path)


def place_image(axis: Axes, image: Tensor, x: float, y: float, **frame) -> None:
    """Show an image [3,H,W] as a square of SIDE with a frame, its upper left corner at (x, y)."""
    axis.imshow(image.permute(1, 2, 0).cpu().numpy(), extent=(x, x + SIDE, y + SIDE, y))
    axis.add_patch(Rectangle((x, y), SIDE, SIDE, fill=False, **frame))


def plot_curves(path: Path, rows: Sequence[dict[str, float]], c: SimpleNamespace) -> None:
    """Loss, spread of the embeddings, rank and held-out accuracy of the features against epochs, from metrics.csv."""
    panels = [("loss (0 to 8)", {"loss": ""}), ("spread of the embeddings", {"spread": ""}),
              ("effective rank of the features", {"rank": ""}),
              ("held-out accuracy (%)", {"probe": "linear probe", "knn": "kNN"})]
    panels = [panel for panel in panels if any(name in row for name in panel[1] for row in rows)] or panels[:1]
    figure = Figure(figsize=(3.2 * len(panels), 2.9), layout="constrained")
    for axis, (ylabel, lines) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels):
        for (name, label), color in zip(lines.items(), (BLUE, ORANGE)):
            known = [row for row in rows if name in row]
            known = known[::1 + len(known) // 2000]  # more points than the figure has pixels take seconds to draw
            axis.plot([row["epoch"] for row in known], [row[name] for row in known], color=color, label=label,
                      marker="o" if len(known) < 30 else None, ms=3)
        axis.set(xlabel="epoch", ylabel=ylabel)
        axis.spines[["top", "right"]].set_visible(False)
        if "rank" in lines:
            axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
        if len(lines) > 1:
            axis.legend(frameon=False, fontsize=8)
        if "spread" in lines:
            healthy = c.PROJECTION_DIM ** -0.5
            axis.axhline(healthy, color=GRAY, ls="--", lw=1)
            axis.annotate("fills the sphere", (0.98, healthy), xycoords=("axes fraction", "data"), ha="right",
                          va="bottom", color=GRAY, fontsize=8)
            axis.set_ylim(0, healthy * 1.15)
    figure.suptitle(f"{c.RUN}: {c.ENCODER} from {Path(c.INIT).name} weights, {Path(c.DATASET).name} at "
                    f"{c.IMAGE_SIZE} px, batch {c.BATCH_SIZE}, seed {c.SEED}", fontsize=9)
    save_figure(figure, path)


def plot_label_efficiency(path: Path, panels: dict[str, dict], labels: Sequence[float], caption: str) -> None:
    """Accuracy against labelled images a class, a panel for each protocol, a line for each arm: mean and std over
    seeds. panels: protocol -> arm -> for each number of labels the accuracies in percent, one a seed."""
    figure = Figure(figsize=(2.5 * len(panels), 3.2), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True)
    for axis, (protocol, by_arm) in zip(axes, panels.items()):
        for (arm, accuracies), color, marker in zip(by_arm.items(), (GRAY, BLUE), "os"):
            mean, std = zip(*((np.mean(x), np.std(x, ddof=1) if len(x) > 1 else 0.0) for x in accuracies))
            axis.errorbar(labels, mean, std, color=color, marker=marker, ms=5, capsize=3, label=arm)
        axis.set(xscale="log", xlabel="labelled images a class", title=protocol, xmargin=0.15)
        axis.set_xticks(labels, [f"{value:g}" for value in labels])
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("test accuracy (%)")
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, ncols=4, loc="outside upper center")
    figure.supxlabel(caption, fontsize=8, color=GRAY)
    save_figure(figure, path)


def plot_neighbors(path: Path, pixels: Tensor, labels: Tensor, classes: Sequence[str], features: dict[str, Tensor],
                   generator: torch.Generator, run: str, queries: int = 6, neighbors: int = 5) -> None:
    """Images of different classes, each beside the images most similar (cosine) to it in each arm's features. pixels:
    uint8 [N,3,S,S], with labels [N]. features: of each arm, those of the images, [N,D]."""
    present = labels.unique()
    shown = present[torch.randperm(len(present), generator=generator)[:queries]].sort().values
    chosen = [torch.nonzero(labels == k)[0].item() for k in shown]
    figure = Figure(figsize=(7.2, 0.62 * len(chosen) + 0.6), layout="constrained")
    axis = figure.subplots()
    axis.text(SIDE / 2, -0.15, "query", ha="center")
    for y, query in enumerate(chosen):
        place_image(axis, pixels[query], 0, y, linewidth=0)
        axis.text(-0.1, y + SIDE / 2, classes[labels[query]], ha="right", va="center")
    for i, (arm, values) in enumerate(features.items()):
        left = 1.3 + i * (neighbors + 0.3)
        axis.text(left + neighbors / 2, -0.15, f"nearest, {arm}", ha="center")
        for y, query in enumerate(chosen):
            similarity = F.cosine_similarity(values, values[query:query + 1])
            similarity[query] = -2  # not its own neighbour
            for rank, index in enumerate(similarity.topk(min(neighbors, len(values) - 1)).indices.tolist()):
                color, style = (BLUE, "-") if labels[index] == labels[query] else (ORANGE, ":")
                place_image(axis, pixels[index], left + rank, y, linewidth=2.5, color=color, ls=style)
    axis.set(xlim=(-0.15, left + neighbors), ylim=(len(chosen), -0.1))
    axis.set_axis_off()
    figure.supxlabel(f"{run}: test images by cosine similarity of frozen features; solid blue: the query's class,\n"
                     "dotted orange: another", fontsize=8, color=GRAY)
    save_figure(figure, path)
