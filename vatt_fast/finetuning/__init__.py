"""Fine-tuning of one tower with a classifier."""
