"""VATT in JAX: model, losses, weights, sharded training, compilation for TPUs."""
