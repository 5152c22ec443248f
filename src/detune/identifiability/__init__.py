"""What the data determine of W, without the truth: the null space, error variances, undetected directions."""
