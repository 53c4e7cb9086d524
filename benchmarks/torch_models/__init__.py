"""PyTorch twins of the workloads: same shapes, bfloat16, scaled_dot_product_attention,
channels-last convolutions, losses in float32. JAX is not imported here."""
