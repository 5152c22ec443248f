"""Fits of `W_i = W + M_i` to a stack: ranks and spaces from differences, least squares, Gauss-Newton."""
