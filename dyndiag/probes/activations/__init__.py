"""What is inside the model on the fixed probe batch."""
