"""What the commands besides train do."""
