"""The page where one draws a digit or picks films, and exported bundles answer inside the browser.

python examples/browser/build.py --recommender runs/demo/best
python -m http.server --directory examples/browser/site

``site/`` is whole: the page, two bundles exported to ONNX, ONNX Runtime for browsers, and ``catalog.json`` with what makes
numbers of a drawing or of a choice. Any web server can hand it out, and it asks nothing of any other. A service that is
asked at each stroke would be the alternative; here what one draws and likes stays on the device, for 14 MB (the runtime,
4 MB compressed) that a browser loads once.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.resources
import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from pennyweight import Env, fit, plan
from pennyweight.compress.quantize import QuantizeDense
from pennyweight.core.config import encode
from pennyweight.core.errors import ConfigError, DeviceError, PennyweightError, StorageError
from pennyweight.data.arrays import Pairs
from pennyweight.data.catalog import Catalog
from pennyweight.data.dataset import Split
from pennyweight.data.loaders import mnist
from pennyweight.export import Export, export
from pennyweight.model import graph
from pennyweight.model.bundle import Bundle, load, swap
from pennyweight.model.train import Recipe, scores

HERE = Path(__file__).parent
RUNTIME = {"ort.wasm.bundle.min.mjs": "ort.js", "ort-wasm-simd-threaded.wasm": "ort.wasm"}
"""Files of onnxruntime-web and their names here: every web server knows what a ``.js`` is, and not every one an ``.mjs``."""
RECIPE = Recipe(loss="cross-entropy", lr=3e-3, batch=64, epochs=20, patience=20, schedule="cosine", metric="accuracy")


@dataclasses.dataclass(frozen=True)
class Preparation:
    """How a drawing becomes the model's input: as the pictures it learned from were made."""

    side: int
    """Cells of a picture, each way."""
    width: float
    """Cells the ink fills at most, across."""
    height: float
    """And down."""
    keep: bool
    """Keep the drawing's proportions; else each way is stretched to fill."""
    centre: Literal["box", "mass"]
    """What lies in the middle: that of the ink's box, or its centre of mass."""
    pen: float
    """Width of the pen, in cells."""
    ink: float = 0.0
    """Cells of ink in all, which the pen is then made to give; 0 leaves the pen as it is."""


PREPARATIONS = (
    # NIST's form-based preprocessing: stretched to 20 x 32 of 32 x 32, thinned or thickened to much the same ink, then counted
    # in 4 x 4 blocks. Measured on the 1,797 pictures: every one fills all 8 rows and 19.5 of the 64 cells.
    Preparation(side=8, width=5, height=8, keep=False, centre="box", pen=1.6, ink=19.5),
    # LeCun et al. 1998: fitted into 20 x 20 with its proportions kept, its centre of mass in the middle of 28 x 28.
    Preparation(side=28, width=20, height=20, keep=True, centre="mass", pen=2.4),
)


def digits(folder: Path | None = None, seed: int = 0) -> tuple[Bundle, str]:
    """A small classifier in int8, trained here on scikit-learn's 8 x 8 digits, or on the MNIST file in a folder.

    Returns the bundle and a line that says how good it is.
    """
    with tempfile.TemporaryDirectory() as scratch:
        parts = mnist(folder, Path(scratch) / "mnist") if folder else _small(seed)
        pixels = parts.train.column("x").shape[1]
        torch.manual_seed(seed)
        net = _network(math.isqrt(pixels))
        fit(net, parts.train, parts.valid, RECIPE, inputs=["x"], seed=seed)
        bundle = Bundle(graph.of(net.eval(), [torch.zeros(2, pixels)], ["x"]))
        smaller = plan(QuantizeDense("int8")).apply(bundle, Env())
        right, now = (_accuracy(b, parts) for b in (bundle, smaller))
    rows = f"{len(parts.test):,} digits it has not seen"
    return smaller, f"digits: {now:.1%} of {rows} ({right:.1%} before int8), {bundle.bytes:,} -> {smaller.bytes:,} bytes"


