"""What several workers do with a model: loading, tokenization, shared prefixes, weights as buckets."""
