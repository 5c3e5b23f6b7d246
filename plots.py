"""The figures that the scripts write, each from numbers that lie in the run's folder too."""
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from byol import denormalize
from runs import whole_file

BLUE, ORANGE, GRAY = "#0072b2", "#d55e00", "#666666"  # told apart by colour-blind readers too (Okabe & Ito)


def save_figure(figure: Figure, path: Path) -> None:
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=150)


def plot_views(path: Path, images: Tensor, view1: Tensor, view2: Tensor) -> None:
    """A dozen images, uint8 [N,3,H,W], each above the two views [N,3,S,S] that the networks get of it."""
    figure = Figure(figsize=(0.7 * len(images) + 0.5, 2.4), layout="constrained")
    axes = figure.subplots(3, len(images), squeeze=False)
    for row, (name, batch) in enumerate([("image", images), ("view 1", view1), ("view 2", view2)]):
        batch = batch.float().cpu()
        if row == 0:
            batch = batch / 255
        else:
            batch = denormalize(batch)
        for axis, image in zip(axes[row], batch.permute(0, 2, 3, 1).clamp(0, 1).numpy()):
            axis.imshow(image)
            axis.set(xticks=[], yticks=[])
        axes[row, 0].set_ylabel(name)
    save_figure(figure, path)


def plot_curves(path: Path, rows: list[dict[str, str]], c: SimpleNamespace) -> None:
    """Loss, spread of the embeddings and kNN accuracy against epochs, from the rows of metrics.csv."""
    def column(name):
        return np.array([float(row[name] or "nan") for row in rows])

    epoch = column("epoch")
    panels = [("loss", "loss (0 to 8)"), ("spread", "spread of the embeddings"), ("knn", "kNN accuracy (%)")]
    panels = [panel for panel in panels if not np.isnan(column(panel[0])).all()]
    figure = Figure(figsize=(3.2 * len(panels), 2.9), layout="constrained")
    for axis, (name, label) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels):
        known = ~np.isnan(column(name))
        axis.plot(epoch[known], column(name)[known], color=BLUE, marker="o" if known.sum() < 30 else None, ms=3)
        axis.set(xlabel="epoch", ylabel=label)
        axis.spines[["top", "right"]].set_visible(False)
        if name == "spread":
            healthy = c.PROJECTION_DIM ** -0.5
            axis.axhline(healthy, color=GRAY, ls="--", lw=1)
            axis.annotate("fills the sphere", (0.98, healthy), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                          color=GRAY, fontsize=8)
            axis.set_ylim(0, healthy * 1.15)
    figure.suptitle(f"{c.RUN}: {c.ENCODER} from {c.INIT} weights, {c.DATASET} at {c.IMAGE_SIZE} px, batch {c.BATCH_SIZE}, "
                    f"seed {c.SEED}", fontsize=9)
    save_figure(figure, path)


def plot_comparison(path: Path, table: dict[str, dict[str, list[float]]], caption: str) -> None:
    """Bars of accuracy for each protocol and arm: mean over the seeds, with the std as error bar.

    table: protocol -> arm -> accuracies in percent, one a seed.
    """
    arms = list(next(iter(table.values())))
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(arms)
    for i, (arm, color) in enumerate(zip(arms, (GRAY, BLUE, ORANGE))):
        mean = [np.mean(table[protocol][arm]) for protocol in table]
        std = [np.std(table[protocol][arm], ddof=1) if len(table[protocol][arm]) > 1 else 0 for protocol in table]
        x = np.arange(len(table)) + (i - (len(arms) - 1) / 2) * width
        axis.bar(x, mean, width * 0.95, yerr=std, capsize=3, color=color, label=arm)
        for at, height, error in zip(x, mean, std):
            axis.annotate(f"{height:.1f}", (at, height + error), ha="center", va="bottom", xytext=(0, 2),
                          textcoords="offset points", fontsize=9)
    axis.set_xticks(np.arange(len(table)), list(table))
    axis.set_ylabel("test accuracy (%)")
    axis.set_ylim(0, axis.get_ylim()[1] * 1.1)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, ncols=len(arms), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.supxlabel(caption, fontsize=8, color=GRAY)
    save_figure(figure, path)
