"""Many runs from one command: weights loaded once, each job failing alone, one table at the end."""
