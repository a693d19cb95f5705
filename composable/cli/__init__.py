"""The command line: parse, call, print. What a command does is in the package that it calls."""
