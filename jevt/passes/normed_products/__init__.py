"""The parts of :mod:`jevt.passes.product_norms`, in processing order.

match.py: the norms, with their product and its gradients.
price.py: what is saved.
write.py: the equations in their place.
"""
