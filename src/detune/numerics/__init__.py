"""Numerical tools: linear algebra, devices, seeded random numbers, the grids of floating-point numbers."""
