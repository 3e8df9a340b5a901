"""Pure arithmetic on tensors: rounding, packing, clipping, Kronecker products, Hadamard matrices, matrix means."""
