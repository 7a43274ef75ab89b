import pytest
import torch

from brixel.feature_maps.host_copy import copy_by_channels, crop, to_host


@pytest.mark.parametrize("map_hw", [(4, 5), (3, 5), (4, 2), (1, 1)])
def test_a_map_is_cropped_to_a_contiguous_one(map_hw):
    features = torch.randn(6, 4, 5)
    expected = features[:, : map_hw[0], : map_hw[1]].clone()
    address = features.data_ptr()
    batch = torch.stack([features, features])[0]
    channels_last = features.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    for given in (batch, channels_last, features):  # the last one is cropped in place
        cropped = crop(given, map_hw)
        assert torch.equal(cropped, expected)
        assert cropped.is_contiguous()
    assert cropped.data_ptr() == address


@pytest.mark.parametrize("channels", [1, 32, 70])
def test_a_map_from_another_device_is_copied_by_channels(channels):
    dense = torch.randn(2, channels, 5, 6).to(memory_format=torch.channels_last)
    copied = copy_by_channels(dense[1])
    assert copied.is_contiguous()
    assert torch.equal(copied, dense[1])
    assert to_host(dense[1]) is not copied
    assert to_host(dense[1]).data_ptr() == dense[1].data_ptr()  # on the CPU nothing is copied
