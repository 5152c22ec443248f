"""The models that share a base, those that do not and why, and how far their tensors fit together."""
