"""What adapters of all hosts share: checked settings and an engine loaded on first use."""
