"""The seam to transformers: quantizer and registration."""
