"""What surrounds the attention, in plain PyTorch for any device: walks over images by pieces of a few thousand pixels,
the projections of queries and keys, the feature-agnostic layer.

A piece of the image goes through normalisation, activation, product, skip and statistics while it lies in the cache;
only the products are written back. Products are matrix products throughout, 16-bit tensors are computed in float32.
"""

import torch
import torch.nn.functional as F

PIXELS = 4096  # of a piece on a CPU: with 128 channels of float32 two megabytes
MANY_PIXELS = 1 << 20  # of a piece elsewhere
RESPONSES = 1 << 20  # of the feature-agnostic layer at once
NORM_EPS = 1e-5


def project_queries(query, conv, norm, weight, bias, *, eps, convolved=None):
    """`anyup_fast.ops.project_queries`, in float32 at least; `convolved`, if given, takes the convolution's output."""
    compute = torch.promote_types(query.dtype, torch.float32)
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        conv, norm, weight, bias = (tensor.to(compute) for tensor in (conv, norm, weight, bias))
        out = query.new_empty(query.shape, dtype=compute)
        height, width, dim = query.shape[1:]
        walk = Walk((height, width), dim, conv)
        convolve, folded = Convolution(conv), (weight * norm).T.contiguous()
        for b, (source, target) in enumerate(zip(query, out, strict=True)):
            for flat, rows, cols in walk.pieces:
                halo = with_halo(source, rows, cols, compute)
                pixels = convolve(halo, walk.scratch(0, flat, dim))
                if convolved is not None:
                    convolved[b].view(-1, dim)[flat] = pixels
                _project(pixels, folded, bias, eps, target.view(-1, dim)[flat])
    return out


def project_keys(from_image, from_features, weights, *, eps, num_groups=8):
    """`anyup_fast.ops.project_keys`."""
    compute = torch.promote_types(from_image.dtype, torch.float32)
    with torch.no_grad(), torch.autocast(from_image.device.type, enabled=False):
        weights = cast(weights, compute)
        batch, h, w, dim = from_image.shape
        out = from_image.new_empty(from_image.shape, dtype=compute)
        filters = from_features.shape[1]
        walk = Walk((h, w), max(2 * dim, filters), weights.merge, num_groups)
        convolve, folded = Convolution(weights.merge), (weights.weight * weights.norm).T.contiguous()
        rows, cols = (_reflected(n, out.device) for n in (h, w))
        hidden, x = (out.new_empty(h * w, dim) for _ in range(2))
        for image, features, target in zip(from_image, from_features, out, strict=True):
            unified = features.to(compute).permute(1, 2, 0).reshape(-1, filters).clone()
            unified = walk.blocks(unified, hidden, walk.moments(unified), weights.features)
            both = torch.cat((image.to(compute), unified.view(h, w, dim)), -1)
            padded = both.index_select(0, rows).index_select(1, cols)
            moments = Moments()
            for flat, r, c in walk.pieces:
                halo = padded[r.start : r.stop + 2, c.start : c.stop + 2]
                x[flat] = convolve(halo, walk.scratch(0, flat, 2 * dim))
                moments.add(x[flat], walk.scratch(1, flat, dim))
            key = walk.blocks(x, hidden, moments, weights.blocks)
            for flat, _, _ in walk.pieces:
                _project(key[flat], folded, weights.bias, eps, target.view(-1, dim)[flat])
    return out.to(from_image.dtype)


