"""What one backward needs: hooks, buckets, header and trailer of a step."""
