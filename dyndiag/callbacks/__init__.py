"""One thin adapter a trainer: import the module of the trainer that you use."""
