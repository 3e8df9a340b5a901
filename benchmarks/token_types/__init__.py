"""Models with several token types, made here, quantized every way, and scored."""
