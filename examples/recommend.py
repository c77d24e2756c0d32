"""The recommender: the shipped MovieLens sample from ratings to a smaller, proven, answering bundle.

python examples/recommend.py --out runs/demo
"""

import argparse
from pathlib import Path

from pennyweight.demo import BUDGET, ask, demo

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder to write (default: %(default)s)")
    parser.add_argument("--budget", default=BUDGET, help="what may be spent and lost (default: %(default)s)")
    given = parser.parse_args()
    outcome = demo(given.out, budget=given.budget, tell=print)
    print(outcome.result.explanation, ask(given.out), f"see {given.out}/report.html", sep="\n")
