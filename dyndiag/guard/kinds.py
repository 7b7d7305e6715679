"""Kinds of values that the guard tells apart."""

from __future__ import annotations

import random

import numpy as np
import torch

Generator = torch.Generator | np.random.Generator | np.random.RandomState | random.Random

MANY = 1000
"""Containers longer than this hold data, not modules."""
# What cannot change; said first because there is so much of it.
FIXED = {type(None), bool, int, float, str, bytes, torch.dtype, torch.device, type}
