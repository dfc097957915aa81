"""Weights shipped with the package, and their model card."""
