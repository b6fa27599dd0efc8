"""Teacher workers: score sampled tokens with top-K log-probs."""