def feature_unification(features, basis):
    """`anyup_fast.ops.feature_unification`."""
    compute = torch.promote_types(features.dtype, torch.float32)
    filters, _, k, _ = basis.shape
    channels, height, width = features.shape[1:]
    with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
        basis = basis.to(compute).flatten(1).T.contiguous()
        out = features.new_empty(len(features), height, width, filters, dtype=compute)
        rows, cols = (taps_inside(n, k, out.device) for n in (height, width))
        share = (1 / (rows[:, None] * cols).to(compute))[..., None, None]
        for source, target in zip(features, out, strict=True):
            padded = F.pad(source.to(compute), (k // 2,) * 4)
            patches = padded.unfold(1, k, 1).unfold(2, k, 1).permute(1, 2, 0, 3, 4)
            for r, c in pieces(height, width, max(1, RESPONSES // (filters * channels))):
                inside = patches[r, c].flatten(3) * share[r, c]
                responses = (inside.flatten(0, 2) @ basis).view(-1, filters, channels)
                target[r, c] = torch.softmax(responses, 1, out=responses).mean(2).view_as(target[r, c])
    return out.permute(0, 3, 1, 2).contiguous()


def pieces(height, width, most):
    """Cut an image into slices (rows, cols) of at most `most` pixels that lie next to each other in memory."""
    if width > most:
        for row in range(height):
            for col in range(0, width, most):
                yield slice(row, row + 1), slice(col, min(col + most, width))
    else:
        for row in range(0, height, most // width):
            yield slice(row, min(row + most // width, height)), slice(0, width)


def cast(weights, dtype):
    """A tuple of tensors, None and such tuples, in another dtype."""
    if isinstance(weights, torch.Tensor):
        return weights.to(dtype)
    if weights is None:
        return None
    parts = [cast(part, dtype) for part in weights]
    return type(weights)(*parts) if hasattr(weights, "_fields") else tuple(parts)


def taps_inside(n, k, device):
    """(n,): how many of the k taps around each place of an axis lie on it."""
    place = torch.arange(n, device=device)
    return (place + k // 2).clamp(max=n - 1) - (place - k // 2).clamp(min=0) + 1


def _reflected(n, device):
    """Places of an axis with one more on either side, reflected; an axis of one place repeats it."""
    return (n - 1 - (n - 1 - torch.arange(-1, n + 1, device=device).abs()).abs()).clamp(0, n - 1)


def with_halo(source, rows, cols, dtype):
    """Pixels of `source` (H, W, D) of two slices with one more on every side, zeros outside."""
    halo = source.new_empty(rows.stop - rows.start + 2, cols.stop - cols.start + 2, source.shape[2], dtype=dtype)
    inner = [
        slice(int(part.start == 0), part.stop - part.start + 2 - int(part.stop == length))
        for part, length in zip((rows, cols), source.shape[:2], strict=True)
    ]
    halo[tuple(inner)] = source[max(rows.start - 1, 0) : rows.stop + 1, max(cols.start - 1, 0) : cols.stop + 1]
    for axis, part in enumerate(inner):
        if part.start:
            halo.select(axis, 0).zero_()
        if part.stop < halo.shape[axis]:
            halo.select(axis, -1).zero_()
    return halo


class Convolution:
    """3x3 convolution by a weight (out, in, 3, 3) without padding."""

    def __init__(self, weight):
        self.weight = weight.contiguous(memory_format=torch.channels_last)
        self.taps = weight.permute(2, 3, 1, 0).flatten(0, 1).contiguous()

    def __call__(self, halo, scratch):
        """From (rows + 2, cols + 2, in), with a scratch (rows * cols, in), to (rows * cols, out channels)."""
        rows, cols = (n - 2 for n in halo.shape[:2])
        if halo.device.type == "cpu":
            product = F.conv2d(halo[None].permute(0, 3, 1, 2), self.weight)
            return product[0].permute(1, 2, 0).flatten(0, 1)
        out = halo.new_empty(rows * cols, self.weight.shape[0])
        # On accelerators a convolution may be rounded more coarsely than matrix products are.
        for i, tap in enumerate(self.taps):
            scratch.view(rows, cols, -1).copy_(halo[i // 3 : i // 3 + rows, i % 3 : i % 3 + cols])
            if i:
                out.addmm_(scratch, tap)
            else:
                torch.mm(scratch, tap, out=out)
        return out


def _project(pixels, folded, bias, eps, out):
    """RMSNorm and projection of `pixels` (P, D), which is written to, into `out`."""
    torch.mul(pixels, pixels, out=out)
    scale = out.mean(1, keepdim=True).add_(eps).rsqrt_()
    torch.addmm(bias, pixels.mul_(scale), folded, out=out)


class Moments:
    """Mean and mean square deviation of every channel over all pixels, gathered piece by piece."""

    PIECES = 256  # whose sums are kept before they are put together

    def __init__(self):
        self.counts, self.room = [], None
        self.count, self.mean, self.spread = 0, 0.0, 0.0

    def add(self, x, scratch=None):
        """Take in the pixels `x` (P, D); `scratch`, if given, is written to."""
        if self.room is None:
            # One block: small tensors that stay would cut the heap to pieces among the large ones that come and go.
            self.room = x.new_empty(2, self.PIECES, x.shape[1])
        mean, variance = self.room[:, len(self.counts)]
        if x.device.type == "cpu":
            for target, source in zip(
                (mean, variance), torch.batch_norm_update_stats(as_picture(x), None, None, 0.0), strict=True
            ):
                target.copy_(source)
        else:
            torch.mean(x, 0, out=mean)
            torch.mean(torch.sub(x, mean, out=scratch).square_(), 0, out=variance)
        self.counts.append(len(x))
        if len(self.counts) == self.PIECES:
            self._gather()

    def _gather(self):
        """Put the sums of the pieces together, in float64."""
        if not self.counts:
            return
        counts = self.room.new_full((len(self.counts), 1), self.counts[0], dtype=torch.float64)
        for i, count in enumerate(self.counts):
            if count != self.counts[0]:
                counts[i] = count  # a fill: a tensor made of the list would wait for an accelerator
        means, variances = self.room[:, : len(self.counts)].double()
        count = sum(self.counts)
        mean = (means * counts).sum(0) / count
        spread = (counts * (variances + (means - mean).square())).sum(0)
        apart, total = mean - self.mean, self.count + count
        self.spread = self.spread + spread + apart.square() * (self.count * count / total)
        self.mean = self.mean + apart * (count / total)
        self.count, self.counts = total, []

    def groups(self, num_groups):
        """(2, num_groups): mean and inverse deviation of the groups of channels, in float64."""
        self._gather()
        return group_statistics(self.mean, self.spread / self.count, num_groups)

    def affine(self, weight, bias, num_groups):
        """(2, D): GroupNorm over what was gathered, as `x * scale + shift`."""
        return group_affine(self.groups(num_groups), weight, bias)


def as_picture(x):
    """Pixels (P, D) as the picture (1, D, P, 1), channels last, that torch's own normalisations take."""
    return x.view(1, len(x), 1, -1).permute(0, 3, 1, 2)


def group_statistics(mean, variance, num_groups):
    """Mean and inverse deviation of groups of channels (2, num_groups), from those of every channel in float64."""
    grouped = mean.view(num_groups, -1)
    group_mean = grouped.mean(1, keepdim=True)
    spread = (variance.view(num_groups, -1) + (grouped - group_mean).square()).mean(1)
    return torch.stack((group_mean[:, 0], (spread + NORM_EPS).rsqrt()))


def group_affine(statistics, weight, bias):
    """GroupNorm as scale and shift (2, D), from mean and inverse deviation (2, num_groups)."""
    mean, inverse = by_channel(statistics.double(), len(weight))
    scale = inverse * weight.double()
    return torch.stack((scale, bias.double() - mean * scale)).to(weight.dtype)


def by_channel(statistics, channels):
    """(..., num_groups) repeated to (..., channels)."""
    repeat = channels // statistics.shape[-1]
    return statistics[..., None].expand(*statistics.shape, repeat).flatten(-2)


class Walk:
    """Passes over the pixels of an image that lie as (H * W, D), one piece at a time."""

    def __init__(self, size, width, like, num_groups=8):
        """`width`: channels at most; `like`: a tensor on the device and of the dtype to compute in."""
        self.size, self.num_groups = size, num_groups
        most = PIXELS if like.device.type == "cpu" else MANY_PIXELS
        self.pieces = [
            (slice(rows.start * size[1] + cols.start, (rows.stop - 1) * size[1] + cols.stop), rows, cols)
            for rows, cols in pieces(*size, most)
        ]
        longest = max(flat.stop - flat.start for flat, _, _ in self.pieces)
        self._room = like.new_empty(3, longest * width)

    def scratch(self, i, flat, width):
        """Scratch number `i` (0 to 2) for one piece: (pixels, width)."""
        n = flat.stop - flat.start
        return self._room[i, : n * width].view(n, width)

    def active(self, x, flat, norm):
        """`silu(x * scale + shift)` of one piece with the norm (2, D), in scratch 0."""
        scale, shift = norm
        out = self.scratch(0, flat, x.shape[1])
        return F.silu(torch.addcmul(shift, x[flat], scale, out=out), inplace=True)

    def moments(self, x):
        """Moments of all of `x`."""
        moments = Moments()
        for flat, _, _ in self.pieces:
            moments.add(x[flat], self.scratch(1, flat, x.shape[1]))
        return moments

    def hidden(self, x, norm, weight, out):
        """`weight @ active(x)` into `out`; returns its moments."""
        moments = Moments()
        for flat, _, _ in self.pieces:
            product = torch.mm(self.active(x, flat, norm), weight.T, out=out[flat])
            moments.add(product, self.scratch(1, flat, out.shape[1]))
        return moments

    def blocks(self, x, hidden, moments, blocks, norms=None, last=None):
        """ResBlocks on `x`, in place where its width stays.

        Args:
            x: (H * W, in). hidden: (H * W, D), written to. moments: those of `x`.
            norms: (2 * blocks, 2, D), filled with the normalisations.
            last: callable (x, hidden, norm, block) that ends the last block in its own way.
        """
        for i, block in enumerate(blocks):
            outer = moments.affine(block.norm_in_weight, block.norm_in_bias, self.num_groups)
            moments = self.hidden(x, outer, block.conv_in, hidden)
            inner = moments.affine(block.norm_out_weight, block.norm_out_bias, self.num_groups)
            if norms is not None:
                norms[2 * i], norms[2 * i + 1] = outer, inner
            if last is not None and block is blocks[-1]:
                return last(x, hidden, inner, block)
            out = x if block.skip is None else hidden.new_empty(hidden.shape)
            moments = Moments()
            for flat, _, _ in self.pieces:
                if block.skip is not None:
                    torch.mm(x[flat], block.skip.T, out=out[flat])
                out[flat].addmm_(self.active(hidden, flat, inner), block.conv_out.T)
                if block is not blocks[-1]:
                    moments.add(out[flat], self.scratch(1, flat, out.shape[1]))
            x = out
        return x
