"""The command line: the Hydra app and its subcommands."""
