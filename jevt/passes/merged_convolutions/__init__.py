"""The parts of :mod:`jevt.passes.merge_convolutions`, in processing order.

match.py: convolutions of one input that can be one, and what that one is like.
price.py: which of them are faster as one.
write.py: the equations in their place.
"""
