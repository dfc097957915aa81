"""What surrounds the attention, in plain PyTorch for any device: the fused guidance network, the projections and the
feature-agnostic layer, a few thousand pixels at a time.

A piece of the image goes through normalisation, activation, product, skip and statistics while it lies in the cache;
only the products are written back. Products are matrix products throughout, 16-bit tensors are computed in float32.
"""

import torch
import torch.nn.functional as F

from .weights import GuidanceWeights

PIXELS = 4096  # of a piece on a CPU: with 128 channels of float32 two megabytes
MANY_PIXELS = 1 << 20  # of a piece elsewhere
RESPONSES = 1 << 20  # of the feature-agnostic layer at once
NORM_EPS = 1e-5


def guidance(image, weights, output_size, key_size, *, dtype, num_groups=8):
    """`anyup_fast.ops.guidance`: (B, H', W', D) and (B, h, w, D), both in float32 at least."""
    compute = torch.promote_types(dtype, torch.float32)
    with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
        weights = GuidanceWeights.from_flat([tensor.to(compute) for tensor in weights.flat()])
        network = _Network(weights, image.shape[-2:], num_groups)
        query = image.new_empty(len(image), *output_size, network.width, dtype=compute)
        key = image.new_empty(len(image), *key_size, network.width, dtype=compute)
        for picture, q, k in zip(image, query, key, strict=True):
            network(picture.to(compute).permute(1, 2, 0).reshape(-1, len(picture)), q, k)
    return query, key


def project_queries(query, conv, norm, weight, bias, *, eps):
    """`anyup_fast.ops.project_queries`, in float32 at least."""
    compute = torch.promote_types(query.dtype, torch.float32)
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        conv, norm, weight, bias = (tensor.to(compute) for tensor in (conv, norm, weight, bias))
        out = query.new_empty(query.shape, dtype=compute)
        height, width, dim = query.shape[1:]
        walk = _Walk((height, width), dim, conv)
        convolve, folded = _Convolution(conv), (weight * norm).T.contiguous()
        for source, target in zip(query, out, strict=True):
            for flat, rows, cols in walk.pieces:
                edges = cols.start == 0, cols.stop == width, rows.start == 0, rows.stop == height
                halo = source[max(rows.start - 1, 0) : rows.stop + 1, max(cols.start - 1, 0) : cols.stop + 1]
                halo = F.pad(halo.to(compute), (0, 0, *map(int, edges)))
                pixels = convolve(halo, walk.scratch(0, flat, dim), walk.scratch(1, flat, dim))
                _project(pixels, folded, bias, eps, target.view(-1, dim)[flat])
    return out


def project_keys(from_image, from_features, weights, *, eps, num_groups=8):
    """`anyup_fast.ops.project_keys`."""
    compute = torch.promote_types(from_image.dtype, torch.float32)
    with torch.no_grad(), torch.autocast(from_image.device.type, enabled=False):
        weights = _cast(weights, compute)
        batch, h, w, dim = from_image.shape
        out = from_image.new_empty(from_image.shape, dtype=compute)
        filters = from_features.shape[1]
        walk = _Walk((h, w), max(2 * dim, filters), weights.merge, num_groups)
        convolve, folded = _Convolution(weights.merge), (weights.weight * weights.norm).T.contiguous()
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
                product = convolve(halo, walk.scratch(0, flat, 2 * dim), x[flat])
                moments.add(product, walk.scratch(1, flat, dim))
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
        rows, cols = (_inside(n, k, out.device) for n in (height, width))
        share = (1 / (rows[:, None] * cols))[..., None, None].to(compute)
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


def _cast(weights, dtype):
    """A tuple of tensors, None and such tuples, in another dtype."""
    if isinstance(weights, torch.Tensor):
        return weights.to(dtype)
    if weights is None:
        return None
    cast = [_cast(part, dtype) for part in weights]
    return type(weights)(*cast) if hasattr(weights, "_fields") else tuple(cast)


