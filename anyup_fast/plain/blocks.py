"""The fused layers with gradients, in plain PyTorch: what is cheap to compute again is not kept.

A layer keeps its input and a few statistics; backward computes the rest again, piece by piece. Normalisations couple
all pixels in this direction too, through two sums for every channel, so that backward is a sequence of passes as
forward is. Tensors the size of an image have the dtype of the layer's input; statistics, activations and the gradients
of weights are float32 at least.
"""

import functools

import torch
import torch.nn.functional as F

from ..cpu import products
from ..cpu.crew import led
from ..cpu.pages import new_empty
from .norms import ThroughNorm, group_affine
from .pooling import Unpool, pooled_both
from .rotary import Rotary
from .walks import Walk, flat_pixels
from .weights import Block, cast

_new_empty = functools.partial(new_empty, recorded=True)


@led
def res_block(x, weights, num_groups):
    """`anyup_fast.ops.res_block` (B, H, W, out), with what backward needs besides the input.

    That is the output of the block's first convolution (B, H, W, out) and the statistics of both normalisations
    (B, 2, 2, num_groups).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        block, matrices = cast(weights, wide), cast(weights, _factors(x, weights.conv_in))
        width = len(block.conv_out)
        out, hidden = (_new_empty(x, (*x.shape[:3], width)) for _ in range(2))
        statistics = x.new_empty(len(x), 2, 2, num_groups, dtype=wide)
        walk = Walk(x.shape[1:3], max(width, x.shape[3]), block.conv_in, num_groups)

        def picture(source, middle, target, its):
            def measure(desk, piece, moments):
                moments.put(piece.number, source[piece.flat].to(wide), desk.scratch(1, piece.flat, x.shape[3]))

            its[0] = walk.measured(measure, x.shape[3]).groups(num_groups)
            outer = group_affine(its[0], block.norm_in_weight, block.norm_in_bias)

            def first(desk, piece, moments):
                flat = piece.flat
                product = desk.multiply(desk.active(source, flat, outer), matrices.conv_in.T, middle[flat])
                moments.put(piece.number, product.to(wide), desk.scratch(1, flat, width))

            its[1] = walk.measured(first, width).groups(num_groups)
            inner = group_affine(its[1], block.norm_out_weight, block.norm_out_bias)

            def second(desk, piece):
                flat = piece.flat
                skipped = source[flat] if block.skip is None else source[flat].to(matrices.skip.dtype) @ matrices.skip.T
                active, matrix = desk.active(middle, flat, inner), matrices.conv_out.T
                if matrix.dtype == x.dtype:
                    torch.addmm(skipped, active.to(x.dtype), matrix, out=target[flat])
                else:
                    target[flat] = skipped
                    desk.add_product(target[flat], active, matrix)

            walk.each(second)

        for tensors in zip(*map(flat_pixels, (x, hidden, out)), statistics, strict=True):
            picture(*tensors)
    return out, hidden, statistics


@led
def res_block_backward(grad, x, hidden, statistics, weights):
    """Gradients of `res_block` for x and for the tensors of the block, in its order."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        block, matrices = cast(weights, statistics.dtype), cast(weights, _factors(x, weights.conv_in))
        backward = _BlockBackward(x, hidden, statistics, block, matrices)
        for number, given in enumerate(flat_pixels(grad)):

            def through_product(desk, piece, slope, before, of_conv, given=given):
                near = desk.scratch(2, piece.flat, given.shape[1]).copy_(given[piece.flat])  # read twice
                _before_silu(desk.multiply(near, matrices.conv_out, slope), before)
                _add_product(of_conv, near, F.silu(before, inplace=True), matrices.conv_out.dtype)

            def to_skip(desk, piece, given=given):
                return given[piece.flat]

            backward(number, through_product, to_skip)
    return backward.results(weights)


