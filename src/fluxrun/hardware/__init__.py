"""What this computer has, as a plain value: read in milliseconds, without torch."""
