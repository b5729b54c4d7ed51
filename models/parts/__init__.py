"""What two or more of the models are made of."""
