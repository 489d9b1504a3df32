"""Remembers a request to stop; apart from the loop so that it can be ready before torch is imported."""

from __future__ import annotations


class StopRequest:
    """Set from a signal handler, read by the loop between two steps."""

    def __init__(self) -> None:
        self.asked = False

    def ask(self) -> None:
        """Only notes it: a signal handler must not communicate."""
        self.asked = True
