"""Which of the models an answer is from: one of those that are identical, or the finest ones. Methods share this."""
