"""The commands of the command line: each composes configuration, data, workers, rounds and reports."""
