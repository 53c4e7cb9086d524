"""Measured times in the compiler: what is known of this GPU, and measuring what is not."""
