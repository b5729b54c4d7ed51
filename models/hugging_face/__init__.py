"""How Hugging Face stores the models: the names and the shapes of their tensors."""