def _inside(n, k, device):
    """(n,): how many of the k taps around each place of an axis lie on it."""
    place = torch.arange(n, device=device)
    return (place + k // 2).clamp(max=n - 1) - (place - k // 2).clamp(min=0) + 1


def _reflected(n, device):
    """Places of an axis with one more on either side, reflected; an axis of one place repeats it."""
    return (n - 1 - (n - 1 - torch.arange(-1, n + 1, device=device).abs()).abs()).clamp(0, n - 1)


class _Convolution:
    """3x3 convolution by a weight (out, in, 3, 3) without padding."""

    def __init__(self, weight):
        self.weight = weight.contiguous(memory_format=torch.channels_last)
        self.taps = weight.permute(2, 3, 1, 0).flatten(0, 1).contiguous()

    def __call__(self, halo, scratch, out):
        """From (rows + 2, cols + 2, in), with a scratch (rows * cols, in), into `out` (rows * cols, out channels)."""
        rows, cols = (n - 2 for n in halo.shape[:2])
        if halo.device.type == "cpu":
            product = F.conv2d(halo[None].permute(0, 3, 1, 2), self.weight)
            return out.view(rows, cols, -1).copy_(product[0].permute(1, 2, 0)).view_as(out)
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

    def __init__(self):
        self.counts, self.sums, self.spreads = [], [], []

    def add(self, x, scratch):
        """Take in the pixels `x` (P, D); `scratch` is written to."""
        total = x.sum(0)
        torch.sub(x, total / len(x), out=scratch)
        self.counts.append(len(x))
        self.sums.append(total)
        self.spreads.append(scratch.square_().sum(0))

    def affine(self, weight, bias, num_groups):
        """(scale, shift), each (D,): GroupNorm over what was gathered, as `x * scale + shift`."""
        counts = torch.full((len(self.counts), 1), self.counts[0], dtype=torch.float64, device=weight.device)
        for i, count in enumerate(self.counts):
            if count != self.counts[0]:
                counts[i] = count  # a fill: a tensor made of the list would wait for an accelerator
        sums, spreads = (torch.stack(parts).double() for parts in (self.sums, self.spreads))
        mean = sums.sum(0) / counts.sum()
        variance = (spreads + counts * (sums / counts - mean).square()).sum(0) / counts.sum()
        return group_affine(mean, variance, weight, bias, num_groups)


def group_affine(mean, variance, weight, bias, num_groups):
    """GroupNorm as (scale, shift), from mean and variance of every channel (D,) in float64."""
    grouped = mean.view(num_groups, -1)
    group_mean = grouped.mean(1, keepdim=True)
    spread = (variance.view(num_groups, -1) + (grouped - group_mean).square()).mean(1, keepdim=True)
    scale = ((spread + NORM_EPS).rsqrt() * weight.double().view(num_groups, -1)).flatten()
    shift = bias.double() - group_mean.expand_as(grouped).flatten() * scale
    return scale.to(weight.dtype), shift.to(weight.dtype)


class _Walk:
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

    def active(self, x, flat, affine):
        """`silu(x * scale + shift)` of one piece, in scratch 0."""
        scale, shift = affine
        out = self.scratch(0, flat, x.shape[1])
        return F.silu(torch.addcmul(shift, x[flat], scale, out=out), inplace=True)

    def affine(self, moments, weight, bias):
        """GroupNorm over what `moments` gathered, as (scale, shift)."""
        return moments.affine(weight, bias, self.num_groups)

    def moments(self, x):
        """Moments of all of `x`."""
        moments = Moments()
        for flat, _, _ in self.pieces:
            moments.add(x[flat], self.scratch(1, flat, x.shape[1]))
        return moments

    def hidden(self, x, affine, weight, out):
        """`weight @ active(x)` into `out`; returns its moments."""
        moments = Moments()
        for flat, _, _ in self.pieces:
            product = torch.mm(self.active(x, flat, affine), weight.T, out=out[flat])
            moments.add(product, self.scratch(1, flat, out.shape[1]))
        return moments

    def blocks(self, x, hidden, moments, blocks, last=None):
        """ResBlocks on `x`, in place where its width stays; `last(x, hidden, affine, block)` may end the last one."""
        for block in blocks:
            affine = self.affine(moments, block.norm_in_weight, block.norm_in_bias)
            moments = self.hidden(x, affine, block.conv_in, hidden)
            affine = self.affine(moments, block.norm_out_weight, block.norm_out_bias)
            if last is not None and block is blocks[-1]:
                return last(x, hidden, affine, block)
            out = x if block.skip is None else hidden.new_empty(hidden.shape)
            moments = Moments()
            for flat, _, _ in self.pieces:
                if block.skip is not None:
                    torch.mm(x[flat], block.skip.T, out=out[flat])
                out[flat].addmm_(self.active(hidden, flat, affine), block.conv_out.T)
                if block is not blocks[-1]:
                    moments.add(out[flat], self.scratch(1, flat, out.shape[1]))
            x = out
        return x


class _Network(_Walk):
    """The guidance network for images of one size; beside its results it holds two or three images of D channels."""

    def __init__(self, weights, size, num_groups):
        like = weights.image_conv
        super().__init__(size, len(like), like, num_groups)
        self.weights, self.width = weights, len(like)
        # An angle is a part of the row plus a part of the column: its cosine and sine follow from theirs.
        axes = [torch.linspace(0, 1, n, dtype=torch.float64, device=like.device) for n in size]
        angles = [axis[:, None] * freqs for axis, freqs in zip(axes, weights.freqs.double(), strict=True)]
        self.rows, self.cols = ((angle.cos().to(like.dtype), angle.sin().to(like.dtype)) for angle in angles)

    def __call__(self, rgb, query, key):
        """Fill `query` (H', W', D) and `key` (h, w, D) from the pixels `rgb` (H * W, channels)."""
        in_place = query.shape[:2] == self.size
        of_query = query.view(-1, self.width) if in_place else rgb.new_empty(len(rgb), self.width)
        of_key, hidden = (rgb.new_empty(len(rgb), self.width) for _ in range(2))
        query_moments, key_moments = self._image(rgb, of_query, of_key)
        for x, moments, blocks, out in (
            (of_key, key_moments, self.weights.key, key),
            (of_query, query_moments, self.weights.query, query),
        ):
            if out.shape[0] * out.shape[1] < len(rgb):
                last = self._pooled_last(out)
                self.blocks(x, hidden, moments, blocks, last)
            else:
                self.blocks(x, hidden, moments, blocks)
                if out is key or not in_place:
                    out.view(-1, self.width).copy_(self._pooled(x, out))

    def _image(self, rgb, x, y):
        """Leave the first convolutions of the query and key branches in `x` and `y`; returns their moments."""
        weights, (first, second) = self.weights, self.weights.image
        affine = self._first_affine(rgb, first)
        expand = weights.image_conv.T.contiguous()
        scaled, shift = expand * affine[0], affine[1]
        moments = Moments()
        for flat, _, _ in self.pieces:
            active = F.silu(torch.addmm(shift, rgb[flat], scaled, out=self.scratch(0, flat, self.width)), inplace=True)
            moments.add(torch.mm(active, first.conv_in.T, out=x[flat]), self.scratch(1, flat, self.width))
        affine = self.affine(moments, first.norm_out_weight, first.norm_out_bias)
        moments = Moments()
        for flat, _, _ in self.pieces:
            active = self.active(x, flat, affine)
            torch.mm(rgb[flat], expand, out=x[flat])
            moments.add(x[flat].addmm_(active, first.conv_out.T), self.scratch(1, flat, self.width))
        affine = self.affine(moments, second.norm_in_weight, second.norm_in_bias)
        affine = self.affine(self.hidden(x, affine, second.conv_in, y), second.norm_out_weight, second.norm_out_bias)
        of_query, of_key = Moments(), Moments()
        for flat, rows, cols in self.pieces:
            guide = x[flat].addmm_(self.active(y, flat, affine), second.conv_out.T)
            guide = self._rotated(guide, flat, rows, cols)
            for moments, weight, out in ((of_query, weights.query_conv, x), (of_key, weights.key_conv, y)):
                moments.add(torch.mm(guide, weight.T, out=out[flat]), self.scratch(1, flat, self.width))
        return of_query, of_key

    def _pooled_last(self, out):
        """End of the last ResBlock where its result is pooled to fewer pixels: what is linear comes after that."""

        def last(x, hidden, affine, block):
            for flat, _, _ in self.pieces:
                hidden[flat] = self.active(hidden, flat, affine)
            pooled = self._pooled(x, out), self._pooled(hidden, out)
            return torch.addmm(*pooled, block.conv_out.T, out=out.view(-1, self.width))

        return last

    def _rotated(self, x, flat, rows, cols):
        """Rotary embedding of one piece."""
        row_cos, row_sin = (table[rows, None] for table in self.rows)
        col_cos, col_sin = (table[None, cols] for table in self.cols)
        x = x.view(rows.stop - rows.start, -1, self.width)
        cos, sin, out = (self.scratch(i, flat, self.width).view_as(x) for i in range(3))
        torch.mul(row_cos, col_cos, out=cos).addcmul_(row_sin, col_sin, value=-1)
        torch.mul(row_sin, col_cos, out=sin).addcmul_(row_cos, col_sin)
        half = self.width // 2
        torch.mul(x, cos, out=out)
        out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        out[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return out.view(-1, self.width)

    def _first_affine(self, rgb, block):
        """The first normalisation follows from mean and covariance of the image."""
        weight = self.weights.image_conv.double()
        mean = rgb.mean(0, dtype=torch.float64)
        centred = rgb.double() - mean
        covariance = centred.T @ centred / len(rgb)
        variance = ((weight @ covariance) * weight).sum(1)
        return group_affine(weight @ mean, variance, block.norm_in_weight, block.norm_in_bias, self.num_groups)

    def _pooled(self, x, out):
        """Average of `x` (H * W, D) over the cells of `out` (h, w, D): (h * w, D)."""
        picture = x.view(1, *self.size, self.width).permute(0, 3, 1, 2)
        return F.adaptive_avg_pool2d(picture, out.shape[:2])[0].permute(1, 2, 0).flatten(0, 1)
