"""What trained models are worth, on problems that they have not seen."""
