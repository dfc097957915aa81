"""Public operators: contract, checks and choice of back end in a file each, the back ends in files beside them."""

from ..plain import reference
from ..plain.weights import Block, GuidanceWeights, KeyWeights
from .attention import backends, choose_backend, why_not, windowed_attention
from .blocks import branches, pooled, pooled_block, project_pixels, res_block
from .guidance import guidance, project_keys, project_queries
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
    "why_not",
    "window_bounds",
    "windowed_attention",
]
