"""`mpidl run`: finds the launcher, starts the ranks, and watches them."""
