"""How well the data determine W, without the truth: the null space, error variances, undetected directions."""
