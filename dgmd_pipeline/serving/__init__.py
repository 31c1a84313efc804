"""How a model is served: the input that it accepts, and the code that a registered model carries."""