@led
def pooled_block(x, weights, size, num_groups):
    """`anyup_fast.ops.pooled_block` (B, h, w, D), with what backward needs besides the input.

    That is `hidden` and `statistics` as of `res_block`, and the pooled activations (B, h, w, D).
    """
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        hidden, out = _new_empty(x, x.shape), x.new_empty(len(x), *size, x.shape[3])
        active, statistics = torch.empty_like(out), x.new_empty(len(x), 2, 2, num_groups)
        walk = Walk(x.shape[1:3], x.shape[3], weights.conv_in, num_groups, halved=products.halved(x, weights.conv_in))
        for source, middle, its, target, kept in zip(
            flat_pixels(x), flat_pixels(hidden), statistics, out, active, strict=True
        ):
            its[0] = walk.moments(source).groups(num_groups)
            outer = group_affine(its[0], weights.norm_in_weight, weights.norm_in_bias)
            its[1] = walk.hidden(source, outer, weights.conv_in, middle).groups(num_groups)
            inner = group_affine(its[1], weights.norm_out_weight, weights.norm_out_bias)
            plain, acting = pooled_both(walk, source, middle, inner, size)
            kept.copy_(acting.view_as(kept))
            torch.addmm(plain, acting, weights.conv_out.T, out=target.view_as(plain))
    return out, hidden, statistics, active


@led
def pooled_block_backward(grad, x, hidden, statistics, active, weights):
    """Gradients of `pooled_block` for x and for the tensors of the block, in its order."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        matrices = cast(weights, _factors(x, weights.conv_in))
        backward = _BlockBackward(x, hidden, statistics, weights, matrices)
        of_active = grad @ weights.conv_out
        for number, (given, before_product) in enumerate(zip(grad, of_active, strict=True)):
            spread, skipped = (Unpool(part, x.shape[1:3]) for part in (before_product, given))

            def through_pooling(desk, piece, slope, before, of_conv, spread=spread):
                spread(piece, slope)
                _before_silu(slope, before)

            def to_skip(desk, piece, skipped=skipped):
                return skipped(piece, desk.scratch(1, piece.flat, x.shape[3]))

            backward(number, through_pooling, to_skip)
        backward.grads.conv_out.copy_(flat_pixels(grad).flatten(0, 1).T @ flat_pixels(active).flatten(0, 1))
    return backward.results(weights)


class _BlockBackward:
    """Backward of a block of the images `x`, one after the other.

    Args:
        x, hidden: (B, H, W, D). statistics: see `res_block`.
        block, matrices: its tensors, in the dtype of the statistics and in that of `x`.
    """

    def __init__(self, x, hidden, statistics, block, matrices):
        self.block, self.matrices, self.statistics = block, matrices, statistics
        self.width, self.out_width = x.shape[3], len(block.conv_out)
        self.grads = Block(*(None if tensor is None else tensor.new_zeros(tensor.shape) for tensor in block))
        self.grad_x = _new_empty(x, x.shape)
        self.walk = Walk(x.shape[1:3], max(self.width, self.out_width), block.conv_in)
        slopes = self.grad_x if self.width == self.out_width else _new_empty(x, hidden.shape)
        self.images = list(zip(*map(flat_pixels, (x, hidden, self.grad_x, slopes)), strict=True))

    def __call__(self, number, through_end, to_skip):
        """One image.

        Args:
            through_end: callable (desk, piece, slope, before, of_conv) that fills `slope` (P, out) with the gradient
                for `before`, the normalised output of the first convolution, which it may overwrite, and adds to the
                gradient of the second convolution.
            to_skip: callable (desk, piece) -> gradient (P, out) for what is added to the block's branch; it may use
                scratch 1.
        """
        wide, block, matrices, grads = self.statistics.dtype, self.block, self.matrices, self.grads
        source, middle, result, slope = self.images[number]
        its = self.statistics[number]
        outer = group_affine(its[0], block.norm_in_weight, block.norm_in_bias)
        inner = group_affine(its[1], block.norm_out_weight, block.norm_out_bias)
        through = ThroughNorm(its[1], block.norm_out_weight)

        def through_second(desk, piece, kept):
            flat, (norm, of_conv) = piece.flat, kept
            before = torch.addcmul(inner[1], middle[flat], inner[0], out=desk.scratch(0, flat, self.out_width))
            through_end(desk, piece, slope[flat], before, of_conv)
            norm.add(slope[flat].to(wide), middle[flat].to(wide), desk.scratch(1, flat, self.out_width))

        parts = self.walk.gathered(through_second, _of_each(through, block.conv_out))
        grads.conv_out.add_(through.take(parts))
        scale, offset, share = through.coefficients(len(source), grads.norm_out_weight, grads.norm_out_bias)
        through = ThroughNorm(its[0], block.norm_in_weight)

        def through_first(desk, piece, kept):
            flat, (norm, of_conv) = piece.flat, kept
            change = torch.addcmul(offset, middle[flat], share, out=desk.scratch(0, flat, self.out_width))
            change.addcmul_(slope[flat], scale)
            before = torch.addcmul(outer[1], source[flat], outer[0], out=desk.scratch(1, flat, self.width))
            down = _before_silu(desk.multiply(change, matrices.conv_in, result[flat]), before)
            norm.add(down.to(wide), source[flat].to(wide), desk.scratch(2, flat, self.width))
            _add_product(of_conv, change, F.silu(before, inplace=True), matrices.conv_in.dtype)

        parts = self.walk.gathered(through_first, _of_each(through, block.conv_in))
        grads.conv_in.add_(through.take(parts))
        scale, offset, share = through.coefficients(len(source), grads.norm_in_weight, grads.norm_in_bias)

        def to_input(desk, piece, of_skip=None):
            flat = piece.flat
            change = torch.addcmul(offset, source[flat], share, out=desk.scratch(0, flat, self.width))
            change.addcmul_(result[flat], scale)
            skipped = to_skip(desk, piece)
            if block.skip is not None:
                _add_product(of_skip, skipped, source[flat], matrices.skip.dtype)
                skipped = skipped.to(matrices.skip.dtype) @ matrices.skip
            torch.add(change, skipped, out=result[flat])

        if block.skip is None:
            self.walk.each(to_input)
        else:
            grads.skip.add_(sum(self.walk.gathered(to_input, lambda: torch.zeros_like(block.skip))))

    def results(self, weights):
        """Gradients for x and for `weights`, in their dtypes."""
        pairs = zip(self.grads, weights, strict=True)
        return self.grad_x, [grad.to(weight.dtype) for grad, weight in pairs if weight is not None]


@led
def project_pixels(image, weight):
    """`anyup_fast.ops.project_pixels`: (B, H, W, D) in the dtype of the weight."""
    with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
        out = _new_empty(weight, (len(image), *image.shape[2:], len(weight)))
        walk = Walk(image.shape[2:], len(weight), weight)
        for source, target in zip(image, flat_pixels(out), strict=True):
            pixels = source.to(weight.dtype).flatten(1).T

            def project(desk, piece, pixels=pixels, target=target):
                torch.mm(pixels[piece.flat], weight.T, out=target[piece.flat])

            walk.each(project)
    return out


@led
def project_pixels_backward(grad, image, weight, for_image):
    """Gradients of `project_pixels` for image (if asked for, else empty) and weight."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
        of_image = image.new_empty(image.shape if for_image else 0)
        of_weight = weight.new_zeros(weight.shape, dtype=wide)
        walk, start = Walk(image.shape[2:], len(weight), weight), functools.partial(torch.zeros_like, of_weight)
        for number, (source, given) in enumerate(zip(image, flat_pixels(grad), strict=True)):
            pixels = source.to(weight.dtype).flatten(1).T

            def back(desk, piece, total, number=number, pixels=pixels, given=given):
                near = given[piece.flat]
                _add_product(total, near, pixels[piece.flat], total.dtype)
                if for_image:
                    of_image[number].flatten(1).T[piece.flat] = near @ weight

            for part in walk.gathered(back, start):
                of_weight += part
    return of_image, of_weight.to(weight.dtype)


