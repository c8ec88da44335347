"""The warm worker: a small HTTP server, one child process that draws, and the command line as its client."""
