"""Kasmina: layers that hold seeds, their state, and what loads, runs and measures kernels."""
