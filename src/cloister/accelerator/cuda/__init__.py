"""Multiplies on a CUDA device: one fused Triton kernel per shape, weights resident, a ring instead of a call per product"""
