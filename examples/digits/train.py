"""Handwritten digits: a small classifier, trained for several epochs on scikit-learn's bundled data.

It prints a JSON line for each epoch, which the runner scrapes into the run's metadata document, and leaves a model and a plot
in ../modeldir, which the runner uploads.
"""

from __future__ import annotations

import argparse
import json
import pickle
import time
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import SGDClassifier
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler


def tell(**values: object) -> None:
    """One line of JSON: the runner merges it into the document's `experiment`."""
    print(json.dumps({"experiment": values}), flush=True)


def train(epochs: int, rate: float, pause: float) -> tuple[Pipeline, list[float], list[float]]:
    digits = load_digits()
    inputs, tests, labels, truth = train_test_split(
        digits.data, digits.target, test_size=0.25, random_state=1
    )
    scaler = StandardScaler().fit(inputs)
    inputs, tests = scaler.transform(inputs), scaler.transform(tests)
    model = SGDClassifier(loss="log_loss", learning_rate="constant", eta0=rate, random_state=1)
    losses, accuracies = [], []
    for epoch in range(1, epochs + 1):
        order = np.random.default_rng(epoch).permutation(len(inputs))
        model.partial_fit(inputs[order], labels[order], classes=np.arange(10))
        losses.append(float(log_loss(truth, model.predict_proba(tests), labels=np.arange(10))))
        accuracies.append(float(model.score(tests, truth)))
        print(f"epoch {epoch:2d}  loss {losses[-1]:.4f}  accuracy {accuracies[-1]:.4f}")
        tell(epoch=epoch, loss=round(losses[-1], 4), accuracy=round(accuracies[-1], 4))
        time.sleep(pause)
    return make_pipeline(scaler, model), losses, accuracies


def plot(losses: list[float], accuracies: list[float], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5))
    epochs = range(1, len(losses) + 1)
    left.plot(epochs, losses, marker="o", color="tab:red")
    left.set(title="loss", xlabel="epoch")
    right.plot(epochs, accuracies, marker="o", color="tab:blue")
    right.set(title="accuracy", xlabel="epoch")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--rate", type=float, default=0.001)
    parser.add_argument(
        "--pause",
        type=float,
        default=0.25,
        help="seconds between epochs, so that there is something to watch",
    )
    options = parser.parse_args()
    tell(name="digits", rate=options.rate, epochs=options.epochs)
    model, losses, accuracies = train(options.epochs, options.rate, options.pause)
    modeldir = Path("../modeldir")
    modeldir.mkdir(exist_ok=True)
    (modeldir / "model.pkl").write_bytes(pickle.dumps(model))
    plot(losses, accuracies, modeldir / "training.png")
    tell(final={"loss": round(losses[-1], 4), "accuracy": round(accuracies[-1], 4)})


if __name__ == "__main__":
    main()
