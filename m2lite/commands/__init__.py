"""The commands: arguments in, text and exit codes out. They touch no array and no byte layout."""
