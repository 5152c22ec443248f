"""Choice of the models that an answer is from: one of those that are identical, or the finest. Methods share it."""
