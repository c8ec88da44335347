"""Composition: YAML groups and overrides into one typed, validated run config."""