def _network(side: int) -> nn.Sequential:
    """Two convolutions and a dense layer: on drawings they forgive more than dense layers alone."""
    convolutions = nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
    return nn.Sequential(
        nn.Unflatten(1, (1, side, side)), *convolutions, nn.Flatten(), nn.Dropout(0.3), nn.Linear(8 * side * side, 10)
    )


def _small(seed: int) -> Split:
    """scikit-learn's digits in three parts, 70, 10 and 20 of a hundred."""
    x, y = load_digits(return_X_y=True)
    pairs = Pairs.of(((x / 16).astype(np.float32), y))
    return pairs.dataset(classes=10).split("random", (0.7, 0.1, 0.2), seed)


def _accuracy(bundle: Bundle, parts: Split) -> float:
    found = scores(bundle.model.build(), parts.test, inputs=bundle.model.spec.inputs).argmax(1)
    return float((found == parts.test.column("label")).mean())


def site(out: Path, digit: Bundle, recommender: Bundle, runtime: Path, *, allow: Sequence[str] = ()) -> int:
    """Write the whole page into a folder, in one step, and say its bytes.

    Args:
        out: the folder; one that is there must be an older site.
        digit: a classifier of 8 x 8 or 28 x 28 pixels into ten classes.
        recommender: a bundle with items and a history.
        runtime: the folder of onnxruntime-web's files.
        allow: factories outside Pennyweight that may be imported.

    Raises:
        ConfigError: a bundle is not of its kind.
        DeviceError: a bundle cannot leave as ONNX.
        StorageError: the folder cannot be written, or holds something else.
    """
    if out.exists() and not (out / "catalog.json").is_file():
        raise StorageError(f"{out} exists and is not a site; name another folder or remove it first")
    items = _catalog(recommender)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        folder = Path(scratch) / "site"
        folder.mkdir()
        seen = _left(digit, "digit", folder, allow)
        films = _left(recommender, "films", folder, allow)
        said = {"digit": _digit(seen), "films": {**films, **_films(items)}, "runtime": _runtime(runtime, folder)}
        (folder / "catalog.json").write_text(json.dumps(said, ensure_ascii=False, separators=(",", ":")))
        _page(folder)
        folder.chmod(0o755)
        size = sum(file.stat().st_size for file in folder.iterdir())
        swap(folder, out)
    return size


def _left(bundle: Bundle, name: str, folder: Path, allow: Sequence[str]) -> dict[str, Any]:
    """A bundle's graphs, copied into the site, and what each takes and gives."""
    with tempfile.TemporaryDirectory() as scratch:
        made = export(bundle, Path(scratch) / "export", ["onnx"], allow=allow, seconds=0.1)
        if made.failed:
            raise DeviceError("; ".join(map(str, made.failed)))
        for part in made.parts:
            shutil.copyfile(Path(scratch) / "export" / f"{part.name}.onnx", folder / f"{name}-{part.name}.onnx")
    return {"graphs": {part.name: _graph(made, part.name, f"{name}-{part.name}.onnx") for part in made.parts}}


def _graph(made: Export, name: str, file: str) -> dict[str, Any]:
    part = next(p for p in made.parts if p.name == name)
    size = next(w.bytes for w in made.written if w.graph == name)
    return {"file": file, "bytes": size, "inputs": [encode(i) for i in part.inputs], "outputs": part.outputs}


def _digit(seen: dict[str, Any]) -> dict[str, Any]:
    inputs = seen["graphs"]["model"]["inputs"]
    pixels = math.prod(inputs[0]["shape"][1:])
    for preparation in PREPARATIONS:
        if len(inputs) == 1 and pixels == preparation.side**2:
            return {**seen, "preparation": encode(preparation)}
    sides = " or ".join(f"{p.side} x {p.side}" for p in PREPARATIONS)
    taken = ", ".join(f"{i['name']} [{', '.join(map(str, i['shape']))}]" for i in inputs)
    raise ConfigError(f"the digit classifier takes {taken}; one input of {sides} pixels is needed")


