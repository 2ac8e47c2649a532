"""Entry points and the command line, thin."""
