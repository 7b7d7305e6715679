"""Continual learning: accuracy by task, and plasticity."""
