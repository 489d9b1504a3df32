"""The center variable: who holds which elements, the clock, and how ranks reach it."""
