"""Fill me."""
