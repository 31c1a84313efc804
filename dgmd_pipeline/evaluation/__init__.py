"""Measures a trained model, compares it with production, and writes a report."""
