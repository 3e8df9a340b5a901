"""Optimal-transport merging across architectures for mergekit."""
