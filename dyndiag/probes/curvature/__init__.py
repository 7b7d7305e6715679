"""Curvature of the loss, and where it stands against the optimizer's edge."""
