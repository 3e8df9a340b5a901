"""Quality, size and cost of every preset, its ablations and published peers, on real models and held-out text."""