@led
def branches(x, freqs, query_conv, key_conv):
    """`anyup_fast.ops.branches`: two tensors (B, H, W, D)."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        walk, rotary, wide = _rotary(x, freqs)
        query, key = (_new_empty(x, x.shape) for _ in range(2))
        matrices = [weight.to(_factors(x, query_conv)).T for weight in (query_conv, key_conv)]

        def rotate(desk, piece, source, targets):
            guide = _rotated(desk, rotary, source, piece, wide)
            for matrix, target in zip(matrices, targets, strict=True):
                desk.multiply(guide, matrix, target[piece.flat])

        for source, *targets in zip(flat_pixels(x), flat_pixels(query), flat_pixels(key), strict=True):
            walk.each(functools.partial(rotate, source=source, targets=targets))
    return query, key


@led
def branches_backward(grad_query, grad_key, x, freqs, query_conv, key_conv):
    """Gradients of `branches` for x, freqs, query_conv and key_conv."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        walk, rotary, wide = _rotary(x, freqs)
        width, half = x.shape[3], x.shape[3] // 2
        matrices = [weight.to(_factors(x, query_conv)) for weight in (query_conv, key_conv)]
        grad_x = _new_empty(x, x.shape)
        row_at, col_at = rotary.axes
        grad_freqs = row_at.new_zeros(2, width)

        def start():
            weights = [torch.zeros(weight.shape, dtype=wide, device=x.device) for weight in (query_conv, key_conv)]
            return *weights, torch.zeros_like(grad_freqs)

        def turn_back(desk, piece, sums, source, result, given):
            flat, rows, cols, _ = piece
            *of_weights, of_freqs = sums
            guide = _rotated(desk, rotary, source, piece, wide)
            pixels = len(guide)
            near = desk.buffer("near", 2 * pixels * width, x).view(2, pixels, width)
            for gradient, of_branch, copied in zip(of_weights, given, near, strict=True):
                _add_product(gradient, copied.copy_(of_branch[flat]), guide, matrices[0].dtype)
            down = desk.multiply(near[0], matrices[0], desk.scratch(2, flat, width))
            desk.add_product(down, near[1], matrices[1])
            shape = rows.stop - rows.start, cols.stop - cols.start, width
            down, pixels = down.view(shape), source[flat].view(shape).to(wide)
            cos, sin = (desk.scratch(i, flat, width).view(shape) for i in range(2))
            rotary.angles(rows, cols, cos, sin)
            angle = torch.mul(pixels, sin).neg_()
            angle[..., :half].addcmul_(pixels[..., half:], cos[..., :half], value=-1)
            angle[..., half:].addcmul_(pixels[..., :half], cos[..., half:])
            angle.mul_(down)
            of_freqs[0] += row_at[rows] @ angle.sum(1).to(row_at.dtype)
            of_freqs[1] += col_at[cols] @ angle.sum(0).to(col_at.dtype)
            change = cos.mul_(down)
            sin.mul_(down)
            change[..., :half] += sin[..., half:]
            change[..., half:] -= sin[..., :half]
            result[flat] = change.view(-1, width)

        sums = start()
        for source, result, *given in zip(*map(flat_pixels, (x, grad_x, grad_query, grad_key)), strict=True):
            one = functools.partial(turn_back, source=source, result=result, given=given)
            for parts in walk.gathered(one, start):
                for total, part in zip(sums, parts, strict=True):
                    total += part
        *grads, grad_freqs = sums
    return (
        grad_x,
        grad_freqs.to(freqs.dtype),
        *(g.to(w.dtype) for g, w in zip(grads, (query_conv, key_conv), strict=True)),
    )


