"""Logits of attention and of the output, read off the training's own forward passes."""
