"""What holds the pages together: the navigation, and what an address can ask of each."""
