"""Identifiability of W by the data, without the truth: the null space, error variances, undetected directions."""
