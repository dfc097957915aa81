"""`project_queries`: contract, checks, choice of back end, registration and gradients."""

from functools import partial

import torch
from torch import Tensor

from ..plain import queries as plain
from ..plain.norms import RMS_EPS
from .choice import attempt, chosen, on_triton, triton_precision, why_no_triton


def project_queries(query, conv, norm, weight, bias, *, eps=RMS_EPS, backend="auto", kept=None):
    """3x3 convolution (zero padding), RMSNorm and projection of the queries.

    Differentiable once in everything, on the "torch" back end, which keeps the query and what the convolution made of
    it.

    Args:
        query: (B, H', W', D) from `guidance`.
        conv: (D, D, 3, 3); norm: (D,), the norm's weight; weight: (D, D) and bias: (D,) of the projection.
        eps: of the norm.
        backend: "auto", "triton" or "torch".
        kept: `anyup_fast.kept.Kept` of the model with these weights, or None: what kernels make of them is made once.

    Returns:
        (B, H', W', D) in the dtype of `query`, on the "torch" back end at least float32.

    Raises:
        ValueError: shapes that do not fit. RuntimeError: a back end asked for by name that can't run.

    Source: AnyUp (arXiv 2510.12764), cross-attention.
    """
    dim = query.shape[-1]
    shapes = [tuple(tensor.shape) for tensor in (query, conv, norm, weight, bias)]
    if query.ndim != 4 or 0 in query.shape or shapes[1:] != [(dim, dim, 3, 3), (dim,), (dim, dim), (dim,)]:
        raise ValueError(f"query, conv, norm, weight and bias do not fit together: {shapes}")
    given = query, conv, norm, weight, bias
    recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
    if recorded and backend == "auto":  # there is one way
        return convolve_and_project_op(*given, eps)[0]
    about = query.device, query.dtype, dim, recorded
    why_not = partial(_why_not_projection, query=query, recorded=recorded)
    backend = chosen(kept, "project_queries", about, backend, why_not)
    if recorded:
        return convolve_and_project_op(*given, eps)[0]
    if kept is not None and on_triton(backend):
        return _computed(given, eps, backend, kept)
    return project_queries_op(*given, eps, backend)


def _why_not_projection(name, query, recorded):
    if name == "reference":
        return "this operator has none: its specification are the layers of AnyUp"
    if name == "torch":
        return None
    if reason := why_no_triton("project_queries", query.device, query.dtype):
        return reason
    if recorded:
        return "records no gradients, which are asked for"
    from ..kernels.queries import why_not_query_projection

    return why_not_query_projection(query.shape[-1], query.dtype)


@torch.library.custom_op("anyup_fast::project_queries", mutates_args=())
def project_queries_op(
    query: Tensor, conv: Tensor, norm: Tensor, weight: Tensor, bias: Tensor, eps: float, backend: str
) -> Tensor:
    """`anyup_fast.ops.project_queries` on a named back end, arguments unchecked."""
    return _computed((query, conv, norm, weight, bias), eps, backend)


def _computed(given, eps, backend, kept=None):
    query, *weights = given

    def kernel():
        from ..kernels.queries import in_halves, prepared, project_queries_fwd
        from ..kernels.tiling import Device

        made, precision = weights, triton_precision()
        if kept is not None:
            halves = in_halves(Device.of(query.device), query.dtype, precision)
            made = kept.of(("queries, ready", query.dtype, halves), lambda: prepared(*weights, query.dtype, halves))
        return project_queries_fwd(query, *made, eps=eps, precision=precision, ready=kept is not None)

    def in_plain_pytorch():
        out = plain.project_queries(*given, eps=eps)
        return out.to(query.dtype) if on_triton(backend) else out

    return attempt("project_queries", backend, query.device, kernel, in_plain_pytorch)


@project_queries_op.register_fake
def _(query, conv, norm, weight, bias, eps, backend):
    dtype = query.dtype if on_triton(backend) else torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(query.shape, dtype=dtype)


@torch.library.custom_op("anyup_fast::project_queries_backward", mutates_args=())
def project_queries_backward_op(
    grad: Tensor, query: Tensor, pixels: Tensor, conv: Tensor, norm: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `convolve_and_project` for its tensors."""
    return plain.project_queries_backward(grad, query, pixels, conv, norm, weight, bias, eps)


@project_queries_backward_op.register_fake
def _(grad, query, pixels, conv, norm, weight, bias, eps):
    return tuple(x.new_empty(x.shape) for x in (query, conv, norm, weight, bias))


@torch.library.custom_op("anyup_fast::convolve_and_project", mutates_args=())
def convolve_and_project_op(
    query: Tensor, conv: Tensor, norm: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`project_queries` in plain PyTorch with gradients; also gives the convolution's output, which backward needs."""
    return plain.convolve_and_project(query, conv, norm, weight, bias, eps)


@convolve_and_project_op.register_fake
def _(query, conv, norm, weight, bias, eps):
    dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(query.shape, dtype=dtype), query.new_empty(query.shape, dtype=dtype)


def _save_projection(ctx, inputs, output):
    query, *weights, ctx.eps = inputs
    ctx.save_for_backward(query, output[1], *weights)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # zeros of the size of an image, for what has no gradient


def _backward_projection(ctx, grad, _):
    if grad is None:
        return (None,) * 6
    return *project_queries_backward_op(grad, *ctx.saved_tensors, ctx.eps), None


convolve_and_project_op.register_autograd(_backward_projection, setup_context=_save_projection)
