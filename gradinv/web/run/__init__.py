"""A run on the page: waiting, live, and finished."""
