"""The record of a run: run.json, the picture files, versions and hardware."""
