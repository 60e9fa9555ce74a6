"""What a gradient says without a search: labels, features, and the layers below them, in closed form."""
