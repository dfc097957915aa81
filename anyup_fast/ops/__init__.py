"""Public operators, one a file: contract, checks, choice of back end, registration with torch.library, gradients.

What computes lies below: `anyup_fast.plain` (any device) and `anyup_fast.kernels` (Triton), under the same names.
"""

from ..plain import reference
from ..plain.precision import use_precision
from ..plain.weights import Block, GuidanceWeights, KeyWeights
from .attention import backends, choose_backend, why_not, windowed_attention
from .blocks import branches, pooled, pooled_block, project_pixels, res_block
from .choice import use_backend
from .guidance import guidance
from .keys import project_keys
from .queries import project_queries
from .unification import feature_unification
from .windows import neighborhood_bounds, window_bounds

__all__ = [
    "Block",
    "GuidanceWeights",
    "KeyWeights",
    "backends",
    "branches",
    "choose_backend",
    "feature_unification",
    "guidance",
    "neighborhood_bounds",
    "pooled",
    "pooled_block",
    "project_keys",
    "project_pixels",
    "project_queries",
    "reference",
    "res_block",
    "use_backend",
    "use_precision",
    "why_not",
    "window_bounds",
    "windowed_attention",
]
