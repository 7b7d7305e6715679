"""Weights, and how steps move them."""
