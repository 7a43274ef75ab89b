"""Running a model on tensors of the meta device, which have shapes and no data, fast enough to plan with.

PyTorch's own rules for meta tensors are written in Python and take up to a millisecond per operation. Those of the
operations that make up most of a forward pass are replaced by rules that only allocate the result.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_ATEN = torch.ops.aten
META = torch.device("meta")


class AttentionWithoutData(TorchFunctionMode):
    """Inside the context, attention of meta tensors gives a tensor of the right shape.

    Without it PyTorch takes the formula that stores the matrix of all pairs of tokens, unlike the kernels that run.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the function, or make the result of attention."""
        if func is F.scaled_dot_product_attention and args[0].device == META:
            query, value = args[0], args[2]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))


def run_on_meta(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of an operation, by a rule of this module where it has one for tensors of the meta device."""
    rule = _RULES.get(func)
    return func(*args, **kwargs) if rule is None or not _is_meta(args, kwargs) else rule(*args, **kwargs)


def _is_meta(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the result is on the meta device: that of the first tensor, or the device asked for."""
    first = args[0][0] if isinstance(args[0], list) else args[0]
    return first.is_meta if isinstance(first, Tensor) else kwargs.get("device") in (None, META)


def _elementwise(*operands: Any, **_: Any) -> Tensor:
    """The result of an operation on tensors that are broadcast together; its dtype is that of PyTorch's promotion."""
    tensors = [operand for operand in operands if isinstance(operand, Tensor)]
    like = max(tensors, key=Tensor.numel)
    shape = like.shape
    if any(tensor.shape != shape and (tensor.numel() > 1 or tensor.ndim > like.ndim) for tensor in tensors):
        shape = _broadcast([tensor.shape for tensor in tensors])
    dtype = like.dtype if len({tensor.dtype for tensor in tensors}) == 1 else _promoted(tensors)
    if len(operands) > 1 and not dtype.is_floating_point and any(isinstance(operand, float) for operand in operands):
        dtype = torch.get_default_dtype()
    return _dense_like(like, dtype) if like.shape == shape else like.new_empty(shape, dtype=dtype)


def _fractional(*operands: Any, **_: Any) -> Tensor:
    """As :func:`_elementwise`, of operations whose results are fractions, of whole numbers too."""
    made = _elementwise(*operands)
    return made if made.is_floating_point() or made.is_complex() else made.new_empty(made.shape, dtype=torch.float32)


def _dense_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A new tensor whose axes lie in memory in the order of those of ``x``, as the results of most kernels."""
    if x.is_contiguous():
        return x.new_empty(x.shape, dtype=dtype)
    order = sorted(range(x.ndim), key=x.stride, reverse=True)
    made = x.new_empty([x.shape[dim] for dim in order], dtype=dtype)
    return made.permute([order.index(dim) for dim in range(x.ndim)])


def _broadcast(shapes: list[torch.Size]) -> torch.Size:
    """As torch.broadcast_shapes, which would import a solver of equations, for half a second."""
    ndim = max(map(len, shapes))
    padded = [(1,) * (ndim - len(shape)) + tuple(shape) for shape in shapes]
    return torch.Size([next((side for side in sides if side != 1), 1) for sides in zip(*padded, strict=True)])


def _promoted(tensors: list[Tensor]) -> torch.dtype:
    dtype = torch.result_type(tensors[0], tensors[1])
    for tensor in tensors[2:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _in_place(target: Tensor, *_: Any, **__: Any) -> Tensor:
    return target


def _layer_norm(x: Tensor, normalized: list[int], *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    statistics = [*x.shape[: x.ndim - len(normalized)], *(1 for _ in normalized)]
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty(statistics, dtype=wide), x.new_empty(statistics, dtype=wide)


def _product(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(*left.shape[:-1], right.shape[-1])


def _sum_and_product(_: Tensor, left: Tensor, right: Tensor, **__: Any) -> Tensor:
    return _product(left, right)


def _like_in_memory(x: Tensor, shape: list[int]) -> Tensor:
    """A new map of that shape (B, C, H, W), channels last in memory if ``x`` is."""
    made = x.new_empty(shape)
    is_channels_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return made.to(memory_format=torch.channels_last) if is_channels_last else made


def _upsample(x: Tensor, size_hw: list[int], *_: Any) -> Tensor:
    return _like_in_memory(x, [*x.shape[:2], *size_hw])


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    *rest: Any,
) -> Tensor:
    if transposed:
        made: Tensor = _ATEN.convolution.default(x, weight, bias, stride, padding, dilation, transposed, *rest)
        return made
    axes = zip(
        x.shape[2:], weight.shape[2:], *(_per_axis(values, x) for values in (stride, padding, dilation)), strict=True
    )
    sides = [(side + 2 * pad - apart * (kernel - 1) - 1) // step + 1 for side, kernel, step, pad, apart in axes]
    return _like_in_memory(x, [x.shape[0], weight.shape[0], *sides])


def _per_axis(values: list[int], x: Tensor) -> list[int]:
    """One number for each axis of an image or a line; a single one stands for all."""
    return list(values) * (x.ndim - 2) if len(values) == 1 else list(values)


def _max_pool(
    x: Tensor,
    kernel: list[int],
    stride: list[int] | tuple[()] = (),
    padding: list[int] | tuple[int] = (0,),
    dilation: list[int] | tuple[int] = (1,),
    ceil_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    if x.ndim != 4 or ceil_mode or any(apart != 1 for apart in dilation):
        made: tuple[Tensor, Tensor] = _ATEN.max_pool2d_with_indices.default(
            x, kernel, list(stride), list(padding), list(dilation), ceil_mode
        )
        return made
    axes = zip(
        x.shape[2:], *(_per_axis(list(values), x) for values in (kernel, stride or kernel, padding)), strict=True
    )
    pooled = _like_in_memory(
        x, [*x.shape[:2], *((side + 2 * pad - size) // step + 1 for side, size, step, pad in axes)]
    )
    return pooled, torch.empty_strided(pooled.shape, pooled.stride(), dtype=torch.int64, device=META)


def _cat(tensors: list[Tensor], dim: int = 0) -> Tensor:
    if len({(tensor.ndim, tensor.dtype) for tensor in tensors}) > 1:
        made: Tensor = _ATEN.cat.default(tensors, dim)
        return made
    shape = list(tensors[0].shape)
    shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
    return _like_in_memory(tensors[0], shape)


def _stack(tensors: list[Tensor], dim: int = 0) -> Tensor:
    shape = list(tensors[0].shape)
    shape.insert(dim if dim >= 0 else dim + len(shape) + 1, len(tensors))
    return tensors[0].new_empty(shape)


def _index_select(x: Tensor, dim: int, index: Tensor) -> Tensor:
    shape = list(x.shape)
    shape[dim] = index.numel()
    return x.new_empty(shape)


def _same_shape(x: Tensor, *_: Any, **options: Any) -> Tensor:
    return _dense_like(x, options.get("dtype") or x.dtype)


def _softmax(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _pad(x: Tensor, padding: list[int], *_: Any) -> Tensor:
    shape = list(x.shape)
    for axis, (before, after) in enumerate(zip(padding[::2], padding[1::2], strict=True)):
        shape[-1 - axis] += before + after
    return _like_in_memory(x, shape)


def _repeat(x: Tensor, repeats: list[int]) -> Tensor:
    shape = [1] * (len(repeats) - x.ndim) + list(x.shape)
    return x.new_empty([side * times for side, times in zip(shape, repeats, strict=True)])


def _embedding_bag(table: Tensor, bags: Tensor, offsets: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sums, and what the kernel of the CPU returns besides where it sums weighted rows."""
    count = offsets.shape[0]
    small = [bags.new_empty(size) for size in (0, count, count)]
    return table.new_empty(count, table.shape[1]), small[0], small[1], small[2]


def _reduce(x: Tensor, dims: list[int] | None = None, keepdim: bool = False, **options: Any) -> Tensor:
    reduced = range(x.ndim) if not dims else [dim % x.ndim for dim in dims]
    shape = [1 if dim in reduced else side for dim, side in enumerate(x.shape) if keepdim or dim not in reduced]
    return x.new_empty(shape, dtype=options.get("dtype") or (x.dtype if x.is_floating_point() else torch.int64))


def _index(x: Tensor, indices: list[Tensor | None]) -> Tensor:
    """Indexing by one tensor of numbers or several of one shape on neighbouring axes; others by PyTorch's rule."""
    given = [dim for dim, index in enumerate(indices) if index is not None]
    picked = [index.shape for index in indices if index is not None]
    if given != list(range(given[0], given[-1] + 1)) or any(
        index.dtype == torch.bool for index in indices if index is not None
    ):
        return torch.ops.aten.index.Tensor(x, indices)
    return x.new_empty([*x.shape[: given[0]], *_broadcast(picked), *x.shape[given[-1] + 1 :]])


def _arange(start: float, stop: float | None = None, step: float = 1, **options: Any) -> Tensor:
    start, stop = (0, start) if stop is None else (start, stop)
    is_whole = all(isinstance(number, int) for number in (start, stop, step))
    dtype = options.get("dtype") or (torch.int64 if is_whole else torch.get_default_dtype())
    return torch.empty(max(0, math.ceil((stop - start) / step)), dtype=dtype, device=META)


def _triu_indices(rows: int, columns: int, offset: int = 0, **_: Any) -> Tensor:
    count = sum(max(0, columns - max(0, row + offset)) for row in range(rows))
    return torch.empty(2, count, dtype=torch.int64, device=META)


_RULES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(
        (getattr(_ATEN, name).default for name in ("sqrt", "rsqrt", "exp", "log", "sin", "cos", "log2")), _fractional
    ),
    _ATEN.div.Tensor: _fractional,
    **dict.fromkeys(
        (
            *(getattr(_ATEN, name).Tensor for name in ("add", "sub", "mul")),
            *(getattr(_ATEN, name).default for name in ("gelu", "silu", "relu", "clamp", "clamp_min", "clamp_max")),
            *(getattr(_ATEN, name).default for name in ("floor", "abs")),
            *(getattr(_ATEN, name).default for name in ("minimum", "maximum", "floor_divide", "neg", "addcmul")),
        ),
        _elementwise,
    ),
    **dict.fromkeys(
        (_ATEN.rsub.Scalar, _ATEN.pow.Scalar, _ATEN.pow.Tensor_Scalar, _ATEN.lerp.Tensor, _ATEN.lerp.Scalar),
        _elementwise,
    ),
    **dict.fromkeys((_ATEN.roll.default, _ATEN.flip.default), _same_shape),
    **dict.fromkeys((_ATEN.empty_like.default, _ATEN.ones_like.default, _ATEN.full_like.default), _same_shape),
    **dict.fromkeys(
        (
            *(getattr(_ATEN, name).Tensor for name in ("add_", "sub_", "mul_", "div_")),
            *(
                getattr(_ATEN, name).default
                for name in ("relu_", "clamp_", "addcmul_", "copy_", "baddbmm_", "zero_", "index_add_")
            ),
        ),
        _in_place,
    ),
    **dict.fromkeys((_ATEN.lerp_.Scalar, _ATEN.lerp_.Tensor), _in_place),
    _ATEN.native_layer_norm.default: _layer_norm,
    **dict.fromkeys((_ATEN.mm.default, _ATEN.bmm.default), _product),
    **dict.fromkeys((_ATEN.addmm.default, _ATEN.baddbmm.default), _sum_and_product),
    _ATEN.upsample_bilinear2d.default: _upsample,
    _ATEN.upsample_bicubic2d.default: _upsample,
    _ATEN.convolution.default: _convolution,
    _ATEN.cat.default: _cat,
    _ATEN.stack.default: _stack,
    _ATEN.index_select.default: _index_select,
    _ATEN.index.Tensor: _index,
    _ATEN._softmax.default: _softmax,
    _ATEN.repeat.default: _repeat,
    **dict.fromkeys((_ATEN.constant_pad_nd.default, _ATEN.replication_pad2d.default), _pad),
    _ATEN._embedding_bag_forward_only.default: _embedding_bag,
    _ATEN.mean.dim: _reduce,
    _ATEN.sum.dim_IntList: _reduce,
    _ATEN.arange.default: _arange,
    _ATEN.arange.start: _arange,
    _ATEN.arange.start_step: _arange,
    _ATEN.max_pool2d_with_indices.default: _max_pool,
    _ATEN.triu_indices.default: _triu_indices,
}
