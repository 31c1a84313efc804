"""One file for each command; the only package that prints."""
