"""Weight rounding: nearest and second-order."""
