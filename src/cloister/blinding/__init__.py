"""Hides a row, checks a product, recovers the answer: the blinded linear."""
