"""The reduction of gradients in one backward: hooks, round, buckets, header and trailer."""
