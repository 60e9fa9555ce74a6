"""What is searched for: the pixels, by matching what the gradient says of them."""
