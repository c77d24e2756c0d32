"""Text: a convolutional network over word vectors learned here (Kim 2014), mostly a table, made smaller and faster.

python examples/text.py --data FOLDER/movie-review --out runs/text
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import pennyweight
from pennyweight.data.dataset import Split
from pennyweight.data.loaders import LOADERS
from pennyweight.model.train import Fit, Recipe

RECIPE = Recipe(lr=1e-3, batch=64, epochs=10, patience=2, lr_decay=0.3, metric="accuracy")
BUDGET = "bytes <= 0.1x, accuracy drop <= 0.01"


class Net(nn.Module):
    """Windows of 3, 4 and 5 words, the largest answer of each filter; nothing here knows of Pennyweight."""

    def __init__(self, words: int, dim: int = 128, filters: int = 100) -> None:
        super().__init__()
        self.words = nn.Embedding(words, dim, padding_idx=0)
        nn.init.uniform_(self.words.weight, -0.25, 0.25)
        self.convs = nn.ModuleList(nn.Conv1d(dim, filters, size) for size in (3, 4, 5))
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(3 * filters, 1)

    def forward(self, text: Tensor) -> Tensor:
        """Logits [B, 1] of word ids [B, L]."""
        vectors = self.words(text).transpose(1, 2)
        found = [conv(vectors).relu().amax(2) for conv in self.convs]
        logits: Tensor = self.head(self.drop(torch.cat(found, 1)))
        return logits


def trained(data: Split, seed: int = 0) -> tuple[Net, Fit]:
    """The network trained."""
    torch.manual_seed(seed)
    net = Net(data.train.schema["text"].size)
    return net, pennyweight.fit(net, data.train, data.valid, RECIPE, inputs=["text"], seed=seed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of movie-review or sms-spam")
    parser.add_argument("--out", type=Path, default=Path("runs/text"), help="folder to write (default: %(default)s)")
    given = parser.parse_args()
    parts = LOADERS[given.data.name](given.data, given.out / "data")
    net, fit = trained(parts)
    outcome = pennyweight.optimize(net, parts, BUDGET, recipe=RECIPE, trained=fit, out=given.out)
    print(outcome.result.explanation, f"see {given.out}/report.html", sep="\n")
