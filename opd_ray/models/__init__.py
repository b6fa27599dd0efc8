"""Code that several workers share for a model: loading, tokenization, shared prefixes, weights as buckets."""
