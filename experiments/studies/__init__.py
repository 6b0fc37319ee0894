"""What a command needs and the package does not."""
