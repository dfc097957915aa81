"""Registration with torch.library: the operators that graphs, fakes and autograd see, and the back ends under them."""

import torch
from torch import Tensor

from . import torch_backend, torch_forward, torch_guidance
from .weights import GuidanceWeights, KeyWeights


@torch.library.custom_op("anyup_fast::windowed_attention", mutates_args=())
def windowed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_bounds: Tensor,
    col_bounds: Tensor,
    scale: float,
    head_mode: str,
    backend: str,
) -> Tensor:
    """`anyup_fast.ops.windowed_attention` on a named back end ("triton" or "torch"), arguments unchecked."""
    if backend == "triton":
        from ..kernels.windowed_attention import windowed_attention_fwd as run
    else:
        run = torch_backend.windowed_attention
    return run(query, key, value, row_bounds, col_bounds, scale=scale, head_mode=head_mode)


@windowed_attention.register_fake
def _(query, key, value, row_bounds, col_bounds, scale, head_mode, backend):
    return value.new_empty(*query.shape[:3], value.shape[3])


@torch.library.custom_op("anyup_fast::windowed_attention_backward", mutates_args=())
def windowed_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_bounds: Tensor,
    col_bounds: Tensor,
    scale: float,
    head_mode: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `windowed_attention` for query, key and value, in plain PyTorch for every back end."""
    return torch_backend.windowed_attention_backward(
        grad, query, key, value, row_bounds, col_bounds, scale=scale, head_mode=head_mode
    )


@windowed_attention_backward.register_fake
def _(grad, query, key, value, row_bounds, col_bounds, scale, head_mode):
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


def _precision():
    """Of float32 products in Triton: None for the kernels' own choice, unless PyTorch is told to be faster."""
    return None if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _save(ctx, inputs, output):
    *tensors, ctx.scale, ctx.head_mode, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    grads = windowed_attention_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.head_mode)
    return *grads, None, None, None, None, None


windowed_attention.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("anyup_fast::guidance", mutates_args=())
def guidance(
    image: Tensor,
    weights: list[Tensor],
    output_height: int,
    output_width: int,
    key_height: int,
    key_width: int,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`anyup_fast.ops.guidance` on a named back end, weights as `GuidanceWeights.flat()`, arguments unchecked."""
    sizes = (output_height, output_width), (key_height, key_width)
    if backend == "triton":
        from ..kernels.guidance import guidance_fwd

        return guidance_fwd(image, GuidanceWeights.from_flat(weights), *sizes, dtype=dtype, precision=_precision())
    return torch_guidance.guidance(image, GuidanceWeights.from_flat(weights), *sizes, dtype=dtype)


@guidance.register_fake
def _(image, weights, output_height, output_width, key_height, key_width, dtype, backend):
    wide = torch.promote_types(dtype, torch.float32)
    width = len(weights[0])
    query = image.new_empty(
        len(image), output_height, output_width, width, dtype=dtype if backend == "triton" else wide
    )
    key = image.new_empty(len(image), key_height, key_width, width, dtype=wide)
    return query, key, image.new_empty(len(image), torch_guidance.NORMS, 2, width, dtype=wide)


@torch.library.custom_op("anyup_fast::project_queries", mutates_args=())
def project_queries(
    query: Tensor, conv: Tensor, norm: Tensor, weight: Tensor, bias: Tensor, eps: float, backend: str
) -> Tensor:
    """`anyup_fast.ops.project_queries` on a named back end, arguments unchecked."""
    if backend == "triton":
        from ..kernels.query_projection import project_queries_fwd

        return project_queries_fwd(query, conv, norm, weight, bias, eps=eps, precision=_precision())
    return torch_forward.project_queries(query, conv, norm, weight, bias, eps=eps)


@project_queries.register_fake
def _(query, conv, norm, weight, bias, eps, backend):
    dtype = query.dtype if backend == "triton" else torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(query.shape, dtype=dtype)


@torch.library.custom_op("anyup_fast::project_keys", mutates_args=())
def project_keys(from_image: Tensor, from_features: Tensor, weights: list[Tensor], eps: float) -> Tensor:
    """`anyup_fast.ops.project_keys`, weights as `KeyWeights.flat()`."""
    return torch_forward.project_keys(from_image, from_features, KeyWeights.from_flat(weights), eps=eps)


@project_keys.register_fake
def _(from_image, from_features, weights, eps):
    return from_image.new_empty(from_image.shape)


@torch.library.custom_op("anyup_fast::feature_unification", mutates_args=())
def feature_unification(features: Tensor, basis: Tensor, backend: str) -> Tensor:
    """`anyup_fast.ops.feature_unification` on a named back end, arguments unchecked."""
    if backend == "triton":
        from ..kernels.feature_unification import feature_unification_fwd as run
    else:
        run = torch_forward.feature_unification
    return run(features, basis)


@feature_unification.register_fake
def _(features, basis, backend):
    shape = len(features), len(basis), *features.shape[2:]
    return features.new_empty(shape, dtype=torch.promote_types(features.dtype, torch.float32))
