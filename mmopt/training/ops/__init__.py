"""Rules of operators, one file per family."""
