"""Find the main object of a photograph without any labels: a normalised cut through the graph of similar cells.

    python examples/foreground.py photo.jpg -o foreground.png

As in TokenCut (Wang et al., arXiv 2202.11539): cells are joined where their features are similar, and the eigenvector
of the second smallest eigenvalue splits the graph. The graph has some thousand coarse cells; the fine cells then go
to the side whose features they resemble. Below: the photograph, the object, the clusters of `feature_map.cluster`.
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from brixel import BrixelFeatures

COLOURS = np.array(  # by Paul Tol, "bright"
    [[68, 119, 170], [238, 102, 119], [34, 136, 51], [204, 187, 68], [102, 204, 238], [170, 51, 119], [187, 187, 187]]
)


def foreground(dense, joined_above=0.4, rows=28):
    """Whether a cell belongs to the object: (Hf, Wf)."""
    height, width = dense.grid_hw
    coarse = dense.resize((rows, max(2, round(rows * width / height))))
    cells = F.normalize(coarse.features.flatten(1).T.double(), dim=1)  # N D
    weights = torch.where(cells @ cells.T > joined_above, 1.0, 1e-5).double()
    degrees = weights.sum(1)
    laplacian = torch.eye(len(cells)) - weights / (degrees[:, None] * degrees).sqrt()
    second = torch.linalg.eigh(laplacian).eigenvectors[:, 1] / degrees.sqrt()
    side = second > second.mean()
    on_border = torch.ones(coarse.grid_hw, dtype=torch.bool)
    on_border[1:-1, 1:-1] = False
    if side[on_border.flatten()].double().mean() > 0.5:  # the background touches more of the border
        side = ~side
    means = F.normalize(torch.stack([cells[~side].mean(0), cells[side].mean(0)]), dim=1)
    return torch.tensordot(means.float(), dense.features.float(), 1).argmax(0).bool()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image")
    parser.add_argument("--clusters", type=int, default=6)
    parser.add_argument("-o", "--output", default="foreground.png")
    options = parser.parse_args()
    photo = ImageOps.exif_transpose(Image.open(options.image)).convert("RGB")
    dense = BrixelFeatures.from_pretrained().extract(photo)
    mask = Image.fromarray(foreground(dense).numpy()).resize(photo.size)
    clusters = COLOURS[dense.cluster(options.clusters).numpy() % len(COLOURS)].astype(np.uint8)
    cut = Image.composite(photo, Image.new("RGB", photo.size, "white"), mask)
    pictures = [photo, cut, Image.fromarray(clusters).resize(photo.size, Image.Resampling.NEAREST)]
    Image.fromarray(np.hstack([np.asarray(picture) for picture in pictures])).save(options.output)
