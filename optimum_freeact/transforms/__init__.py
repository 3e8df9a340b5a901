"""Invertible transforms of a linear layer's input, and how they are chosen from second moments."""
