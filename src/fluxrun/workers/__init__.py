"""Many pictures on many processes and machines: Ray actors, each with one session pool, so that weights load once."""
