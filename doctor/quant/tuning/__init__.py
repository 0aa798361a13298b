"""Tunes what a quantized checkpoint stores in 16 bits (scales and norm gains) against the model it was made from."""
