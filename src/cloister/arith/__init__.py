"""Exact integer arithmetic that both sides of the boundary use: the modulus and the int8 product. Holds no secret."""
