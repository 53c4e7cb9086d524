"""The parts of the passes that raise norms and softmaxes, in the order in which they run.

==============================  ===================================================================
``cones.py``                    what a value is computed from: the values through which all of it
                                goes, and what depends on nothing but one of them
``small.py``                    the values of equations at small sizes, on named axes
``norms.py``                    the statistics of a norm, found from the root of a variance
``softmaxes.py``                those of a softmax, found from the sum of an exponential
``masks.py``                    the masks of a softmax's exponentials
``terms.py``                    where a gradient ends: the sum of its terms among others
``search.py``                   the search for a gradient: sums, and cotangents of their terms
``gradients.py``                the gradient that belongs to a norm's statistics
``gradient_sums.py``            its sums, as far as gradients of scale and bias are among them
``softmax_gradients.py``        that of a softmax
``logsumexp_gradients.py``      that of a logsumexp, a softmax times a number a row
``cross_entropies.py``          what a cross entropy is made of around a softmax's statistics
``cross_entropy_gradients.py``  whether that of one is there without its loss
``smoothed_labels.py``          labels of two numbers, one for the target
``rows.py``                     where the rows of a composite are, and arithmetic with their numbers
``write.py``                    the composite equations in the place of what was found
``write_softmax.py``            those of a softmax, and what the program computes of its rows
``run.py``                      the driver of both passes: finds, counts, and replaces
==============================  ===================================================================

Everything is found by evaluation: structure only says where to look.
"""
