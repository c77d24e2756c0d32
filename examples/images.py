"""Images: a small convolutional network in plain PyTorch, made smaller and faster.

python examples/images.py --data FOLDER/mnist-5k --out runs/images
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import pennyweight
from pennyweight.data.dataset import Split
from pennyweight.data.loaders import mnist
from pennyweight.model.train import Fit, Recipe

RECIPE = Recipe(loss="cross-entropy", lr=2e-3, batch=64, epochs=15, patience=15, schedule="cosine", metric="accuracy")
BUDGET = "bytes <= 200kB, accuracy drop <= 0.01"


class Net(nn.Module):
    """Two convolutions with pooling, then two dense layers; nothing here knows of Pennyweight."""

    def __init__(self, channels: int = 32, hidden: int = 128, classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(channels, 2 * channels, 3, padding=1), nn.BatchNorm2d(2 * channels), nn.ReLU(), nn.MaxPool2d(2)),
        )
        dense = (nn.Linear(2 * channels * 7 * 7, hidden), nn.ReLU(), nn.Dropout(0.3), nn.Linear(hidden, classes))
        self.classifier = nn.Sequential(nn.Flatten(), *dense)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores [B, 10] of pixels [B, 784]."""
        scores: Tensor = self.classifier(self.features(x.view(-1, 1, 28, 28)))
        return scores


def trained(data: Split, seed: int = 0) -> tuple[Net, Fit]:
    """The network trained."""
    torch.manual_seed(seed)
    net = Net()
    return net, pennyweight.fit(net, data.train, data.valid, RECIPE, inputs=["x"], seed=seed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of mnist_5k.csv.gz")
    parser.add_argument("--out", type=Path, default=Path("runs/images"), help="folder to write (default: %(default)s)")
    given = parser.parse_args()
    parts = mnist(given.data, given.out / "data")
    net, fit = trained(parts)
    outcome = pennyweight.optimize(net, parts, BUDGET, recipe=RECIPE, trained=fit, out=given.out)
    print(outcome.result.explanation, f"see {given.out}/report.html", sep="\n")
