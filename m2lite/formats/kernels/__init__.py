"""What kernels need to know of each format, a file per family. A row of the table names it; the engine builds on it."""
