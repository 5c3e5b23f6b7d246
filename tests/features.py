"""What frozen features are worth on images held out of train/, each fifth in turn: how the recipe's values were chosen.

    python tests/features.py FOLDER IMAGE_SIZE INIT...     INIT: random, or a file such as runs/byol/encoder.pt

Prints for each INIT the accuracy in percent of a linear probe and of kNN at 10, 50 and 400 labels a class, and a rank.
No test image is opened.
"""
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from byol import effective_rank  # noqa: E402
from data import load_split  # noqa: E402
from encoders import build_encoder  # noqa: E402
from evaluate import MONITOR_PENALTY, extract_features, fifths, fit_logistic, knn_predict, linear_probe  # noqa: E402


def score(features: Tensor, labels: Tensor, budget: int) -> tuple[float, float]:
    """Accuracy in percent of probe and kNN, over all images, each held out once from `budget` others of each class.
    The penalty is chosen by cross-validation up to 50 labels, and is the monitor's for more."""
    classes, right = int(labels.max()) + 1, torch.zeros(2)
    for fold, (rest, held_out) in enumerate(fifths(labels, 0)):
        order = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(fold))]
        subset = torch.cat([order[labels[order] == k][:budget] for k in range(classes)])
        bank, known = features[subset], labels[subset]
        probe = (linear_probe(bank, known, classes, 0)[0] if budget <= 50 else
                 fit_logistic(bank, known, classes, MONITOR_PENALTY))
        answers = probe(features[held_out]).argmax(dim=1), knn_predict(bank, known, features[held_out], classes)
        right += torch.tensor([(answer == labels[held_out]).sum() for answer in answers])
    return tuple((100 * right / len(labels)).tolist())


def main() -> None:
    folder, size, *inits = sys.argv[1:]
    pixels, labels, _ = load_split(folder, "train", "data", int(size))
    for init in inits:
        encoder, _ = build_encoder("resnet18", init, seed=0)
        features = extract_features(encoder, pixels, torch.device("cpu"), "fp32")
        probe, knn = zip(*(score(features, labels, budget) for budget in (10, 50, 400)))
        print(f"{init}: probe " + " ".join(f"{x:.1f}" for x in probe) + "  kNN " + " ".join(f"{x:.1f}" for x in knn)
              + f"  rank {effective_rank(features):.1f}", flush=True)


if __name__ == "__main__":
    main()
