"""Changes of a transformer's weights that leave its outputs as they are."""
