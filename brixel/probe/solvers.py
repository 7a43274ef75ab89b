"""Exact fits of linear readouts: multinomial logistic regression and ridge regression, in float64, deterministic.

Both standardise the channels and divide them by the square root of D, so that a feature has length 1 on average, and
one ``regularisation`` suits backbones of any width. It is the weight of the squared norm of the readout: for classes
beside the sum over examples, so that many outweigh it, for values beside their mean. Why: `docs/results/probes.md`.

Shapes: N examples (clicks or cells), D channels, K classes.
"""

import logging
import math

import torch
from torch import Tensor, nn

from brixel.probe.cells import cross_entropy
from brixel.probe.readouts import Standardised, standardised_readout

_LOG = logging.getLogger("brixel")
_MOST_CALLS = 2000  # of the loss
_HISTORY = 20  # steps that L-BFGS remembers
_TOLERANCE = 1e-6  # of the gradient of the mean loss


def softmax_readout(scale: Standardised, rows: Tensor, shares: Tensor, regularisation: float) -> nn.Sequential:
    """The readout that minimises the cross-entropy to shares of classes, by L-BFGS.

    Minimises ``sum over rows of cross-entropy + regularisation / 2 * D * |weight|^2`` for weights of standardised
    channels; biases are free. As ``sklearn.linear_model.LogisticRegression`` with C = 1 / regularisation.

    Args:
        scale: What standardises the channels.
        rows: (N, D), float32.
        shares: (N, K), from 0; rows may sum to less than 1, and count for as much.
        regularisation: Above 0.

    Returns:
        From maps (B, D, h, w) to logits (B, K, h, w).
    """
    width, total = rows.shape[1], float(shares.sum())
    features, targets = _scaled(scale, rows), shares.double()
    weights = torch.zeros(targets.shape[1], width + 1, dtype=torch.float64, device="cpu", requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights],
        max_iter=_MOST_CALLS,
        max_eval=_MOST_CALLS,
        tolerance_grad=_TOLERANCE,
        tolerance_change=1e-14,
        history_size=_HISTORY,
        line_search_fn="strong_wolfe",
    )

    def mean_loss() -> Tensor:
        optimizer.zero_grad()
        logits = torch.addmm(weights[:, width], features, weights[:, :width].T)  # N K
        penalty = regularisation / 2 * weights[:, :width].square().sum()
        loss = (cross_entropy(logits, targets) + penalty) / total
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(mean_loss)
    assert weights.grad is not None
    if float(weights.grad.abs().max()) > 100 * _TOLERANCE:
        _LOG.warning(
            "the probe's fit stopped after %d evaluations before it had converged; a larger regularisation converges "
            "sooner",
            _MOST_CALLS,
        )
    found = weights.detach()
    return standardised_readout(scale, found[:, :width] / math.sqrt(width), found[:, width])


class RidgeSums:
    """Ridge regression from sums over examples, which take (D + 1)^2 numbers however many there are.

    Channels and targets are summed less their values in the first batch, so that large means do not drown what varies.
    """

    def __init__(self) -> None:
        self._count = 0.0
        self._around = self._around_target = torch.zeros(1)
        self._sums = self._products = torch.zeros(1)

    def add(self, rows: Tensor, values: Tensor, weights: Tensor) -> None:
        """Count examples in: rows (N, D), values (N,) and how much each counts, (N,)."""
        rows, values, weights = rows.double(), values.double(), weights.double()
        if not self._count:
            self._around, self._around_target = rows.mean(0), values.mean()
        table = torch.cat([rows - self._around, (values - self._around_target)[:, None]], 1)  # N D+1
        weighted = table * weights[:, None]
        self._count += float(weights.sum())
        self._sums = self._sums + weighted.sum(0)
        self._products = self._products + weighted.T @ table

    @property
    def count(self) -> float:
        """How many examples were counted in, by their weights."""
        return self._count

    def readout(self, scale: Standardised, regularisation: float) -> nn.Sequential:
        """The readout that minimises ``mean of squared errors + regularisation * D * |weight|^2``; the bias is free.

        As ``sklearn.linear_model.Ridge`` with alpha = regularisation * N.

        Args:
            scale: What standardises the channels.
            regularisation: Above 0.

        Returns:
            From maps (B, D, h, w) to values (B, 1, h, w).
        """
        mean = self._sums / self._count
        scatter = self._products - self._count * torch.outer(mean, mean)  # D+1 D+1, around the mean
        unit = scale.deviation.flatten().double() * math.sqrt(len(mean) - 1)  # of a scaled feature
        gram = scatter[:-1, :-1] / torch.outer(unit, unit)
        gram.diagonal().add_(regularisation * self._count)
        solved = torch.linalg.solve(gram, (scatter[:-1, -1] / unit)[:, None])[:, 0]
        weight = solved / math.sqrt(len(unit))  # of standardised channels
        centre = (self._around + mean[:-1] - scale.mean.flatten().double()) / scale.deviation.flatten().double()
        bias = self._around_target + mean[-1] - weight @ centre
        return standardised_readout(scale, weight[None], bias[None])


def _scaled(scale: Standardised, rows: Tensor) -> Tensor:
    """Rows (N, D) standardised and divided by the square root of D, float64."""
    features = rows.double()
    features -= scale.mean.flatten().double()
    features /= scale.deviation.flatten().double() * math.sqrt(rows.shape[1])
    return features
