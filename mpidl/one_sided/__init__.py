"""Memory that other ranks read and change: RMA windows, locked arrays, active messages, dedicated servers."""
