"""Clusters of cells: k-means of scikit-learn on features of length 1.

Shapes: D channels, Hf x Wf cells of a map.
"""

import torch
from torch import Tensor

from brixel.errors import BrixelError
from brixel.feature_maps.matching import unit_cells
from brixel.feature_maps.pca import MAX_FIT_CELLS, check_cells, sample_cells
from brixel.utils.extras import import_extra
from brixel.utils.torch_defaults import plain_defaults

_RESTARTS = 4  # k-means from so many first centres; the best is kept


@plain_defaults()
def cluster_cells(features: Tensor, k: int, seed: int) -> Tensor:
    """Group the cells of a map (D, Hf, Wf) by k-means, with cosine similarity: (Hf, Wf), int64.

    Centres are fitted to all cells, or to the sample that also serves PCA. Clusters are numbered by falling number of
    cells; there are fewer where fewer cells are distinct. See :meth:`brixel.FeatureMap.cluster`.
    """
    sklearn = import_extra("sklearn.cluster", extra="cluster", purpose="clusters")
    check_cells(features, "the feature map", features.shape[0], "it")
    cells = unit_cells(features.detach()).cpu()  # (Hf*Wf, D)
    if k > len(cells):
        raise BrixelError(f"k is {k}, and the map has {len(cells)} cells; expected at most as many clusters as cells")
    directions = cells.T.reshape(-1, *features.shape[1:])
    sample = sample_cells([directions]).T.float() if len(cells) > MAX_FIT_CELLS else cells
    distinct = len(torch.unique(sample, dim=0))  # k-means warns where there are fewer than clusters
    fitted = sklearn.KMeans(min(k, distinct), n_init=_RESTARTS, random_state=seed).fit(sample.numpy())
    labels = torch.from_numpy(fitted.predict(cells.numpy())).long()
    sizes = torch.bincount(labels, minlength=min(k, distinct))
    rank = torch.empty_like(sizes)
    rank[sizes.argsort(descending=True, stable=True)] = torch.arange(len(sizes))
    return rank[labels].reshape(features.shape[1:])
