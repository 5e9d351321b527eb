"""An experiment file -> the runs that are missing -> one table."""
