"""Measures the constants of the block-DCT codec (`emmdit/encoders/dct.py`) on renders of the shapes world.

python -m assets.recipes.measure_dct    # prints ORDER_4, MEAN_4 and STD_4
"""

from __future__ import annotations

import torch

from emmdit.encoders.dct import block_matrices, fold_blocks
from emmdit.shapes import ShapesDataset


def measure(count: int = 20_000) -> dict[str, list[float]]:
    """The constants of 4x4 blocks by their names, from `count` scenes."""
    data = ShapesDataset(seed=1, length=count)
    images = torch.stack([data[i]["image"] for i in range(count)]).double()
    analysis, synthesis = block_matrices(4)
    coefficients = fold_blocks(images, 4).flatten(0, 2) @ analysis
    energy = (coefficients**2).mean(dim=0) * (synthesis**2).sum(dim=1)  # in RGB: synthesis is not orthonormal
    order = energy.argsort(descending=True)
    mean, std = coefficients.mean(dim=0)[order], coefficients.std(dim=0)[order]
    return {"ORDER_4": order.tolist(), "MEAN_4": mean.tolist(), "STD_4": std.tolist()}


def main() -> None:
    for name, values in measure().items():
        numbers = [str(v) if isinstance(v, int) else f"{v:.4f}" for v in values]
        rows = ["    " + ", ".join(numbers[i : i + 12]) + "," for i in range(0, len(numbers), 12)]
        print(f"{name} = (\n" + "\n".join(rows) + "\n)")


if __name__ == "__main__":
    main()
