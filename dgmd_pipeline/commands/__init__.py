"""The commands, and the code that they share. No other package prints to standard output."""
