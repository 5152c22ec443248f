"""Which models share a base, which do not and why, and how far their tensors fit together."""
