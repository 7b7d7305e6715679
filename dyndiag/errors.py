"""The one kind of error that dyndiag raises at its door."""


class DyndiagError(ValueError):
    """What was expected, what came, and what to do, in one sentence for the person who gets it."""