def _catalog(recommender: Bundle) -> Catalog:
    held = recommender.catalog
    if held is None or held.items is None:
        raise ConfigError("the recommender has no catalogue of items to choose from; train it on a dataset with items")
    if held.schema.history is None:
        raise ConfigError("the recommender reads no history, so what one picks would change nothing; train it with a history")
    return held


def _films(held: Catalog) -> dict[str, Any]:
    """Films a list a column, in the order of their ids, and the columns of whoever asks."""
    assert held.items is not None, "a site has made sure of it"
    ids, items, history = held.item_ids, held.items, held.schema.history
    shown = {n: items[n].to_list() if n in items.columns else [None] * len(ids) for n in ("title", "year", "genres")}
    features = {n: array[ids].tolist() for n, array in held.features.items()}
    asker = [{**encode(c), "history": c == history} for c in held.schema.role("user", "context")]
    return {
        "items": {"id": ids.tolist(), **shown, "popularity": held.popularity[ids].tolist(), "features": features},
        "asker": asker,
    }


def _runtime(runtime: Path, folder: Path) -> dict[str, Any]:
    for name, here in RUNTIME.items():
        shutil.copyfile(runtime / "dist" / name, folder / here)
    version = json.loads((runtime / "package.json").read_text())["version"]
    return {"version": version, "bytes": (folder / "ort.wasm").stat().st_size}


def _page(folder: Path) -> None:
    """The page's own files, and the service's style and mark, which it shares."""
    for file in (HERE / "page").iterdir():
        shutil.copyfile(file, folder / file.name)
    family = importlib.resources.files("pennyweight.serve") / "page"
    for name, here in {"style.css": "family.css", "icon.svg": "icon.svg"}.items():
        (folder / here).write_bytes((family / name).read_bytes())


def runtime() -> Path:
    """The folder of onnxruntime-web in the version of ``package.json``, installed by npm where it is missing.

    Raises:
        DeviceError: npm is missing or failed.
    """
    folder = HERE / "node_modules" / "onnxruntime-web"
    wanted = json.loads((HERE / "package.json").read_text())["dependencies"]["onnxruntime-web"]
    if (folder / "package.json").is_file() and json.loads((folder / "package.json").read_text())["version"] == wanted:
        return folder
    npm = shutil.which("npm")
    if npm is None:
        raise DeviceError("npm is missing, which brings onnxruntime-web; on Debian: apt-get install npm")
    done = subprocess.run([npm, "ci", "--no-update-notifier"], cwd=HERE, capture_output=True, text=True)
    if done.returncode:
        raise DeviceError(f"npm could not install onnxruntime-web {wanted}: {' '.join(done.stderr.split())[:300]}")
    return folder


def main() -> None:
    """Build the site."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--recommender", type=Path, default=Path("runs/demo/best"), help="bundle (default: %(default)s, of make demo)"
    )
    parser.add_argument("--digits", type=Path, help="bundle of a digit classifier; one is trained here by default")
    parser.add_argument(
        "--mnist", type=Path, help="folder of mnist_5k.csv.gz to train that on; scikit-learn's digits by default"
    )
    parser.add_argument("--out", type=Path, default=HERE / "site", help="folder to write (default: %(default)s)")
    given = parser.parse_args()
    try:
        files = runtime()
        recommender = load(given.recommender)
        digit, said = (load(given.digits), f"digits: {given.digits}") if given.digits else digits(given.mnist)
        print(said)
        size = site(given.out, digit, recommender, files)
    except PennyweightError as error:
        sys.exit(str(error))
    print(f"{given.out}: {size / 1e6:.1f} MB; look at it:  python -m http.server --directory {given.out}")


if __name__ == "__main__":
    main()
