"""Code that runs only on CPUs."""
