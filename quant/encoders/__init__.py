"""What writes the blocks of each format, a file per family, and the searches that families share."""
