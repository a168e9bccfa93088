"""The comparisons of each host: ``kdgraft demo``."""
