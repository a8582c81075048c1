"""What `python -m bench.featurize` measures: models and batches, providers, timing and tables."""
