"""What the tests of evaluation share."""

import pytest
import torch

from brixel import BrixelFeatures


@pytest.fixture(scope="module")
def model(backbone_folder):
    """A student whose adapter and head change the maps."""
    torch.manual_seed(0)
    model = BrixelFeatures.from_backbone(backbone_folder, adapter="fresh", device="cpu")
    with torch.no_grad():
        for parameter in (*model.adapter.parameters(), *model.head.parameters()):
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model
