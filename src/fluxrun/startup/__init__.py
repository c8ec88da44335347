"""What a process of the command line's own imports, and what it leaves out: only what the plan needs."""
