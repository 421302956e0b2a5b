"""What runs on CPUs alone."""
