"""Synchronous training: gradients averaged at every step, weights whole or sharded; or local SGD."""
