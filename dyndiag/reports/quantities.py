"""What series are called in the report, and their units; any other is told by its own name."""

from __future__ import annotations

QUANTITIES: dict[str, tuple[str, str]] = {}


def title(quantity: str) -> str:
    """Of `area/quantity`, as a heading.

    >>> title("activations/dead_share"), title("mine/reward")
    ('Activations: dead share', 'Mine: reward')
    """
    if quantity in QUANTITIES:
        return QUANTITIES[quantity][0]
    area, _, rest = quantity.partition("/")
    return f"{area[:1].upper()}{area[1:]}: {rest.replace('_', ' ').replace('/', ', ')}"


def unit(quantity: str) -> str:
    """Empty for a number without unit, and for one that is not known."""
    return QUANTITIES[quantity][1] if quantity in QUANTITIES else ""
