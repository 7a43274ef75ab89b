"""Surface normals of a depth map whose camera is known.

On a plane, 1 / depth is linear in the pixel's position: for points p with n . p = c, the ray (x, y, 1) of a pixel gives
n . (x, y, 1) = c / depth. So a normal is a least-squares plane through 1 / depth around a pixel. This is exact on
planes. Averages of several pixels lie on the same plane, so averaging removes the rounding of files.

The camera is a pinhole that looks along +z, x right, y down, through the middle of the image. Normals point to it.
Shapes: H x W pixels, h x w cells of the result, N = h * w neighbourhoods of 3 x 3 cells.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CELLS = 500  # along the shorter side of the result, at least; maps with fewer pixels keep them
ROUGH = 0.002  # root mean square distance from the plane, as a share of 1 / depth, above which it is a step


def normals_from_depth(inverse: Tensor, focal_px: float) -> Tensor:
    """Unit normals (3, h, w), zeros where there is none, from 1 / depth (H, W) in any unit, 0 where there is none.

    ``focal_px``: in pixels of this map. Pixels are averaged in square cells, as large as leave ``CELLS`` along a side.
    There is no normal at the frame, nor where one of the 3 x 3 cells contains a pixel without depth, nor at steps.
    """
    height, width = inverse.shape
    block = max(1, min(height, width) // CELLS)
    rows, columns = height // block, width // block
    top, left = (height - rows * block) // 2, (width - columns * block) // 2
    inner = inverse[None, None, top : top + rows * block, left : left + columns * block].double()
    means = F.avg_pool2d(inner, block)  # 1 1 h w
    gaps = F.max_pool2d((inner <= 0).double(), block)

    # the plane through each neighbourhood: slopes along x and y per cell, and its height in the middle
    step = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    offsets = torch.stack([step.repeat(3), step.repeat_interleave(3), torch.ones(9, dtype=torch.float64)], 1)  # 9 3
    around = F.unfold(means, 3, padding=1)[0]  # 9 N
    plane = torch.linalg.pinv(offsets) @ around  # 3 N
    distance = (around - offsets @ plane).square().mean(0).sqrt()
    whole = F.unfold(F.pad(gaps, (1, 1, 1, 1), value=1.0), 3)[0].amax(0) == 0  # outside is unknown
    known = whole & (distance <= ROUGH * plane[2])

    # as a function of the ray (x, y, 1): its gradient is the normal, turned away from the camera
    y, x = (
        (start + (torch.arange(cells, dtype=torch.float64) + 0.5) * block - side / 2) / focal_px
        for start, cells, side in ((top, rows, height), (left, columns, width))
    )
    slope_x, slope_y = plane[:2] * focal_px / block
    middle = plane[2] - slope_x * x.repeat(rows) - slope_y * y.repeat_interleave(columns)
    normals = -F.normalize(torch.stack([slope_x, slope_y, middle]), dim=0) * known
    return normals.view(3, rows, columns).float()
