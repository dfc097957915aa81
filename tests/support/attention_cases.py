"""Problems for the windowed attention, drawn by number, and what a back end's answer to one has to satisfy."""

import math
import random
from dataclasses import dataclass

import torch

from anyup_fast.ops import neighborhood_bounds, reference, window_bounds

# Relative error (largest difference over largest |value|) against the twin in float64, with the largest seen over 400
# problems in the interpreter beside it.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
# The same for each gradient: largest difference over the largest |expected|, or over a tenth of what it could be where
# slopes cancel. Largest seen over 14 problems in the interpreter, query, key, value: 2.7e-6 (one key: nothing but
# cancellation), 8.4e-7, 2.7e-7; 1.0e-2, 5.7e-3, 1.1e-2; 4.2e-4, 3.0e-4, 4.5e-4.
GRADIENTS = ("query", "key", "value")
GRADIENT_TOLERANCE = {
    torch.float32: dict(query=4e-6, key=2e-6, value=1e-6),
    torch.bfloat16: dict(query=2e-2, key=1.5e-2, value=2e-2),
    torch.float16: dict(query=1.5e-3, key=1e-3, value=1.5e-3),
}
# The matrix units of GPUs round sums of float32 towards zero and take their factors in pieces.
ON_GPUS = 2e-5
if torch.cuda.is_available():
    TOLERANCE[torch.float32] = ON_GPUS
    GRADIENT_TOLERANCE[torch.float32] = dict.fromkeys(GRADIENTS, ON_GPUS)
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


@dataclass
class Problem:
    """Arguments of one call: tensors, bounds, and how they were drawn."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    row_bounds: torch.Tensor
    col_bounds: torch.Tensor
    head_mode: str
    scale: float | None
    text: str

    @property
    def tensors(self):
        """The positional arguments of `windowed_attention`."""
        return self.query, self.key, self.value, self.row_bounds, self.col_bounds

    def to(self, device):
        """The same problem with its tensors (not its bounds) on `device`, strides kept."""
        moved = (_bordered(x.cpu(), device) for x in (self.query, self.key, self.value))
        return Problem(*moved, self.row_bounds, self.col_bounds, self.head_mode, self.scale, self.text)

    def error(self, out):
        """Largest difference from the twin in float64 over the largest |value|; infinite where `out` is not finite."""
        if not torch.isfinite(out).all():
            return math.inf
        wide = (x.double().cpu() for x in (self.query, self.key, self.value))
        expected = reference.windowed_attention(
            *wide, self.row_bounds, self.col_bounds, scale=self.scale, head_mode=self.head_mode
        )
        return ((out.double().cpu() - expected).abs().max() / self.value.double().abs().max()).item()

    def grad(self):
        """A gradient of the output, drawn, inside a buffer full of NaN."""
        shape = *self.query.shape[:3], self.value.shape[3]
        generator = torch.Generator().manual_seed(len(self.text))
        return _bordered(torch.randn(shape, generator=generator).to(self.value.dtype))

    def gradients(self, grad=None):
        """The twin's gradients of query, key and value in float64, on the CPU."""
        wide = [x.double().cpu().requires_grad_() for x in (self.query, self.key, self.value)]
        out = reference.windowed_attention(
            *wide, self.row_bounds, self.col_bounds, scale=self.scale, head_mode=self.head_mode
        )
        return torch.autograd.grad(out, wide, (self.grad() if grad is None else grad).double().cpu())

    def gradient_errors(self, gradients, grad=None):
        """Name to error of each gradient, see `GRADIENT_TOLERANCE`; infinite where one is not finite."""
        given = (self.grad() if grad is None else grad).double().cpu()
        query, key, value = (x.double().cpu() for x in (self.query, self.key, self.value))
        slope = (given.flatten(1, 2) @ value.flatten(1, 2).mT).abs().max() / query.shape[3]
        slope = slope * abs(query.shape[-1] ** -0.5 if self.scale is None else self.scale)
        pixels = math.prod(query.shape[:3]) ** 0.5
        most = slope * key.abs().max(), slope * query.abs().max() * pixels, given.abs().max() * pixels
        errors = {}
        for name, gradient, expected, room in zip(GRADIENTS, gradients, self.gradients(grad), most, strict=True):
            difference = (gradient.double().cpu() - expected).abs().max()
            size = torch.maximum(expected.abs().max(), room / 10).clamp(min=1e-300)
            errors[name] = (difference / size).item() if torch.isfinite(gradient).all() else math.inf
        return errors

    def gradient_faults(self, gradients, grad=None):
        """Sentences about the gradients beyond the tolerance of their dtype."""
        dtypes = self.query.dtype, self.value.dtype
        limits = GRADIENT_TOLERANCE[max(dtypes, key=lambda dtype: GRADIENT_TOLERANCE[dtype]["query"])]
        return [
            f"gradient of {name}: error {error:.2e} exceeds {limits[name]:.1e}"
            for name, error in self.gradient_errors(gradients, grad).items()
            if not error <= limits[name]
        ]


def _bordered(x, device="cpu"):
    """`x` as a slice of a larger buffer full of NaN; its last axis stays dense."""
    shape = [n + 3 for n in x.shape[:-1]] + [x.shape[-1] + 8]
    buffer = torch.full(shape, math.nan, dtype=x.dtype, device=device)
    view = buffer[tuple(slice(1, n + 1) for n in x.shape[:-1]) + (slice(4, x.shape[-1] + 4),)]
    return view.copy_(x)


def make(seed, dtype, size, grid, channels, *, batch=1, heads=4, head_dim=8, ratio=0.1, rule=window_bounds, **options):
    """A problem of stated shape: `size` and `grid` are (rows, columns), tensors lie inside buffers full of NaN."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return _bordered(torch.randn(shape, generator=generator).to(dtype))

    return Problem(
        draw(batch, *size, heads, head_dim),
        draw(batch, *grid, heads, head_dim),
        draw(batch, *grid, channels),
        rule(size[0], grid[0], ratio),
        rule(size[1], grid[1], ratio),
        options.get("head_mode", "mean"),
        options.get("scale"),
        f"{seed}: {dtype} {batch}x{size} from {grid}x{channels}, {heads}x{head_dim}, ratio {ratio:.3g} {options}",
    )


def draw(index, dtype=None, longest=14):
    """Problem number `index`: batch, grids, heads, channels, window, mode and (if None) dtype are drawn from it."""
    rng = random.Random(index)
    heads = rng.choice((1, 2, 4, 4))
    return make(
        index,
        dtype or rng.choice(list(DTYPES.values())),
        (rng.randint(1, longest), rng.randint(1, longest)),
        (rng.randint(1, longest), rng.randint(1, longest)),
        heads * rng.randint(1, 9),
        batch=rng.choice((1, 1, 2)),
        heads=heads,
        head_dim=rng.choice((4, 8, 12, 16, 32)),
        ratio=rng.choice((0.0, 0.05, 0.1, 0.1, 0.2, 0.4, rng.random())),
        rule=rng.choice((window_bounds, window_bounds, neighborhood_bounds)),
        head_mode=rng.choice(("mean", "mean", "split")),
        scale=rng.choice((None, None, 0.5)),
    )
