"""What is promised about one client's data, and what that costs."""
