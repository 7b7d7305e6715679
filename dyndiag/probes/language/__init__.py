"""Language models: token policies, and traces of what they generate."""
