"""One image and its features, prepared once and asked for as much as is needed: regions, points, heads, streams.

Distant pixels know of each other only through the statistics of the normalisations and the keys (docs/design.md). With
these at hand every output pixel follows from its own image pixels and a neighbourhood of one output pixel, so that what
is computed in parts equals the whole.
"""

import copy
import os

import torch
import torch.nn.functional as F

from .checks import checked_box, checked_output_size, checked_points, checked_state
from .heads import linear_head
from .layers import cell_colours
from .ops import windowed_attention
from .ops.attention import runs_plain
from .ops.choice import requested
from .padded import whole_size
from .parts import answer, chosen_tile, digest_of, exactly, filled, part_queries, whole_queries
from .plain import guidance as plain_guidance
from .plain import precision
from .plain.memory import new_empty, nothing_kept, tile_memory
from .plain.norms import RMS_EPS
from .plain.points import most_under, neighbours, weighted, weights_at
from .plain.pooling import Bins, Pool
from .plain.walks import PIXELS, pieces
from .plain.weights import cast
from .stores import Store, as_stored, on_host, stored_dtype

BAND = 1 << 16  # output pixels of a piece of work
GATHERED = 1 << 24  # numbers gathered at once for points


class Prepared:
    """What `prepare` returns. Statistics and keys are computed when the first answer is asked for, and kept.

    Answers record no gradients but those of `values`, or of maps given to `showing`, that ask for some.

    Attributes:
        output_size: (H, W) of the image, or of the picture in it (`within`), the default of every answer.
        channels: of the answers.
    """

    def __init__(self, model, image, features, read=None, state=None, backend=None):
        """Use `AnyUp.prepare`. With `read` (first, last) -> rows (n, W, channels), `image` is but a shape."""
        self.model, self._features, self._value = model, features, features.detach().permute(0, 2, 3, 1)
        self._image, self._read, self._image_shape = (image if read is None else None), read, tuple(image.shape)
        self._shared = {} if state is None else checked_state(state, features)
        self._argmax, self._precision, self._picture, self._records = False, precision.requested(), None, False
        self._backend = requested() if backend is None else backend

    @property
    def output_size(self):
        """(H, W) of the image, or of the picture in it."""
        return self._picture or self._size

    @property
    def _size(self):
        return self._image_shape[2:]

    def _whole(self, size):
        """(H', W') of the image for an output of `size`."""
        return size if self._picture is None else whole_size(size, self._picture, self._size)

    @property
    def channels(self):
        """Channels of the answers: those of the features, or the rows of the head."""
        return self._value.shape[-1]

    @property
    def image(self):
        """The image (B, channels, H, W); None for a picture that is read by rows."""
        return self._image

    @property
    def maps(self):
        """What is spread over the output: the features, or the head's answers for them, (B, C, h, w)."""
        return self._value.permute(0, 3, 1, 2)

    @answer
    def state(self):
        """What has been computed once for every answer, to be given to `AnyUp.prepare` again.

        Returns:
            {"key": projected keys (B, h, w, heads, d), "norms": scales and shifts of the normalisations}.
        """
        self._prepare()
        return {name: self._shared[name] for name in ("key", "norms")}

    @answer
    def full(self, output_size=None):
        """Everything: what `AnyUp.forward` gives, through the head if there is one.

        Args:
            output_size: (H', W'); None means (H, W).

        Returns:
            (B, C, H', W') in the dtype of the features; with `argmax` labels (B, H', W'), int64.
        """
        size = checked_output_size(output_size, self.output_size)
        box, size = (0, 0, *size), self._whole(size)
        if self._image is None:
            return self._region(box, size)
        if "norms" in self._shared:
            query = whole_queries(self.model, self._image, self._shared, size)
            if query is None:
                return self._region(box, size)
        else:
            query, key, norms = self.model.guided(self._image, self._features, size)
            self._shared.update(key=key, norms=norms)
        query = self.model.projected_queries(query)
        return self._attend(query if box[2:] == size else query[:, : box[2], : box[3]], box, size)

    @answer
    def region(self, top, left, height, width, output_size=None):
        """A rectangle of `full(output_size)`, at the cost of its own pixels.

        Args:
            top, left: its first row and column in the output.
            height, width: how many rows and columns.
            output_size: (H', W') of the whole output; None means (H, W).

        Returns:
            (B, C, height, width), or labels (B, height, width).

        Raises:
            ValueError: an empty rectangle, or one that leaves the output.
        """
        size = checked_output_size(output_size, self.output_size)
        return self._region(checked_box((top, left, height, width), size), self._whole(size))

    @answer
    def at(self, points, output_size=None, align="pixel"):
        """Features of single output pixels.

        Args:
            points: (B, N, 2) or (N, 2) for all images, rows first. "pixel": whole numbers in [0, H') x [0, W').
                "normalized": floats in [0, 1], 0 the outer edge of the first pixel and 1 that of the last; the pixel
                that a point lies in answers.
            output_size: (H', W'); None means (H, W).
            align: "pixel" or "normalized".

        Returns:
            (B, N, C), or labels (B, N).

        Raises:
            ValueError: points outside, of another kind or shape.
        """
        size = checked_output_size(output_size, self.output_size)
        points, size = checked_points(points, len(self._features), size, align), self._whole(size)
        self._prepare()
        return self._answers_at(points, self._queries_at(points, size), size)

    @exactly
    def _answers_at(self, points, query, size):
        row_bounds, col_bounds = self._bounds(size)
        key, answers = self._shared["key"], []
        with self._recorded():
            for b, value in enumerate(self._value):
                windows = row_bounds[points[b, :, 0]], col_bounds[points[b, :, 1]]
                keys = windows[0].diff(dim=1).max() * windows[1].diff(dim=1).max()
                step = max(1, GATHERED // (int(keys) * max(key[0, 0, 0].numel(), self.channels)))
                parts = zip(query[b].split(step), *(bounds.split(step) for bounds in windows), strict=True)
                answers.append(torch.cat([weighted(*weights_at(q, key[b], r, c), value) for q, r, c in parts]))
            answers = torch.stack(answers)
        return answers.argmax(-1) if self._argmax else answers

    @answer
    def attention(self, row, col, output_size=None):
        """Where one output pixel looks: the mean over the heads of its weights over the low-res grid.

        Args:
            row, col: the output pixel.
            output_size: (H', W'); None means (H, W).

        Returns:
            (B, h, w), float32, zero outside the window, the sum of each map is 1.
        """
        size = checked_output_size(output_size, self.output_size)
        points, size = checked_points([[row, col]], len(self._features), size, "pixel"), self._whole(size)
        self._prepare()
        return self._maps_at(row, col, self._queries_at(points, size), size)

    @exactly
    def _maps_at(self, row, col, query, size):
        row_bounds, col_bounds = self._bounds(size)
        key = self._shared["key"]
        maps = torch.zeros(key.shape[:3], dtype=torch.float32, device=key.device)
        for b in range(len(maps)):
            weights, rows, cols = weights_at(query[b], key[b], row_bounds[[row]], col_bounds[[col]])
            maps[b][rows[0, :, None], cols[0]] = weights[0].view(rows.shape[1], -1).float()
        return maps

    def attention_map(self, output_size=None):
        """Where every output pixel looks, as the RGB picture of `AnyUp.forward(vis_attn=True)`: (B, 3, H', W')."""
        return self.showing(cell_colours(self._features).to(self._features.dtype)).full(output_size)

    @answer
    def head(self, linear, *, argmax=False):
        """The same answers for `weight @ features + bias`, at the cost of the rows of the weight in place of C.

        Exact: the weights of every pixel sum to 1, so the head can be applied to the low-res features.

        Args:
            linear: an nn.Linear, a 1x1 nn.Conv2d, a pair (weight (K, C), bias (K,) or None), or a weight (K, C):
                principal components, text embeddings, class prototypes.
            argmax: answer with the index of the greatest of the K numbers, which are never held at full resolution.

        Returns:
            Prepared, sharing statistics and keys with this one.

        Raises:
            ValueError: a head that is not linear in the channels or does not fit them.
        """
        weight, bias = linear_head(linear, self.channels)
        value = self._value
        wide = torch.promote_types(value.dtype, torch.float32)
        with torch.autocast(value.device.type, enabled=False), self._recorded():
            weight, bias = (None if t is None else t.detach().to(value.device, wide) for t in (weight, bias))
            headed = self.showing(F.linear(value.to(wide), weight, bias).to(value.dtype).permute(0, 3, 1, 2))
        headed._argmax = argmax
        return headed

    def showing(self, value):
        """The same answers for other maps (B, C, h, w) on the grid of the features, spread by the same attention.

        Returns:
            Prepared, sharing statistics and keys with this one.

        Raises:
            ValueError: maps of another batch or grid.
        """
        if value.ndim != 4 or 0 in value.shape or value[:, 0].shape != self._features[:, 0].shape:
            raise ValueError(
                f"value: need (B, C, h, w) as the features {tuple(self._features.shape)}, got {tuple(value.shape)}"
            )
        other = copy.copy(self)
        other._value, other._argmax, other._records = value.permute(0, 2, 3, 1), False, False
        return other

    def within(self, height, width):
        """The same answers for a picture in the upper left of the image, (height, width), whose rest is padding.

        Sizes and coordinates are the picture's; features and statistics remain those of the image.

        Returns:
            Prepared, sharing statistics and keys with this one.

        Raises:
            ValueError: the picture leaves the image.
        """
        other = copy.copy(self)
        other._picture = checked_box((0, 0, height, width), self._size)[2:]
        return other

    def stream(self, tile=None, output_size=None, out=None, max_memory=None, resume=False):
        """The whole output, tile by tile, in memory for one tile and its neighbourhood.

        Args:
            tile: side of the tiles in pixels, or (height, width); None means 256, or with `max_memory` the largest
                power of two that stays within.
            output_size: (H', W'); None means (H, W).
            out: None to iterate; a tensor, numpy array or memmap, or zarr array of the shape of `full` to fill; or the
                path of an .npy file or a .zarr folder to make. While the latter is incomplete it is called
                `NAME.partial` (`anyup_fast.stores.Store`). On disk bfloat16 becomes float32, and labels uint8 (int32
                beyond 256 classes).
            max_memory: bytes that a tile may take while it is computed.
            resume: with a path: finish what an interrupted stream has left.

        Returns:
            With `out`, what was filled (a path is returned as pathlib.Path). Else an iterator over
            ((top, left, height, width), tile), row by row; a tile is (B, C, height, width), labels (B, height, width).

        Raises:
            ValueError: sizes that do not fit, `max_memory` below what the smallest tile takes, other settings than the
                unfinished stream's. FileExistsError: the path, or an unfinished stream without `resume`.
        """
        size = checked_output_size(output_size, self.output_size)
        tile = chosen_tile(tile, max_memory, self.tile_memory)
        region = self.region if out is None else torch.no_grad()(self.region)
        compute = region if max_memory is None else nothing_kept()(region)
        boxes = [
            (top, left, min(tile[0], size[0] - top), min(tile[1], size[1] - left))
            for top in range(0, size[0], tile[0])
            for left in range(0, size[1], tile[1])
        ]
        if out is None:
            return ((box, compute(*box, size)) for box in boxes)
        shape = (len(self._features), *(() if self._argmax else (self.channels,)), *size)
        dtype = stored_dtype(self._value.dtype, self.channels if self._argmax else None)
        if isinstance(out, (str, os.PathLike)):
            store = Store(out, shape, dtype, tile, {"content": self._digest()}, resume)
            missing = (box for box in boxes if box not in store.done)
            for box, part in on_host(((box, compute(*box, size)) for box in missing), self._shared):
                store.write(box, as_stored(part, dtype))
            return store.finish()
        return filled(out, shape, dtype, ((box, compute(*box, size)) for box in boxes), self._shared)

    def tile_memory(self, tile):
        """Bytes that a tile (height, width) takes while it is computed, itself included; statistics and keys not."""
        dim, element = self.model.rope.freqs.shape[1], self._value.element_size()
        batch, device = len(self._features), self._value.device
        plain = runs_plain(device, self._value.dtype)
        return tile_memory(tile, BAND, batch, dim, self.channels, element, self._argmax, device, plain)

    def _digest(self):
        """What a stream depends on besides its sizes, as a hexadecimal number; of an image that is read, the shape."""
        tensors = [*self.model.state_dict().values(), self._features, self._value]
        if self._image is not None:
            tensors.append(self._image)
        decode = self.model.cross_decode
        settings = self._image_shape, decode.window_ratio, decode.window_rule, self._argmax, *(self._picture or ())
        return digest_of(settings, tensors)

    def _prepare(self):
        """Statistics of the normalisations and keys, once for everything that shares them."""
        if "norms" in self._shared:
            return
        if self._image is not None:
            _, key, norms = self.model.guided(self._image, self._features, (0, 0))
        else:
            norms, from_image = plain_guidance.statistics(
                self._read, self._guide().weights, self._size, self._features.shape[-2:]
            )
            key, norms = self.model.projected_keys(from_image[None], self._features), norms[None]
        self._shared.update(key=key, norms=norms)

    def _guide(self):
        """The guidance network, pixel by pixel."""
        if "guide" not in self._shared:
            weights = self.model.guidance_weights()
            compute = torch.promote_types(weights.image_conv.dtype, torch.float32)
            self._shared["guide"] = plain_guidance.Guide(cast(weights, compute), self._size)
        return self._shared["guide"]

    def _pixels(self, b, rows, cols):
        """Pixels (rows, cols, channels) of two slices of an image."""
        if self._image is None:
            return self._read(rows.start, rows.stop)[:, cols]
        return self._image[b, :, rows, cols].permute(1, 2, 0).to(self._guide().weights.image_conv.dtype)

    def _region(self, box, size):
        self._prepare()
        top, left, height, width = box
        shape = len(self._features), height, width
        with self._recorded():
            if self._argmax:
                out = torch.empty(shape, dtype=torch.int64, device=self._value.device)
            else:
                out = new_empty(self._value, (*shape, self.channels), recorded=self._records).permute(0, 3, 1, 2)
        for rows, cols in pieces(height, width, BAND):
            part = top + rows.start, left + cols.start, rows.stop - rows.start, cols.stop - cols.start
            answers = self._piece(part, size)
            with self._recorded():
                out[..., rows, cols] = answers
        return out

    def _piece(self, box, size):
        top, left, height, width = box
        rows = slice(max(top - 1, 0), min(top + height + 1, size[0]))
        cols = slice(max(left - 1, 0), min(left + width + 1, size[1]))
        query = self.model.projected_queries(self._queries(rows, cols, size))
        query = query[:, top - rows.start :, left - cols.start :][:, :height, :width]
        return self._attend(query.to(self._shared["key"].dtype), box, size)

    @exactly
    def _queries(self, rows, cols, size):
        """Queries (B, rows, cols, D) of two slices of an output of `size`, before their convolution."""
        if self._image is not None:
            fused = part_queries(self.model, self._image, self._shared, rows, cols, size)
            if fused is not None:
                return fused
        guide = self._guide()
        axes = [Bins(n, m, part) for n, m, part in zip(self._size, size, (rows, cols), strict=True)]
        row_pixels, col_pixels = (axis.needed for axis in axes)
        queries = []
        for b, norms in enumerate(self._shared["norms"]):
            pool = Pool(*axes, guide.width, like=norms)
            whole = size == self._size
            out = norms.new_empty(len(axes[0]), len(axes[1]), guide.width) if whole else None
            for r, c in pieces(row_pixels.stop - row_pixels.start, col_pixels.stop - col_pixels.start, PIXELS):
                there = slice(row_pixels.start + r.start, row_pixels.start + r.stop)
                across = slice(col_pixels.start + c.start, col_pixels.start + c.stop)
                x = guide.queries(guide.guide(self._pixels(b, there, across), there, across, norms), norms)
                if whole:
                    out[r, c] = x
                else:
                    pool.add(x, there, across)
            queries.append(out if whole else pool.mean())
        return torch.stack(queries)

    @exactly
    def _queries_at(self, points, size):
        """Projected queries (B, N, heads, d) of output pixels (B, N, 2)."""
        if points.shape[1] * most_under(self._size, size) > 2 * self._size[0] * self._size[1]:
            query = self.model.projected_queries(self._queries(slice(0, size[0]), slice(0, size[1]), size))
            return torch.stack([q[p[:, 0], p[:, 1]] for q, p in zip(query, points, strict=True)])
        guide = self._guide()
        conv, norm, weight, bias = cast(self.model.query_projection(), guide.weights.image_conv.dtype)
        taps = conv.permute(2, 3, 1, 0).flatten(0, 2)
        queries = []
        for b, norms in enumerate(self._shared["norms"]):
            found = []
            for some in points[b].split(max(1, PIXELS // most_under(self._size, size))):
                (rows, row_share), (cols, col_share) = (
                    neighbours(some[:, axis].tolist(), self._size[axis], size[axis], norms) for axis in (0, 1)
                )
                rgb = self._gathered(b, rows, cols)
                x = guide.queries(guide.guide(rgb, rows[:, :, None], cols[:, None], norms), norms)
                x = torch.einsum("nip,npqd,njq->nijd", row_share, x, col_share).flatten(1) @ taps
                x = x * (x.square().mean(1, keepdim=True) + RMS_EPS).rsqrt() * norm
                found.append(F.linear(x, weight, bias))
            queries.append(torch.cat(found))
        key = self._shared["key"]
        return torch.stack(queries).unflatten(-1, key.shape[-2:]).to(key.dtype)

    def _gathered(self, b, rows, cols):
        """Pixels (N, p, q, channels) at the rows (N, p) and columns (N, q)."""
        if self._image is not None:
            rgb = self._image[b].permute(1, 2, 0)[rows[:, :, None], cols[:, None]]
            return rgb.to(self._guide().weights.image_conv.dtype)
        return torch.stack(
            [self._read(int(r[0]), int(r[-1]) + 1)[r - r[0]][:, c] for r, c in zip(rows, cols, strict=True)]
        )

    def _recorded(self):
        """The mixing, whose gradients are recorded where `answer` says so."""
        return torch.set_grad_enabled(self._records)

    def _bounds(self, size):
        return self.model.cross_decode.bounds(size, self._features.shape[-2:])

    def _attend(self, query, box, size):
        """Answers for projected queries (B, height, width, heads, d) of a box of the output."""
        top, left, height, width = box
        row_bounds, col_bounds = self._bounds(size)
        if box != (0, 0, *size):  # tables as they were made need not be looked at
            row_bounds, col_bounds = row_bounds[top : top + height], col_bounds[left : left + width]
        key, value = self._shared["key"], self._value
        if not self._argmax:
            with self._recorded():
                return windowed_attention(query, key, value, row_bounds, col_bounds).permute(0, 3, 1, 2)
        labels = torch.empty(query.shape[:3], dtype=torch.int64, device=query.device)
        for rows, cols in pieces(height, width, BAND):
            logits = windowed_attention(query[:, rows, cols], key, value, row_bounds[rows], col_bounds[cols])
            labels[:, rows, cols] = logits.argmax(-1)
        return labels
