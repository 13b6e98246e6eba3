"""The search bench: searches and baselines on the same data, at the same sizes, by one measure."""
