"""The one way in which lowering says no, and the one in which it tells the user."""


class JevtWarning(UserWarning):
    """Something could not be compiled by jevt and runs as ``jax.jit`` would run it."""


class NotFusible(Exception):
    """An equation, or a set of them, cannot be one kernel.

    The message is the reason for the plan.
    """
