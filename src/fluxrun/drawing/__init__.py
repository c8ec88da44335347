"""Prompts × seeds into pictures on disk, each stage timed."""
