# /// script
# requires-python = ">=3.11"
# dependencies = ["scikit-learn>=1.5", "matplotlib>=3.9"]
# ///
"""Train a small neural network on scikit-learn's 1,797 handwritten digits and plot how it learns.

    meshq submit examples/train_digits.py --queue gpu --follow
    python examples/train_digits.py --epochs 30 --lr 0.01       # the same without meshq

The weights and the plot go to `$MESHQ_OUTPUT_DIR`, which meshq collects; without meshq to `outputs`.
"""

import argparse
import os
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # machines in a mesh have no display

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler

CLASSES = np.arange(10)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a digit classifier.")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=0.003, help="learning rate of Adam")
    parser.add_argument("--hidden", type=int, default=64, help="width of the hidden layer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slow", type=float, default=0.0, metavar="SECONDS", help="pause after each epoch, for demos")
    options = parser.parse_args()

    outputs = Path(os.environ.get("MESHQ_OUTPUT_DIR", "outputs"))
    outputs.mkdir(parents=True, exist_ok=True)

    digits = load_digits()
    train_x, test_x, train_y, test_y = train_test_split(
        digits.data, digits.target, test_size=0.25, random_state=options.seed, stratify=digits.target
    )
    scaler = StandardScaler().fit(train_x)
    train_x, test_x = scaler.transform(train_x), scaler.transform(test_x)

    model = MLPClassifier(hidden_layer_sizes=(options.hidden,), learning_rate_init=options.lr, random_state=options.seed)
    losses: list[float] = []
    accuracies: list[float] = []
    for epoch in range(1, options.epochs + 1):
        model.partial_fit(train_x, train_y, classes=CLASSES)
        losses.append(float(model.loss_))
        accuracies.append(float(model.score(test_x, test_y)))
        print(f"epoch {epoch:3d}/{options.epochs}  loss {losses[-1]:.4f}  accuracy {accuracies[-1]:.4f}", flush=True)
        time.sleep(options.slow)

    save_model(outputs / "model.npz", model, scaler)
    plot(outputs / "training.png", losses, accuracies)
    print(f"wrote model.npz and training.png to {outputs}", flush=True)


def save_model(path: Path, model: MLPClassifier, scaler: StandardScaler) -> None:
    """Plain arrays: `np.load` reads them anywhere, and reading them runs no code."""
    weights = {f"weights_{layer}": array for layer, array in enumerate(model.coefs_)}
    biases = {f"biases_{layer}": array for layer, array in enumerate(model.intercepts_)}
    np.savez(path, mean=scaler.mean_, scale=scaler.scale_, **weights, **biases)


def plot(path: Path, losses: list[float], accuracies: list[float]) -> None:
    epochs = range(1, len(losses) + 1)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    left.plot(epochs, losses, marker="o", markersize=3)
    left.set(title="Training loss", xlabel="epoch", ylabel="loss")
    right.plot(epochs, accuracies, marker="o", markersize=3, color="tab:green")
    right.set(title="Test accuracy", xlabel="epoch", ylabel="accuracy")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
