"""Training in step: gradients reduced over all ranks, weights whole or sharded; or parameters averaged now and then."""
