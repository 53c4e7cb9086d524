"""The parts of ``raise_attention``, in the order in which they run.

==================  ===============================================================================
``scans.py``        a step of the loop forward and of the loop backward as one program
``region.py``       which equations may be one attention: everything between the products around a
                    softmax, forward and backward
``labels.py``       names for the axes of every value in a region, so that views say nothing more
``scores.py``       what is done to Q·Kᵀ before the softmax: scale, biases, masks
``roles.py``        which product gives what: out, d_q, d_k, d_v
``values.py``       the values of equations on random numbers, on named axes
``small.py``        the values of a region at small sizes, and those of attention: they must agree
``masks.py``        masks of positions alone: causal ones
``policy.py``       whether it may be replaced: types, roundings, order, and what cuDNN can do
``arrange.py``      the layout that costs the fewest transpositions
``emit.py``         the two equations, and what makes their operands
==================  ===============================================================================
"""
