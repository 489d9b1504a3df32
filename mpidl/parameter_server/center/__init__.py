"""The center variable: which rank holds which elements, the clock, and how ranks reach the center."""
