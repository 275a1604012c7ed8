"""Pure mathematics over protocols: no process groups, no files, no logs."""
