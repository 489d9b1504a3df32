"""`mpidl doctor`: the checks and the command."""
