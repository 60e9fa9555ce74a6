"""What the server does beside running the pages."""