def _factors(x, weight):
    """Dtype that factors of products with a weight are rounded to: that of `x`, or bfloat16."""
    return torch.bfloat16 if products.halved(x, weight) else x.dtype


def _before_silu(grad, x):
    """Turn the gradient for `silu(x)` into that for x, in place."""
    return torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=grad)


def _add_product(total, a, b, dtype):
    """Add `a.T @ b` to `total`, multiplied in bfloat16 if that is `dtype` and fast here, else in its own dtype."""
    if dtype == torch.bfloat16 and total.device.type == "cpu" and products.choice().bfloat16 == "fast":
        total.add_(a.to(dtype).T @ b.to(dtype))
    else:
        total.addmm_(a.to(total.dtype).T, b.to(total.dtype))


def _rotary(x, freqs):
    wide = torch.promote_types(x.dtype, torch.float32)
    walk = Walk(x.shape[1:3], x.shape[3], x.new_empty(0, dtype=wide))
    return walk, Rotary(freqs.to(wide), x.shape[1:3], wide), wide


def _of_each(through, weight):
    """What each worker gathers on the way back through a normalisation and the product before it."""
    return lambda: (through.part(), torch.zeros_like(weight))


def _rotated(desk, rotary, source, piece, wide):
    """Rotary embedding of the pixels of one piece (P, D), in a scratch."""
    width, (flat, rows, cols, _) = source.shape[1], piece
    shape = rows.stop - rows.start, cols.stop - cols.start, width
    scratch = [desk.scratch(i, flat, width).view(shape) for i in range(3)]
    return rotary(source[flat].view(shape).to(wide), rows, cols, scratch).flatten(0, 1)
