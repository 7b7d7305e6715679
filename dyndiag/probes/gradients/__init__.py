"""Gradients, as the optimizer uses them."""
