"""The parts of :mod:`jevt.passes.chunk_logits`, in processing order.

rows.py: where the rows are in a value, and what an equation is on some of them.
region.py: the equations around the logits that can run on some rows at a time.
cut.py, repeat.py, fork.py: the same program with less in the way of that.
policy.py: whether they should, and on how many.
search.py: all regions of a program.
write.py: the loop.
"""
