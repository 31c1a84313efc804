"""One file for each command; the only place that prints."""
