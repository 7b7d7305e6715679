"""What the model predicts on the fixed probe batch."""
