"""VATT in JAX, the twin of the torch model: model, losses, weights, sharded training, compilation for TPUs."""
