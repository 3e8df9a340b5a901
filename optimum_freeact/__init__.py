"""Calibrated 4-bit weights, activations and KV cache for transformers."""
