"""A trained model -> measurements, a comparison with production, and a report."""
