"""What can be done to fine-tunes before they are released, so that they do not give their base away."""
