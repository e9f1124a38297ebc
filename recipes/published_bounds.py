"""Published LipSDP bounds beside the values certified here.

The weights are those published with LipSDP and its successors, as MATLAB files in the two folders `mnist-relu-784-50-10`
and `mnist-tanh-sigmoid`. Run with: python recipes/published_bounds.py --weights FOLDER
"""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from scipy.io import loadmat
from torch import nn

import lipguard


@dataclass(frozen=True)
class Published:
    """A network with the l2 bounds its authors published; None where they gave none."""

    file: str
    activation: type[nn.Module]
    layer: float | None
    neuron: float | None
    remark: str = ""


NETWORKS = (
    Published("mnist-relu-784-50-10/random_weights.mat", nn.ReLU, 39.839, 36.482),
    Published(
        "mnist-relu-784-50-10/mnist_weights.mat", nn.ReLU, None, 24.365, "24.320 too; both from unsound, coupled multipliers"
    ),
    Published("mnist-tanh-sigmoid/mnist_fnn_tanh_20.mat", nn.Tanh, None, 37.428),
    Published("mnist-tanh-sigmoid/mnist_fnn_tanh_50.mat", nn.Tanh, None, 39.723),
    Published("mnist-tanh-sigmoid/mnist_fnn_tanh_30_20.mat", nn.Tanh, None, 89.664),
    Published("mnist-tanh-sigmoid/mnist_fnn_sigmoid_20.mat", nn.Sigmoid, None, 26.039),
    Published("mnist-tanh-sigmoid/mnist_fnn_sigmoid_50.mat", nn.Sigmoid, None, 24.636),
    Published("mnist-tanh-sigmoid/mnist_fnn_sigmoid_30_20.mat", nn.Sigmoid, None, 63.695),
)


def network(path: Path, activation: type[nn.Module]) -> nn.Sequential:
    """The network of the weight matrices in a MATLAB file; biases do not matter to a global bound."""
    layers: list[nn.Module] = []
    for matrix in loadmat(path)["weights"].ravel():
        weight = torch.tensor(matrix, dtype=torch.float64)
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float64)
        linear.weight = nn.Parameter(weight)
        layers += [linear, activation()]
    return nn.Sequential(*layers[:-1])


def certify(published: Published, folder: Path) -> list[str]:
    """One row of the table."""
    model = network(folder / published.file, published.activation)
    linears = [layer for layer in model if isinstance(layer, nn.Linear)]
    sizes = [linears[0].in_features, *(layer.out_features for layer in linears)]
    example = torch.zeros(1, sizes[0], dtype=torch.float64)
    row = ["-".join(map(str, sizes)), published.activation.__name__]
    for method, value in (("spectral", None), ("lipsdp-layer", published.layer), ("lipsdp-neuron", published.neuron)):
        started = time.perf_counter()
        certificate = lipguard.bound(model, example, method=method, tol=1e-9)
        seconds = time.perf_counter() - started
        if method != "spectral":
            row.append("" if value is None else f"{value:.3f}")
        row.append(f"{certificate.value:.6f}" + ("" if certificate.rigor == "verified" else " (not verified)"))
        if method != "spectral":
            row.append(f"{seconds:.2f}")
    return [*row, published.remark]


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="Published LipSDP bounds beside the values certified here.")
    parser.add_argument("--weights", type=Path, required=True, help="folder that holds the two folders of weights")
    folder = parser.parse_args().weights
    missing = [published.file for published in NETWORKS if not (folder / published.file).is_file()]
    if missing:
        print(f"{folder} lacks {', '.join(missing)}.", file=sys.stderr)
        return 2
    table = Table(box=None, header_style="dim")
    for name in ("network", "activation"):
        table.add_column(name)
    for name in ("product", "layer, published", "certified", "s", "neuron, published", "certified", "s"):
        table.add_column(name, justify="right")
    table.add_column("")
    # The first use of the linear algebra libraries takes time that no bound needs.
    lipguard.bound(nn.Linear(2, 2), torch.zeros(1, 2))
    for published in NETWORKS:
        table.add_row(*certify(published, folder))
    Console(width=160).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
