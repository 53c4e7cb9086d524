"""The one way in which lowering says no."""


class NotFusible(Exception):
    """An equation, or a set of them, cannot be one kernel.

    The message is the reason for the plan.
    """
