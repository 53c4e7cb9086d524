"""The parts of the passes that raise norms and softmaxes, in the order in which they run.

==================  ===============================================================================
``cones.py``        what a value is computed from: the values through which all of it goes, and what
                    depends on nothing but one of them
``small.py``        the values of equations at small sizes, on named axes
``norms.py``        the statistics of a norm, found from the root of a variance
``terms.py``        where a gradient ends: the sum of its terms among others
``gradients.py``    the gradient that belongs to a norm's statistics
``write.py``        the composite equations in the place of what was found
==================  ===============================================================================

Everything is found by evaluation: structure only says where to look.
"""
