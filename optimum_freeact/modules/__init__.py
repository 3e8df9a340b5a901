"""The modules that replace `nn.Linear`, the 4-bit cache layer, and what finds and replaces them."""
