"""Diffusion language models that transformers does not have, without remote code. Importing a file registers its model."""
